"""Marian models as Hugging Face's transformers computes them, beside what is imported from them,
and ours beside what transformers makes of their export."""

import dataclasses
import json

import bridging
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm
from experiments.interop.files import Folder
from experiments.interop.links import tree
from experiments.interop.marian_model import model_files, read_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPES = {
    "shared, swish": {"activation_function": "swish"},
    "shared, no scale, silu, 1 + 3 layers": {
        "activation_function": "silu", "scale_embedding": False, "encoder_layers": 1,
        "decoder_layers": 3,
    },
    "a vocabulary a side, gelu": {
        "activation_function": "gelu", "share_encoder_decoder_embeddings": False,
        "decoder_vocab_size": 50,
    },
    "a vocabulary a side, untied, relu": {
        "activation_function": "relu", "share_encoder_decoder_embeddings": False,
        "decoder_vocab_size": 50, "tie_word_embeddings": False,
    },
    "shared by name, untied": {"activation_function": "relu", "tie_word_embeddings": False},
    "padding first, a start of its own": {
        "activation_function": "relu", "pad_token_id": 0, "eos_token_id": 2,
        "decoder_start_token_id": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    },
}  # fmt: skip
COUNT = 200


def random_marian(path, **changes):
    """A model of theirs with weights that say something, saved in `path`."""
    transformers.logging.set_verbosity_error()
    options = {
        "vocab_size": 40, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "pad_token_id": 39, "eos_token_id": 0, "decoder_start_token_id": 39,
        "scale_embedding": True, "max_position_embeddings": 64,
    }  # fmt: skip
    config = transformers.MarianConfig(**(options | changes))
    model = transformers.MarianMTModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.2 * noise)
            elif "embed_positions" not in name:
                gain = bridging.gain(name) * config.d_model**-0.5
                if not config.scale_embedding and ("embed" in name or "shared" in name):
                    gain *= 3
                weight.copy_(noise * (0.2 if weight.ndim == 1 else gain))
        bias = 0.2 * torch.randn(model.final_logits_bias.shape, generator=generator)
        bias[0, config.eos_token_id] += bridging.ENDS
        bias[0, [config.pad_token_id, config.decoder_start_token_id]] = bridging.NEVER
        model.final_logits_bias.copy_(bias)
    model.save_pretrained(path)
    return model


class Pair:
    """Their model, ours, and ids between them."""

    def __init__(self, theirs, ours):
        self.theirs, self.eos, self.start = theirs, ours.eos, ours.start
        self.model, self.params = tfm.Transformer(ours.config), tree(ours.arrays)
        self.source_order, self.target_order = ours.source_order, ours.target_order
        sizes = len(self.source_order), len(self.target_order)
        rng = np.random.default_rng(2)
        self.source = bridging.sentences(rng, COUNT, sizes[0], self.eos)
        target = bridging.sentences(rng, COUNT, sizes[1], self.eos)
        self.target_input = np.where(target == 0, self.eos, target)
        self.target_input[:, 0] = self.start
        self.inputs = {
            "input_ids": torch.tensor(self.source_order[self.source]),
            "attention_mask": torch.tensor(self.source != 0).long(),
        }

    def their_log_probs(self, target_input, inputs):
        ids = torch.tensor(self.target_order[np.asarray(target_input)])
        with torch.inference_mode():
            logits = self.theirs(**inputs, decoder_input_ids=ids).logits
        return logits.log_softmax(-1).numpy()[..., self.target_order]

    def generate(self, beams):
        """(hypotheses as our ids [B, T], their ln P as they report it)"""
        c = self.theirs.config
        with torch.inference_mode():
            found = self.theirs.generate(
                **self.inputs, num_beams=beams, do_sample=False, length_penalty=0.0,
                max_new_tokens=bridging.LENGTH, forced_eos_token_id=None,
                decoder_start_token_id=c.decoder_start_token_id, eos_token_id=c.eos_token_id,
                pad_token_id=c.pad_token_id, return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        ours = np.argsort(self.target_order)[found.sequences.numpy()[:, 1:]]
        ours = np.pad(ours, [(0, 0), (0, bridging.LENGTH - ours.shape[1])])
        # Where padding is id 0, their beam search fills up with the end symbol.
        ended = np.cumsum(ours == self.eos, axis=1) - (ours == self.eos)
        ours = np.where(ended, 0, ours)
        scores = found.sequences_scores.numpy() if beams > 1 else None
        return ours, scores

    def log_prob_of(self, hypotheses):
        return bridging.score(self.model, self.params, self.source, hypotheses, self.start)


def check_log_probs(pair):
    ours = bridging.log_probs(pair.model, pair.params, pair.source, pair.target_input)
    theirs = pair.their_log_probs(pair.target_input, pair.inputs)
    possible = theirs > -1e6
    assert possible.mean() > 0.9
    np.testing.assert_allclose(ours[possible], theirs[possible], rtol=0, atol=1e-4)
    assert theirs[possible].std() > 0.7  # not flat: agreeing says something
    print(f"\nlargest difference of log-probabilities {np.abs(ours - theirs)[possible].max():.1e}")


@pytest.fixture(params=list(SHAPES))
def pair(request, tmp_path):
    theirs = random_marian(tmp_path, **SHAPES[request.param])
    return Pair(theirs, read_model(Folder(tmp_path), theirs.config.pad_token_id))


def test_log_probabilities_are_theirs(pair):
    check_log_probs(pair)


def test_greedy_and_beam_find_what_theirs_do(pair):
    for beams in (1, bridging.BEAM):
        theirs, scores = pair.generate(beams)
        ours, log_probs = bridging.beam(
            pair.model, pair.params, pair.source, pair.start, pair.eos, beams
        )
        differ = np.flatnonzero((ours != theirs).any(1))
        print(f"\nbeam {beams}: {COUNT - len(differ)} of {COUNT} equal, "
              f"{len(np.unique(ours, axis=0))} distinct")  # fmt: skip
        assert len(np.unique(ours, axis=0)) >= 10
        # Theirs, scored by ours, is what they say it is.
        rescored = pair.log_prob_of(theirs)
        if scores is not None:
            np.testing.assert_allclose(rescored, scores, rtol=0, atol=1e-4)
            # Their beam holds ended hypotheses apart, so its open ones are more: now and then one
            # of these wins that ours has let go.
            assert len(differ) <= COUNT / 20
        else:
            np.testing.assert_allclose(rescored, log_probs, rtol=0, atol=1e-4)
            assert len(differ) == 0


@pytest.mark.slow
def test_beam_search_of_the_same_rule_over_their_model(pair):
    # In f64: of sums of a dozen log-probabilities f32 leaves 1e-4 to chance.
    pair.theirs.double()
    config = dataclasses.replace(pair.model.config)
    object.__setattr__(config, "compute_dtype", "float64")
    with jax.enable_x64(True):
        model = tfm.Transformer(config)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), pair.params)
        ours, log_probs = bridging.beam(model, params, pair.source, pair.start, pair.eos)
    found, totals = [], []
    for row in range(COUNT):
        inputs = {name: value[row : row + 1] for name, value in pair.inputs.items()}
        with torch.inference_mode():
            memory = pair.theirs.get_encoder()(**inputs)

        def following(prefixes, memory=memory, mask=inputs["attention_mask"]):
            many = len(prefixes)
            states = memory.last_hidden_state.expand(many, -1, -1)
            ids = {"encoder_outputs": (states,), "attention_mask": mask.expand(many, -1)}
            return pair.their_log_probs(prefixes, ids)[:, -1]

        best, total = bridging.beam_by(following, pair.start, pair.eos)
        found.append(best)
        totals.append(total)
    apart = np.abs(log_probs - totals).max()
    differ = (ours != bridging.padded(found)).any(1)
    print(f"\nbeam of one rule: {COUNT - differ.sum()} of {COUNT} equal, {apart:.1e} apart")
    assert not differ.any() and apart < 1e-5


def test_an_old_folder_holds_the_same(tmp_path):
    """pytorch_model.bin with every name there is: repeated matrices, and tables of positions."""
    model = random_marian(tmp_path, **SHAPES["shared, swish"])
    new = read_model(Folder(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    state = model.state_dict()
    assert "model.decoder.embed_positions.weight" in state and "lm_head.weight" in state
    torch.save(state, tmp_path / "pytorch_model.bin")
    old = read_model(Folder(tmp_path))
    assert old.config == new.config and old.arrays.keys() == new.arrays.keys()
    assert all(np.array_equal(old.arrays[name], new.arrays[name]) for name in new.arrays)


OURS = {
    "as trained here": {},
    "halves, swish, biases": {
        "sinusoid_layout": "halves", "activation": "swish", "projection_bias": True,
    },
    "a vocabulary a side": {"source_vocab_size": 30, "output_bias": False},
    "a vocabulary a side of one size, untied": {"source_vocab_size": 40, "tied_output": False},
    "shared, untied, unscaled": {
        "tied_output": False, "scale_embeddings": False, "activation": "gelu",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_an_export_computes_the_same_there(name, tmp_path):
    config = bridging.config_with(**OURS[name])
    never = (0, 1)
    arrays = bridging.random_arrays(config, 3, end=2, never=never)
    written = model_files(config, arrays, start=1, eos=2, positions=64)
    (tmp_path / "model.safetensors").write_bytes(written.weights)
    (tmp_path / "config.json").write_text(json.dumps(written.config))
    theirs, report = transformers.MarianMTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    ours = read_model(Folder(tmp_path), int(written.source_order[0]))
    assert (ours.start, ours.eos) == (1, 2)
    pair = Pair(theirs.eval(), ours)
    pair.model, pair.params = tfm.Transformer(config), tree(arrays)
    check_log_probs(pair)
    if config.output_bias:  # else padding may be generated there
        theirs, _ = pair.generate(1)
        ours, _ = bridging.beam(pair.model, pair.params, pair.source, 1, 2, width=1)
        assert (ours == theirs).all()
