"""Ours beside what CTranslate2 makes of its export."""

import os

import bridging
import numpy as np
import pytest

import tfm
from experiments.data.subwords import Subwords
from experiments.inference.predictor import Predictor, Settings
from experiments.interop.ctranslate2 import export_ctranslate2
from experiments.interop.links import flat, tree

# Its other products of 8 bits saturate where the processor has none (VNNI); these are exact, and it
# is the file that is tested here. Read when the library is loaded.
os.environ.setdefault("CT2_USE_MKL", "1")
ctranslate2 = pytest.importorskip("ctranslate2")

COUNT, EOS = 200, 2
SHAPES = {
    "as trained here": {},
    "halves, swish, biases, a vocabulary a side": {
        "sinusoid_layout": "halves", "activation": "swish", "projection_bias": True,
        "source_vocab_size": 30,
    },
    "untied, unscaled, gelu, tensor2tensor's sinusoids": {
        "tied_output": False, "scale_embeddings": False, "activation": "gelu",
        "sinusoid_layout": "tensor2tensor", "first_position": 2, "num_encoder_layers": 1,
    },
    "pre-norm, learned positions": {
        "norm_placement": "pre", "positions": "learned", "max_learned_positions": 64,
        "output_bias": False, "layer_norm_epsilon": 1e-6,
    },
    "post-norm and a final norm": {"final_norm": True, "layer_norm_epsilon": 1e-2},
}  # fmt: skip


def pieces_of(size, side):
    special = ("<pad>", "<s>", "</s>", "<unk>")
    return Subwords(b"a model", (*special, *(f"{side}{i}" for i in range(4, size))), 1, EOS, 3)


def random_translator(bos=1, **changes):
    config = bridging.config_with(**changes)
    arrays = bridging.random_arrays(config, 3, end=EOS)
    if not config.output_bias:
        arrays["embedding"][EOS] *= 1.5
    target = pieces_of(config.vocab_size, "t")
    target = Subwords(target.model, target.pieces, bos, EOS, 3)
    own = config.source_vocab_size
    source = pieces_of(own, "s") if own else target
    settings = Settings(source_length=20, target_length=20)
    model = tfm.Transformer(config)
    return Predictor(model, tree(arrays), source=source, target=target, settings=settings)


def served(path, translator, int8=False):
    export_ctranslate2(path, translator, int8)
    kind = "int8" if int8 else "float32"
    return ctranslate2.Translator(str(path), compute_type=kind, intra_threads=1)


def silenced(translator):
    """Ours with padding and the start symbol out of the distribution, as they are there."""
    params = flat(translator.params)
    config = bridging.dataclasses.replace(translator.model.config, output_bias=True)
    bias = params.get("output_bias", np.zeros(config.vocab_size, np.float32)).copy()
    bias[[0, translator.target.bos]] = bridging.NEVER
    return tfm.Transformer(config), tree(params | {"output_bias": bias})


class Pair:
    def __init__(self, path, translator, int8=False):
        self.theirs, self.translator = served(path, translator, int8), translator
        self.model, self.params = silenced(translator)
        self.bos = translator.target.bos
        rng = np.random.default_rng(2)
        self.source = bridging.sentences(rng, COUNT, translator.source.size, EOS)
        target = bridging.sentences(rng, COUNT, translator.target.size, EOS, first=4)
        self.target = target
        # Without the end symbol, which it adds.
        self.pieces = [translator.source.to_pieces(r[r > 0][:-1]) for r in self.source]

    def scored(self):
        """ln P of each token of the given targets, of ours and of theirs."""
        own = self.translator.target
        given = [own.to_pieces(row[row > 0][:-1]) for row in self.target]
        found = self.theirs.score_batch(self.pieces, given)
        theirs = np.concatenate([s.log_probs for s in found])
        shifted = np.where(self.target == 0, EOS, self.target)
        shifted = np.concatenate([np.full((COUNT, 1), self.bos), shifted[:, :-1]], 1)
        ours = bridging.log_probs(self.model, self.params, self.source, shifted.astype(np.int32))
        chosen = np.take_along_axis(ours, self.target[..., None], -1)[..., 0]
        return chosen[self.target > 0], theirs

    def translated(self, beams):
        found = self.theirs.translate_batch(
            self.pieces, beam_size=beams, length_penalty=0, max_decoding_length=bridging.LENGTH,
            min_decoding_length=0, return_scores=True,
        )  # fmt: skip
        own = self.translator.target.pieces
        ids = [[own.index(piece) for piece in f.hypotheses[0]] for f in found]
        # It leaves the end symbol out; what has fewer than the most tokens has ended.
        ids = [[*row, EOS] if len(row) < bridging.LENGTH else row for row in ids]
        return bridging.padded(ids), np.array([f.scores[0] for f in found])


@pytest.mark.parametrize("name", SHAPES)
def test_its_log_probabilities_and_outputs_are_ours(name, tmp_path):
    pair = Pair(tmp_path, random_translator(**SHAPES[name]))
    ours, theirs = pair.scored()
    print(f"\nlargest difference of log-probabilities {np.abs(ours - theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    for beams in (1, bridging.BEAM):
        ours, log_probs = bridging.beam(pair.model, pair.params, pair.source, pair.bos, EOS, beams)
        theirs, scores = pair.translated(beams)
        rescored = bridging.score(pair.model, pair.params, pair.source, theirs, pair.bos)
        np.testing.assert_allclose(rescored, scores, rtol=0, atol=2e-4)
        differ = (ours != theirs).any(1)
        print(f"beam {beams}: {COUNT - differ.sum()} of {COUNT} equal, "
              f"{len(np.unique(ours, axis=0))} distinct; of the others ln P is at most "
              f"{np.abs(log_probs - scores)[differ].max(initial=0):.1e} apart")  # fmt: skip
        assert differ.sum() <= (COUNT / 20 if beams > 1 else 0)
        assert len(np.unique(ours, axis=0)) >= 10


def test_padding_may_start_the_decoder(tmp_path):
    pair = Pair(tmp_path, random_translator(bos=0))
    np.testing.assert_allclose(*pair.scored(), rtol=0, atol=1e-4)


def test_eight_bits_are_near(tmp_path):
    """How much translations lose by it is measured on trained models, not here."""
    pair = Pair(tmp_path, random_translator(), int8=True)
    ours, theirs = pair.scored()
    error = np.abs(ours - theirs)
    print(f"\nint8: median difference {np.median(error):.1e}, largest {error.max():.1e}")
    assert 1e-5 < np.median(error) < 0.1
    theirs, scores = pair.translated(1)
    ours, _ = bridging.beam(pair.model, pair.params, pair.source, pair.bos, EOS, 1)
    equal = (ours == theirs).all(1).sum()
    print(f"int8: {equal} of {COUNT} greedy outputs equal")
    assert equal > COUNT / 2


def test_the_folder_is_whole_and_the_model_untouched(tmp_path):
    translator = random_translator()
    before = {name: array.copy() for name, array in flat(translator.params).items()}
    export_ctranslate2(tmp_path, translator, int8=True)
    after = flat(translator.params)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "model.bin", "config.json", "shared_vocabulary.json", "source.spm", "target.spm"
    }  # fmt: skip
