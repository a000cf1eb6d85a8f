"""What the tests of import and export share: random models that say something, and searches.

Freshly initialised models are nearly flat: whatever is translated comes out the same. These have
weights so large that outputs hang on the input, and end.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import tfm
from experiments.bridge.links import flat
from tfm.training import init_params

BEAM, LENGTH = 4, 12
ENDS = 1.0  # a bias on the logit of the end symbol: some outputs end
NEVER = -1e9  # a bias on logits: the probability is 0 on both sides


def gain(name):
    """How much larger than 1/√D a matrix is, by its name here or elsewhere: attention that looks
    at few places, and a decoder that listens to it; and no more, so that f32 has digits enough."""
    if any(part in name for part in ("w_q", "w_k", "q_proj", "k_proj")):
        return 2.5
    if "decoder" in name and any(part in name for part in ("w_", "_proj")):
        return 2.0
    around = ("embed", "shared", "lm_head", "output")
    return 0.8 if any(part in name for part in around) else 0.6


def random_arrays(config, seed, end=None, never=()):
    """Arrays of a model of ours, none of them constant: {flat name: array}."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(lambda: init_params(tfm.Transformer(config), jax.random.key(0)))
    arrays = {}
    for name, array in flat(jax.tree.map(lambda x: np.empty(x.shape, np.float32), like)).items():
        noise = rng.standard_normal(array.shape).astype(np.float32)
        if name.endswith("scale"):
            arrays[name] = 1 + 0.2 * noise
        elif array.ndim == 1:
            arrays[name] = 0.2 * noise
        else:
            arrays[name] = gain(name) * noise / np.float32(np.sqrt(config.d_model))
    if "output_bias" in arrays:
        if end is not None:
            arrays["output_bias"][end] += ENDS
        arrays["output_bias"][list(never)] = NEVER
    return arrays


def sentences(rng, count, size, eos, first=3, longest=10):
    """Rows of ids, `eos` at the end of each and 0 behind it."""
    lengths = rng.integers(2, longest, count)
    rows = rng.integers(first, size, (count, longest))
    rows[np.arange(longest) >= lengths[:, None]] = 0
    rows[np.arange(count), lengths] = eos
    return rows.astype(np.int32)


def log_probs(model, params, source, target_input):
    """ln P of every next symbol, where 0 may start the target: [B, T, V]."""
    ones = jnp.ones_like(target_input)
    logits = model.apply({"params": params}, source, target_input, target_segment_ids=ones)
    return np.asarray(jax.nn.log_softmax(logits))


def score(model, params, source, hypotheses, bos):
    """ln P of each hypothesis [B, T] (0 where it is over): [B]."""
    target = np.asarray(hypotheses)
    shifted = np.concatenate([np.full((len(target), 1), bos), target[:, :-1]], axis=1)
    found = log_probs(model, params, source, shifted.astype(np.int32))
    chosen = np.take_along_axis(found, target[..., None], axis=-1)[..., 0]
    return np.where(target == 0, 0, chosen).sum(-1)


def beam(model, params, source, bos, eos, width=BEAM, length=LENGTH):
    """The best hypotheses by ln P [B, T], and their ln P: beam search, of width 1 greedy."""

    @jax.jit
    def search(source):
        step, cache = tfm.start_decoding(model, params, source, width, length)
        return tfm.beam_search(step, cache, bos=bos, eos=eos, max_length=length, alpha=0.0)

    decoded = search(source)
    return np.asarray(decoded.tokens[:, 0]), np.asarray(decoded.log_probs[:, 0])


def beam_by(next_log_probs, bos, eos, width=BEAM, length=LENGTH):
    """The same search (the paper's: an ended hypothesis keeps its place in the beam) over any
    model, as plain Python: `next_log_probs(prefixes)` gives a row of ln P for each prefix."""
    ended, running = [], [((bos,), 0.0)]
    for _ in range(length):
        if not running:
            break
        rows = next_log_probs([prefix for prefix, _ in running])
        extended = [
            ((*prefix, int(i)), total + float(row[i]))
            for (prefix, total), row in zip(running, rows, strict=True)
            for i in np.argsort(-row)[:width]
        ]
        kept = sorted(ended + extended, key=lambda h: -h[1])[:width]
        ended = [h for h in kept if h[0][-1] == eos]
        running = [h for h in kept if h[0][-1] != eos]
    best, total = max(ended + running, key=lambda h: h[1])
    return best[1:], total


def padded(rows, length=LENGTH):
    """Lists of ids as an array with 0 behind each."""
    return np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)


def config_with(**changes):
    return dataclasses.replace(
        tfm.TransformerConfig(
            vocab_size=40, d_model=32, d_ff=48, num_heads=4, num_encoder_layers=2,
            num_decoder_layers=2, layer_norm_epsilon=1e-5, output_bias=True,
        ),
        **changes,
    )  # fmt: skip
