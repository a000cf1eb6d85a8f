"""What the tests of import and export share: random models that say something, and searches.

Freshly initialised models are nearly flat: whatever is translated comes out the same. These have
weights so large that outputs hang on the input, and end.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import tfm
from experiments.inference.predictor import Predictor, Settings
from experiments.interop.links import flat, tree
from tfm.training import param_shapes

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
    like = param_shapes(config)
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


TEXT = [f"a small {animal} saw {n} of the {things}" for animal in ("frog", "dog", "owl")
        for n in ("one", "two", "none") for things in ("houses", "trees", "stones")]  # fmt: skip


def translator_of(subwords, target=None, **changes):
    """A random model of ours with these vocabularies."""
    target = target or subwords
    sizes = {"vocab_size": target.size}
    if target is not subwords:
        sizes["source_vocab_size"] = subwords.size
    config = config_with(**(sizes | changes))
    arrays = random_arrays(config, 5)
    settings = Settings(source_length=50, target_length=45, beam=3, alpha=0.5)
    return Predictor(
        tfm.Transformer(config), tree(arrays), source=subwords, target=target, settings=settings
    )


def assert_same(one, other):
    """Two translators are one: config, settings, vocabularies, and every bit of the arrays."""
    assert one.model.config == other.model.config
    assert one.settings == other.settings
    before, after = flat(one.params), flat(other.params)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].tobytes() == after[name].tobytes(), name
    for side in ("source", "target"):
        assert getattr(one, side).sha256 == getattr(other, side).sha256


def state_dict(arrays, prefix="transformer."):
    """Arrays of ours under the names of torch.nn.Transformer, written out by hand."""
    state = {}
    attentions = {"attention": ("self_attn", 1), "self_attention": ("self_attn", 1),
                  "cross_attention": ("multihead_attn", 2)}  # fmt: skip
    for name, array in arrays.items():
        layer, _, rest = name.partition("/")
        side, _, number = layer.partition("_")
        path = f"{prefix}{side}.layers.{number}"
        part, _, leaf = rest.partition("/")
        if part in attentions and leaf in ("w_o", "b_o"):
            module = f"{path}.{attentions[part][0]}.out_proj"
            state[f"{module}.{'weight' if leaf == 'w_o' else 'bias'}"] = array.T
        elif part in attentions and leaf in ("w_q", "b_q"):
            letters = [arrays[f"{layer}/{part}/{leaf[0]}_{c}"].T for c in "qkv"]
            kind = "weight" if leaf == "w_q" else "bias"
            state[f"{path}.{attentions[part][0]}.in_proj_{kind}"] = np.concatenate(letters)
        elif part == "feed_forward":
            kind = "weight" if leaf[0] == "w" else "bias"
            state[f"{path}.linear{leaf[1]}.{kind}"] = array.T
        elif part.endswith("_norm"):
            last = 2 if side == "encoder" else 3
            place = last if part == "feed_forward_norm" else attentions[part[:-5]][1]
            kind = "weight" if leaf == "scale" else "bias"
            state[f"{path}.norm{place}.{kind}"] = array
        elif layer in ("encoder_norm", "decoder_norm"):
            state[f"{prefix}{side}.norm.{'weight' if rest == 'scale' else 'bias'}"] = array
    return state
