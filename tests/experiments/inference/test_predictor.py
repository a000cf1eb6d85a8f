"""Sentences in, translations out: the same in any company, with honest numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

from experiments.checkpoints.run_folder import RunFolderError
from experiments.data.pronunciations import padded
from experiments.data.subwords import SubwordError, Subwords
from experiments.inference import generation
from experiments.inference.ensemble import EnsembleError, ensemble
from experiments.inference.predictor import Settings
from experiments.inference.saved import load, load_together, load_translation, write
from experiments.inference.segmentation import TooLongError
from tfm.kernels.quantization import Quantized, quantize
from tfm.model import Transformer
from tfm.training import init_params

SENTENCES = [
    "small", "sees", "house bird", "house cat", "runs", "bird house", "tree", "tree dog", "the",
    "small home a", "home", "the dog bird", "small a", "a cat a",
]  # fmt: skip
TARGETS = SENTENCES[5:] + SENTENCES[:5]
LONG = "the cat sees. a bird sees! old house dog"


@pytest.fixture(params=["translator", "imported"])
def either(request):
    return request.getfixturevalue(request.param)


def tokens_of(found):
    return [[hypothesis.ids for hypothesis in hypotheses] for hypotheses in found]


@functools.partial(jax.jit, static_argnums=0)
def model_alone(model, params, source, inputs, segments):
    """Logits [1, 24, V] of one pair, and the cross-attention [N, H, T, S] of its tokens."""
    logits, weights = model.apply(
        {"params": params}, source, inputs, target_segment_ids=segments, return_weights=True
    )
    return logits, weights["cross"][:, 0]


def reference(translator, source, target_ids):
    """ln P [T, V] and the cross-attention [N, H, T, S], by one call of the model on one pair."""
    source_ids, bos = translator.source.encode(source), translator.target.bos
    target = padded([target_ids], 24, 1)
    segments = (np.arange(24) < len(target_ids)).astype(np.int32)[None]
    inputs = np.concatenate([[[bos]], target[:, :-1]], axis=1)
    logits, cross = model_alone(
        translator.model, translator.params, padded([source_ids], 16, 1), inputs, segments
    )
    never = jnp.array(sorted({0, bos}))
    log_probs = nn.log_softmax(logits[0, : len(target_ids)].at[:, never].set(-jnp.inf))
    return np.asarray(log_probs), np.asarray(cross)[:, :, : len(target_ids), : len(source_ids)]


def reference_log_probs(translator, source, target_ids):
    """[T, V] of `reference`."""
    return reference(translator, source, target_ids)[0]


def chosen(log_probs, ids):
    return np.asarray(log_probs)[np.arange(len(ids)), list(ids)]


# ---- search


def test_what_was_learned_is_said(translator, imported):
    assert translator(["sees", "runs", "small"]) == ["tree", "cat", "bird"]
    assert imported(["sees", "runs", "small"]) == ["tree", "cat", "bird"]


def test_a_translation_does_not_depend_on_its_company(either):
    together = either.nbest(SENTENCES, 2)
    alone = [either.nbest([sentence], 2)[0] for sentence in SENTENCES]
    assert tokens_of(together) == tokens_of(alone)
    assert len({len(best[0].ids) for best in together}) > 3
    assert either(SENTENCES[::-1]) == [best[0].text for best in together][::-1]
    assert either.nbest([]) == []


def test_hypotheses_are_distinct_best_first_and_spelled_by_the_vocabulary(either):
    for hypotheses in either.nbest(SENTENCES, 3):
        scores = [hypothesis.score for hypothesis in hypotheses]
        assert scores == sorted(scores, reverse=True) and len({h.ids for h in hypotheses}) == 3
        for h in hypotheses:
            assert h.text == either.target.decode(h.ids) and not h.parts
            assert h.ended == (h.ids[-1] == either.target.eos)
            assert not {0, either.target.bos} & set(h.ids)
            assert either.target.eos not in h.ids[:-1]


def test_log_probabilities_are_the_models(either):
    found = either.nbest(SENTENCES, 2)
    for sentence, hypotheses in zip(SENTENCES, found, strict=True):
        for h in hypotheses:
            expected = chosen(reference_log_probs(either, sentence, h.ids), h.ids)
            assert h.log_prob == pytest.approx(expected.sum(), abs=1e-4)


def test_scores_have_the_length_penalty_of_the_settings_or_of_the_call(translator, imported):
    for alpha in (0.0, 0.5, 1.0):
        for h in translator.nbest(SENTENCES[:4], 2, alpha=alpha)[0]:
            assert h.score == pytest.approx(h.log_prob / ((5 + len(h.ids)) / 6) ** alpha, rel=1e-5)
    for h in imported.nbest(SENTENCES[:4], 2)[0]:
        assert h.score == pytest.approx(h.log_prob / len(h.ids), rel=1e-5)
    own = translator.nbest(SENTENCES[:4], alpha=0.6)
    assert own == translator.nbest(SENTENCES[:4])


def test_a_beam_of_one_is_greedy(translator):
    for sentence, (best,) in zip(SENTENCES, translator.nbest(SENTENCES, beam=1), strict=True):
        greedy = reference_log_probs(translator, sentence, best.ids).argmax(-1)
        assert tuple(greedy.tolist()) == best.ids


@pytest.mark.slow
def test_a_translation_that_needs_more_room_gets_it(translator, monkeypatch):
    expected, drawn = translator.nbest(SENTENCES, 2), translator.sample(SENTENCES, seed=1)
    longest = max(len(h.ids) for hypotheses in expected for h in hypotheses if h.ended)
    rooms = []
    real = generation.decode

    def watched(*arguments, length, **rest):
        rooms.append(length)
        return real(*arguments, length=length, **rest)

    monkeypatch.setattr(generation, "decode", watched)
    monkeypatch.setattr(generation, "RATIO", 0.1)
    monkeypatch.setattr(generation, "CONSTANT", 3)
    assert tokens_of(translator.nbest(SENTENCES, 2)) == tokens_of(expected)
    assert tokens_of(translator.sample(SENTENCES, seed=1)) == tokens_of(drawn)
    assert rooms[0] == 4 and 8 in rooms and 8 < longest <= max(rooms)


def test_a_translation_without_an_end_is_marked(translator):
    short = dataclasses.replace(
        translator, settings=dataclasses.replace(translator.settings, target_length=5)
    )
    found = [best for (best,) in short.nbest(SENTENCES)]
    assert {best.ended for best in found} == {True, False}
    assert all(len(best.ids) == 5 for best in found if not best.ended)


def test_progress_is_told_for_each_sentence_once(translator):
    told = []
    translator.nbest([*SENTENCES, LONG], long="split", done=told.append)
    assert sum(told) == len(SENTENCES) + 1 and len(told) > 2
    told.clear()
    translator.score([(s, s) for s in SENTENCES], done=told.append)
    assert sum(told) == len(SENTENCES)


# ---- prefixes


@pytest.mark.slow
def test_translations_begin_with_their_prefixes_whose_probability_counts(either):
    prefixes = ["", "the cat", "a", "home home home the old bird"] * 4
    found = either.nbest(SENTENCES, 2, prefixes=prefixes[: len(SENTENCES)])
    free = either.nbest(SENTENCES, 2)
    for i, hypotheses in enumerate(found):
        forced = either.target.encode(prefixes[i])[:-1] if prefixes[i] else []
        for h in hypotheses:
            assert list(h.ids[: len(forced)]) == forced and len(h.ids) > len(forced)
            expected = chosen(reference_log_probs(either, SENTENCES[i], h.ids), h.ids)
            assert h.log_prob == pytest.approx(expected.sum(), abs=1e-4)
        assert hypotheses[0].score >= hypotheses[1].score
        assert (tokens_of([hypotheses]) == tokens_of([free[i]])) == (not forced)


def test_the_rest_is_searched_as_if_the_prefix_had_been_read(translator):
    forced = translator.target.encode("the cat")[:-1]
    ((best,),) = translator.nbest(SENTENCES[:1], beam=1, prefixes=["the cat"])
    greedy = reference_log_probs(translator, SENTENCES[0], best.ids).argmax(-1)
    assert best.ids[len(forced) :] == tuple(greedy.tolist()[len(forced) :])


def test_a_prefix_as_long_as_its_array_ends_all_the_same(translator):
    prefix = "runs runs runs a"
    forced = translator.forced(prefix)
    assert len(forced) == 16
    ((best,),) = translator.nbest(["house cat"], prefixes=[prefix])
    assert list(best.ids[:16]) == forced and best.ended and best.ids[16:] != best.ids[15:16] * 8


# ---- samples


@pytest.mark.slow
def test_a_sample_depends_on_its_line_and_the_seed_alone(either):
    together = either.sample(SENTENCES, 2, seed=3)
    for line in (0, 5, 13):
        alone = either.sample([SENTENCES[line]], 2, seed=3, lines=[line])
        assert tokens_of(alone) == tokens_of(together[line : line + 1])
    again = either.sample(SENTENCES[::-1], 2, seed=3, lines=range(len(SENTENCES) - 1, -1, -1))
    assert tokens_of(again) == tokens_of(together[::-1])
    other = either.sample(SENTENCES, 2, seed=4)
    assert sum(a == b for a, b in zip(tokens_of(other), tokens_of(together), strict=True)) < 7
    same = tokens_of(either.sample(["the dog bird"] * 6, 2, seed=3))
    assert len({ids for pair in same for ids in pair}) > 6


@pytest.mark.slow
def test_a_samples_log_probability_is_the_models_before_temperature(translator):
    for flags in ({}, {"temperature": 0.5, "top_k": 4}, {"prefixes": ["a dog"] * 4, "top_p": 0.9}):
        found = translator.sample(SENTENCES[:4], **flags)
        for sentence, (h,) in zip(SENTENCES, found, strict=False):
            expected = chosen(reference_log_probs(translator, sentence, h.ids), h.ids)
            assert h.log_prob == h.score == pytest.approx(expected.sum(), abs=1e-4)


def test_a_sample_of_the_likeliest_token_is_greedy(translator):
    greedy = translator.nbest(SENTENCES[:4], beam=1)
    assert tokens_of(translator.sample(SENTENCES[:4], top_k=1)) == tokens_of(greedy)


# ---- given translations


def test_scores_are_those_of_the_model_on_each_pair_alone(either):
    pairs = list(zip(SENTENCES, TARGETS, strict=True))
    for (source, target), scored in zip(pairs, either.score(pairs), strict=True):
        ids = either.target.encode(target)
        assert scored.ids == tuple(ids)
        expected = chosen(reference_log_probs(either, source, ids), ids)
        assert scored.log_probs == pytest.approx(expected, abs=1e-4)
        assert scored.log_prob == pytest.approx(expected.sum(), abs=1e-4)


def test_alignments_are_where_the_last_layer_but_one_looks(either):
    pairs = list(zip(SENTENCES, TARGETS, strict=True))
    for (source, target), links in zip(pairs, either.align(pairs), strict=True):
        ids = either.target.encode(target)
        heads = reference(either, source, ids)[1][0]  # of the first of two layers
        places = heads.mean(0)[:-1, :-1].argmax(-1)
        assert links == [(place, j) for j, place in enumerate(places)]


# ---- long sentences


def test_a_long_sentence_is_refused_with_its_number_of_tokens(translator):
    (tokens,) = translator.lengths([LONG])
    with pytest.raises(TooLongError, match=f"'the cat.*: {tokens} tokens, more than the 16 "):
        translator.nbest(["a", LONG])


def test_a_long_sentence_is_translated_in_parts(translator):
    parts = translator.parts(LONG)
    assert len(parts) == 3 and " ".join(parts) == LONG
    whole, joined = translator.nbest(["a cat", LONG], 2, long="split")
    assert tokens_of([whole]) == tokens_of(translator.nbest(["a cat"], 2))
    alone = translator.nbest(parts, 2)
    assert [h.ids for h in joined[0].parts] == [best[0].ids for best in alone]
    assert joined[0].text == " ".join(best[0].text for best in alone if best[0].text)
    assert joined[0].score == pytest.approx(sum(best[0].score for best in alone), rel=1e-5)
    least = min(best[0].score - best[1].score for best in alone)  # the dearest step is not taken
    assert joined[1].score == pytest.approx(joined[0].score - least, rel=1e-5)
    (scored,) = translator.score([(LONG, joined[0])])
    assert scored.ids == joined[0].ids
    assert scored.log_prob == pytest.approx(joined[0].log_prob, abs=1e-4)


def test_the_pieces_of_parts_are_numbered_through(translator):
    parts = translator.parts(LONG)
    ((best,),) = translator.nbest([LONG], long="split")
    (links,) = translator.align([(LONG, best)])
    pieces = [len(h.ids) - h.ended for h in best.parts]
    assert [j for _, j in links] == list(range(sum(pieces)))
    start = translator.lengths(parts[:1])[0] - 1
    second = translator.align([(parts[1], best.parts[1])])[0]
    assert links[pieces[0] : sum(pieces[:2])] == [(start + i, pieces[0] + j) for i, j in second]


def test_a_prefix_goes_to_the_first_part_and_samples_of_parts_differ(translator):
    ((best,),) = translator.nbest([LONG], prefixes=["a dog"], long="split")
    forced = translator.target.encode("a dog")[:-1]
    assert list(best.parts[0].ids[: len(forced)]) == forced
    assert list(best.parts[1].ids[: len(forced)]) != forced
    twice = ". ".join(["a bird runs"] * 3)
    ((drawn,),) = translator.sample([twice], long="split")
    # With one key for all, three times the same source would be three times the same sample.
    assert len(drawn.parts) == 3 and len({part.ids for part in drawn.parts}) > 1


# ---- ensembles


@pytest.fixture(scope="module")
def mates(translator):
    """Two of one config with the first, one of another."""
    leaves, structure = jax.tree.flatten(translator.params)

    def disturbed(seed):
        keys = jax.random.split(jax.random.PRNGKey(seed), len(leaves))
        noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        return dataclasses.replace(translator, params=jax.tree.unflatten(structure, noisy))

    config = dataclasses.replace(translator.model.config, norm_placement="pre")
    settings = dataclasses.replace(translator.settings, target_length=20)
    params = init_params(Transformer(config), jax.random.PRNGKey(0))
    other = dataclasses.replace(
        translator, model=Transformer(config), params=params, settings=settings
    )
    return [disturbed(1), disturbed(2), other]


@pytest.mark.parametrize(
    ("mean", "count"),
    [
        ("log_linear", 1),
        pytest.param("linear", 1, marks=pytest.mark.slow),
        pytest.param("log_linear", 3, marks=pytest.mark.slow),
        ("linear", 3),
    ],
)
def test_an_ensemble_averages(translator, mates, mean, count):
    mates = mates[:count]
    together = ensemble([("a", translator), *((str(i), m) for i, m in enumerate(mates))], mean)
    pairs = [("the cat", "old dog"), ("a small bird sees", "home")]
    for (source, target), scored in zip(pairs, together.score(pairs), strict=True):
        ids = translator.target.encode(target)
        everyone = jnp.stack([reference_log_probs(t, source, ids) for t in (translator, *mates)])
        joint = {
            "log_linear": nn.log_softmax(everyone.mean(0)),
            "linear": jnp.log(jnp.exp(everyone).mean(0)),
        }[mean]
        assert scored.log_probs == pytest.approx(chosen(joint, ids), abs=1e-4)
    found = together.nbest(SENTENCES, 2)
    rescored = together.score([(s, h) for s, best in zip(SENTENCES, found, strict=True)
                               for h in best])  # fmt: skip
    for h, scored in zip((h for best in found for h in best), rescored, strict=True):
        assert h.log_prob == pytest.approx(scored.log_prob, abs=1e-4)
    assert tokens_of(found) != tokens_of(translator.nbest(SENTENCES, 2))


@pytest.mark.slow
def test_an_ensemble_of_one_model_is_that_model(translator):
    together = ensemble([("a", translator)] * 3)
    assert tokens_of(together.nbest(SENTENCES)) == tokens_of(translator.nbest(SENTENCES))
    drawn = translator.sample(SENTENCES[:4], prefixes=["a"] * 4)
    assert tokens_of(together.sample(SENTENCES[:4], prefixes=["a"] * 4)) == tokens_of(drawn)
    pairs = [(s, "the cat sees") for s in SENTENCES]
    assert together.align(pairs) == translator.align(pairs)


def test_an_ensemble_has_the_least_lengths(translator, mates):
    assert ensemble([("a", translator), ("b", mates[2])]).settings.target_length == 20


def test_models_of_other_vocabularies_are_no_ensemble(translator, imported):
    with pytest.raises(EnsembleError, match="^second: its source vocabulary is not that of first"):
        ensemble([("first", translator), ("second", imported)])


# ---- run folders


def test_what_is_written_loads_and_says_the_same(tmp_path, imported):
    write(tmp_path / "run", imported, {"from": "a test"})
    loaded = load(tmp_path / "run")
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, imported.params))
    assert tokens_of(loaded.nbest(SENTENCES)) == tokens_of(imported.nbest(SENTENCES))
    assert (loaded.model, loaded.settings) == (imported.model, imported.settings)
    with pytest.raises(RunFolderError, match="there is a model already"):
        write(tmp_path / "run", imported, {"from": "a test"})

    small = load(tmp_path / "run", int8=True)
    assert isinstance(small.params["encoder_0"]["feed_forward"]["w1"], Quantized)
    pairs = [(s, "the cat sees") for s in SENTENCES]
    for one, other in zip(small.score(pairs), imported.score(pairs), strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, rel=0.1)
        assert one.log_prob != other.log_prob
    assert len(small(SENTENCES)) == len(SENTENCES)
    together = load_together([tmp_path / "run"] * 2, int8=True)
    assert tokens_of(together.nbest(SENTENCES[:2])) == tokens_of(small.nbest(SENTENCES[:2]))
    with pytest.raises(ValueError, match="not one in 8 bits"):
        write(tmp_path / "small", small, {})


def test_a_folder_of_another_kind_or_of_nothing_is_named_and_not_made(tmp_path):
    with pytest.raises(RunFolderError, match=r"absent: not the folder of a run \(no config"):
        load(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "config.json").write_text('{"preset": "default"}')
    with pytest.raises(RunFolderError, match="not the folder of a translation run"):
        load_translation(tmp_path)
    (tmp_path / "config.json").write_text('{"task": "translate"}')
    with pytest.raises(RunFolderError, match="no checkpoint"):
        load(tmp_path)


def test_a_vocabulary_that_is_missing_or_anothers_is_named(tmp_path, translator, rolled):
    write(tmp_path, translator, {})
    Subwords.save(rolled, tmp_path / "vocabulary", "target")
    with pytest.raises(RunFolderError, match=r"target\.json: not the vocabulary"):
        load(tmp_path)
    (tmp_path / "vocabulary" / "source.spm").unlink()
    with pytest.raises(SubwordError, match=r"source\.spm"):
        load(tmp_path)


def test_a_vocabulary_of_another_size_is_no_translators(translator):
    pieces = (*translator.target.pieces, "more")
    larger = dataclasses.replace(translator.target, pieces=pieces)
    with pytest.raises(ValueError, match=r"vocab_size=\d+, its vocabulary \d+ pieces"):
        dataclasses.replace(translator, target=larger)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"source_length": 0}, "source_length=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"penalty": "none"}, "penalty='none'"),
    ],
)
def test_impossible_settings(changes, why):
    with pytest.raises(ValueError, match=why):
        Settings(**({"source_length": 4, "target_length": 4} | changes))


@pytest.mark.slow
def test_quantized_parameters_make_a_translator(translator):
    small = dataclasses.replace(translator, params=quantize(translator.params))
    together = ensemble([("a", small), ("b", small)])
    assert tokens_of(together.nbest(SENTENCES[:3])) == tokens_of(small.nbest(SENTENCES[:3]))


TOO_LONG = r"'the cat.*: \d+ tokens, more than the (16|24) "
LEAVES_NO_ROOM = r"\d+ tokens, more than the 23"
REFUSED = [
    (lambda p: p.nbest(["a"], 3, 2), ValueError, "nbest=3 .* beam=2"),
    (lambda p: p.nbest(["a", "a"], prefixes=["a"]), ValueError, "1 prefixes .* 2 sources"),
    (lambda p: p.sample(["a"], temperature=0.0), ValueError, "temperature"),
    (lambda p: p("sees"), TypeError, r"sources must be a list of texts: \['sees'\], not 'sees'"),
    (lambda p: p.nbest("sees", 2), TypeError, "sources must be a list"),
    (lambda p: p.sample("sees"), TypeError, "sources must be a list"),
    (lambda p: p.lengths("sees"), TypeError, "sources must be a list"),
    (lambda p: p(["a", 3]), TypeError, r"sources\[1\] must be a text, not 3"),
    (lambda p: p(["a"], prefixes="b"), TypeError, "prefixes must be a list"),
    (lambda p: p.score(("a", "b")), TypeError, r"pairs\[0\] must be \(source, target\), not 'a'"),
    (lambda p: p.score([("a", ["b"])]), TypeError, r"pairs\[0\] must be of texts"),
    (lambda p: p.align("ab"), TypeError, r"pairs\[0\] must be \(source, target\)"),
    (lambda p: p.nbest(["a"], prefixes=["runs " * 8]), TooLongError, LEAVES_NO_ROOM),
    (lambda p: p.score([("a", "a"), (LONG, "a")]), TooLongError, TOO_LONG),
    (lambda p: p.score([("a", "a"), ("a", f"{LONG} {LONG}")]), TooLongError, TOO_LONG),
]


@pytest.mark.parametrize(("given", "kind", "words"), REFUSED, ids=[row[2] for row in REFUSED])
def test_refusals(translator, given, kind, words):
    with pytest.raises(kind, match=words):
        given(translator)
