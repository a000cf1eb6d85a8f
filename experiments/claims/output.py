"""Question 10: how are the probabilities of the output computed?"""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import tfm
from experiments.claims import study
from experiments.claims.evidence import (
    Budget,
    Claim,
    Estimate,
    Hypothesis,
    Text,
    exact,
    paired_t,
    wilson,
    wilson_difference,
)
from experiments.data.vocabulary import BOS, EOS
from experiments.reporting import style
from tfm.decoding import Decoded
from tfm.training import init_params

BINS = 10  # of confidence
SYMBOLS, LONGEST = 6, 4  # the vocabulary and the length of which every sequence is scored
CASES = 64  # models with a source each: independent, as the interval of a share supposes
WIDTHS = (1, 2, 4)

HYPOTHESES = {
    "formula": Hypothesis(
        Text("The function is the formula: softmax(yW + b).", "函数与公式 softmax(yW + b) 一致。"),
        "largest |error| against float64 loops", bound=1e-5),
    "distribution": Hypothesis(
        Text("At every step the probabilities of all symbols sum to 1.",
             "在每一步，所有符号的概率之和为 1。"),
        "largest |Σ P − 1| over the validation sounds", bound=1e-5),
    "chain": Hypothesis(
        Text("The steps multiply: the sum of their ln P is the score of the whole sequence.",
             "逐步概率相乘：各步 ln P 之和等于整个序列的得分。"),
        "largest |Σ ln P of the sequence that is found − the search's score (α = 0)|",
        bound=1e-4),
    "calibrated": Hypothesis(
        Text("The trained model's confidence can be believed, to 5 points (ECE).",
             "训练后模型的置信度可信，误差不超过 5 个百分点（ECE）。"),
        "expected calibration error over the validation sounds, 10 bins", bound=0.05),
    "search": Hypothesis(
        Text("Beam search of width 4 finds the likeliest of all sequences.",
             "宽度为 4 的束搜索能找到所有序列中概率最大的一个。"),
        "share of random models where it does, against all sequences scored", 0.8),
    "beats_greedy": Hypothesis(
        Text("It finds it more often than taking the likeliest symbol at each step.",
             "它比每步取概率最大的符号更常找到该序列。"),
        "that share minus greedy's", 0.05),
}  # fmt: skip


def reference(y: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The formula in float64, one number at a time: [D], [D, V], [V] -> [V]."""
    logits = []
    for word in range(w.shape[1]):
        product = math.fsum(float(y[i]) * float(w[i, word]) for i in range(len(y)))
        logits.append(product + float(b[word]))
    terms = [math.exp(logit - max(logits)) for logit in logits]
    return np.array(terms) / math.fsum(terms)


def _formula_error(seed: int) -> float:
    keys = jax.random.split(jax.random.key(seed), 3)
    y, w = jax.random.normal(keys[0], (8, 16)), jax.random.normal(keys[1], (16, 30))
    b = jax.random.normal(keys[2], (30,))
    exactly = [reference(*(np.asarray(a) for a in (row, w, b))) for row in y]
    return float(np.abs(np.asarray(tfm.output_distribution(y, w, b)) - np.stack(exactly)).max())


def _reliability(
    model: tfm.Transformer, params: chex.ArrayTree, task: study.Task
) -> dict[str, Array]:
    """The sounds in each bin of confidence: their share, mean confidence, share right."""
    probability = jax.nn.softmax(study.forward(model, params, task.valid))
    real = task.valid["target_segment_ids"] != 0
    confidence = probability.max(-1)
    right = probability.argmax(-1) == task.valid["target"]
    bins = jnp.minimum((confidence * BINS).astype(jnp.int32), BINS - 1).reshape(-1)

    def total(values: Array) -> Array:
        return jax.ops.segment_sum(jnp.where(real, values, 0).reshape(-1), bins, BINS)

    count = total(jnp.ones_like(confidence))
    some = jnp.maximum(count, 1)
    return {
        "share": count / count.sum(),
        "confidence": total(confidence) / some,
        "accuracy": total(right.astype(jnp.float32)) / some,
        "sum_error": jnp.where(real, jnp.abs(probability.sum(-1) - 1), 0).max(),
    }


def calibration_error(
    share: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray
) -> np.ndarray:
    """ECE = Σ_bins share · |accuracy − confidence|, over the last axis (Guo et al. 2017)."""
    return (share * np.abs(accuracy - confidence)).sum(-1)


def _tiny(seed: int) -> tuple[tfm.Transformer, chex.ArrayTree, Array]:
    """Small models [CASES, ...] with random parameters, and a source [CASES, 5] for each.

    The parameters are larger than usual, so that a model has preferences.
    """
    config = tfm.TransformerConfig(
        vocab_size=SYMBOLS, d_model=16, d_ff=32, num_heads=2, num_encoder_layers=1,
        num_decoder_layers=1, dropout_rate=0.0,
    )  # fmt: skip
    model, keys = tfm.Transformer(config), jax.random.split(jax.random.key(seed))
    source = jax.random.randint(keys[0], (CASES, 5), EOS + 1, SYMBOLS)
    fresh = jax.jit(jax.vmap(lambda key: init_params(model, key)))
    params = fresh(jax.random.split(keys[1], CASES))
    return model, jax.tree.map(lambda p: 2.0 * p, params), source


def sequences() -> tuple[np.ndarray, np.ndarray]:
    """Every sequence that ends in EOS or is cut at LONGEST, and which of its symbols count.

    Zeros follow the first EOS, as in the results of the search.
    """
    drawn = np.array(list(itertools.product(range(SYMBOLS), repeat=LONGEST)), np.int32)
    ended = np.cumsum(drawn == EOS, axis=1) - (drawn == EOS) > 0  # after an earlier EOS
    # −1 marks the end, since 0 is a symbol like any other here.
    every = np.unique(np.where(ended, -1, drawn), axis=0)
    return np.maximum(every, 0), every >= 0


def every_score(model: tfm.Transformer, params: chex.ArrayTree, source: Array) -> np.ndarray:
    """ln P of each of `sequences()`, from one pass over all its steps: [CASES, sequences]."""
    every, counted = sequences()
    inputs = np.pad(every[:, :-1], ((0, 0), (1, 0)), constant_values=BOS)

    def scores(case: tuple[chex.ArrayTree, Array]) -> Array:
        params, one = case
        sources, real = jnp.broadcast_to(one, (len(every), len(one))), jnp.ones_like(inputs)
        logits = model.apply({"params": params}, sources, inputs, target_segment_ids=real)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), every[..., None], -1)[..., 0]
        return jnp.where(counted, log_p, 0).sum(-1)

    return np.asarray(jax.jit(lambda *cases: jax.lax.map(scores, cases))(params, source))


def _decode(model: tfm.Transformer, params: chex.ArrayTree, source: Array, width: int) -> Decoded:
    """The search's hypotheses for each case: arrays [CASES, W, ...]."""

    def one(params: chex.ArrayTree, source: Array) -> Decoded:
        step, cache = tfm.start_decoding(model, params, source[None], width, LONGEST)
        return tfm.beam_search(step, cache, bos=BOS, eos=EOS, max_length=LONGEST, alpha=0.0)

    return jax.tree.map(lambda x: np.asarray(x[:, 0]), jax.jit(jax.vmap(one))(params, source))


def _search(seed: int) -> tuple[dict[int, int], float]:
    """The number of cases where each width finds the best sequence; the largest score error."""
    model, params, source = _tiny(seed)
    scores, (every, _) = every_score(model, params, source), sequences()
    index = {tuple(sequence): i for i, sequence in enumerate(every)}
    hits, error = {}, 0.0
    for width in WIDTHS:
        decoded = _decode(model, params, source, width)
        places = [index[tuple(best)] for best in decoded.tokens[:, 0]]
        direct = scores[np.arange(CASES), places]
        hits[width] = int((direct > scores.max(1) - 1e-4).sum())
        error = max(error, float(np.abs(direct - decoded.scores[:, 0]).max()))
    return hits, error


def _draw(probes: dict[str, np.ndarray], hits: dict[int, int]) -> Figure:
    figure, (reliability, search) = style.panels("Confidence and truth", "Finding the likeliest")
    for seed in range(probes["share"].shape[0]):
        filled = probes["share"][seed] > 0.001
        reliability.plot(
            probes["confidence"][seed][filled], probes["accuracy"][seed][filled], "o-",
            color=style.LINES[0], ms=4, lw=1, alpha=0.7,
        )  # fmt: skip
    reliability.plot([0, 1], [0, 1], color=style.MUTED, lw=1, ls="--")
    style.label(reliability, "probability of the likeliest sound", "share of these that is right")
    places = range(len(WIDTHS))
    search.bar(places, [hits[w] / CASES for w in WIDTHS], 0.6, color=style.LINES[0])
    search.set_xticks(places, ["greedy", *(f"beam {w}" for w in WIDTHS[1:])])
    search.set_ylim(0, 1.05)
    style.level(search, HYPOTHESES["search"].threshold, "δ")
    style.label(search, f"{CASES} random models", "share where it is found")
    return figure


def measure(budget: Budget) -> tuple[dict[str, Estimate], Figure]:
    """A trained model's distribution; and the search against all sequences of a tiny one."""
    task, steps = study.pronunciation(), budget.steps(600)
    trainee = study.Trainee(tfm.Transformer(task.config()), study.optimizer(steps))
    trained = study.train(budget, task, lambda: trainee, steps, probe=_reliability)
    probes = {name: values[0, :, 0] for name, values in trained.probes.items()}
    hits, error = _search(budget.first_seed)
    errors = calibration_error(probes["share"], probes["confidence"], probes["accuracy"])
    estimates = {
        "formula": exact(_formula_error(budget.first_seed)),
        "distribution": exact(probes["sum_error"].max(), len(errors)),
        "chain": exact(error),
        "calibrated": paired_t(errors),
        "search": wilson(hits[4], CASES),
        "beats_greedy": wilson_difference(hits[4], hits[1], CASES),
    }
    return estimates, _draw(probes, hits)


CLAIM = Claim(
    id="output",
    question=Text("How are the probabilities of the output computed?",
                  "解释 Transformer 模型输出序列中的概率分布是如何计算的？"),
    formula="P(word) = softmax(yW + b)",
    function=tfm.output_distribution,
    hypotheses=HYPOTHESES,
    measure=measure,
    lesson=Text(
        "One linear layer (in the paper the embedding matrix, used again) turns the decoder's "
        "vector into a number for every word, and softmax into probabilities. Multiplied over the "
        "steps they give the probability of a whole sequence, which is what a search looks for.",
        "一个线性层（论文中与词嵌入共用矩阵）把解码器的向量变成每个词的一个数，softmax "
        "再把它们变成概率。各步相乘就是整个序列的概率，搜索要找的就是它。",
    ),
)  # fmt: skip
