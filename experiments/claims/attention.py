"""Question 4: what is self-attention, as mathematics?"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import tfm
from experiments.claims.evidence import Budget, Claim, Estimate, Hypothesis, Text, exact
from experiments.reporting import style

HEADS, LENGTH, WIDTH = 3, 7, 5
DIRECTIONS = 500  # in which the outputs are compared with the values' extremes

HYPOTHESES = {
    "formula": Hypothesis(
        Text("The function is the formula: softmax(QKᵀ/√d_k)V.",
             "函数与公式 softmax(QKᵀ/√d_k)V 一致。"),
        "largest |error| against float64 loops, at any size of the logits", bound=1e-5),
    "normalised": Hypothesis(
        Text("The weights of every query are a distribution: none negative, their sum 1.",
             "每个查询的权重构成概率分布：非负，且和为 1。"),
        "largest |Σ weights − 1|, or negative weight", bound=1e-5),
    "weighted_sum": Hypothesis(
        Text("Every output is a weighted mean of the values: it lies in their convex hull.",
             "每个输出都是值向量的加权平均：位于它们的凸包之内。"),
        "farthest that an output lies outside, over 500 directions", bound=1e-5),
    "unordered": Hypothesis(
        Text("Permuting the keys together with the values changes nothing.",
             "同时重排键和值，结果不变。"),
        "largest |change| of an output", bound=1e-5),
}  # fmt: skip


def reference(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The formula in float64, one number at a time: [L, d_k], [K, d_k], [K, d_v] -> [L, d_v]."""
    out = np.zeros((len(query), value.shape[1]))
    for i in range(len(query)):
        scores = []
        for j in range(len(key)):
            product = sum(float(query[i, m]) * float(key[j, m]) for m in range(query.shape[1]))
            scores.append(product / math.sqrt(query.shape[1]))
        terms = [math.exp(score - max(scores)) for score in scores]
        for j, term in enumerate(terms):
            out[i] += term / math.fsum(terms) * value[j].astype(np.float64)
    return out


def _one_seed(seed: int, scale: float) -> dict[str, float]:
    """The largest errors for one draw, whose queries are `scale` times those of unit variance."""
    keys = jax.random.split(jax.random.key(seed), 5)
    query = scale * jax.random.normal(keys[0], (HEADS, LENGTH, WIDTH))
    key, value = (jax.random.normal(k, (HEADS, LENGTH + 2, WIDTH)) for k in keys[1:3])
    out = tfm.scaled_dot_product_attention(query, key, value)
    weights = tfm.attention_weights(query, key)
    order = jax.random.permutation(keys[3], LENGTH + 2)
    permuted = tfm.scaled_dot_product_attention(query, key[:, order], value[:, order])
    heads = zip(*(np.asarray(x) for x in (query, key, value)), strict=True)
    exactly = np.stack([reference(*head) for head in heads])
    directions = jax.random.normal(keys[4], (WIDTH, DIRECTIONS))
    directions /= jnp.linalg.norm(directions, axis=0)
    reach, limit = (out @ directions).max(1), (value @ directions).max(1)  # [H, directions]
    return {
        "formula": np.abs(np.asarray(out) - exactly).max(),
        "normalised": max(float(jnp.abs(weights.sum(-1) - 1).max()), float(-weights.min())),
        "weighted_sum": float(jnp.maximum(reach - limit, 0).max()),
        "unordered": float(jnp.abs(permuted - out).max()),
    }


def _draw(worst: dict[float, dict[str, float]]) -> Figure:
    figure, (errors, weights) = style.panels("Errors", "One query, 9 keys")
    names = {
        "formula": "float64 loops",
        "normalised": "sum of 1",
        "weighted_sum": "convex hull",
        "unordered": "permuted keys",
    }
    scales = list(worst)
    floor = 1e-9  # so that an exact 0 has a place on a logarithmic axis
    for (name, text), colour in zip(names.items(), style.LINES, strict=False):
        heights = [max(worst[s][name], floor) for s in scales]
        errors.plot(scales, heights, "o-", ms=4, label=text, color=colour)
    errors.set_xscale("log")
    errors.set_yscale("log")
    errors.set_ylim(floor / 2, 0.3)  # room for the legend above the bound
    style.level(errors, HYPOTHESES["formula"].bound, "bound")
    style.legend(errors)
    style.label(errors, "standard deviation of the queries", "largest error (1e-9: none)")
    keys = jax.random.split(jax.random.key(0))
    query = jax.random.normal(keys[0], (1, 64))
    key = jax.random.normal(keys[1], (LENGTH + 2, 64))
    for i, scale in enumerate((1.0, 8.0)):
        bars = np.asarray(tfm.attention_weights(scale * query, key))[0]
        place = np.arange(len(bars)) + 0.36 * i
        name = "softmax(QKᵀ/√d_k)" if scale == 1 else "without √d_k (d_k = 64)"
        weights.bar(place, bars, 0.34, color=style.LINES[i], label=name)
    style.legend(weights)
    style.label(weights, "key", "attention weight")
    return figure


def measure(budget: Budget) -> tuple[dict[str, Estimate], Figure]:
    """Random queries, keys and values, from flat to saturated softmax."""
    seeds = range(budget.first_seed, budget.first_seed + budget.seeds)
    worst = {}
    for scale in (0.01, 0.1, 1.0, 10.0):
        draws = [_one_seed(seed, scale) for seed in seeds]
        worst[scale] = {name: float(max(f[name] for f in draws)) for name in HYPOTHESES}
    largest = {name: max(errors[name] for errors in worst.values()) for name in HYPOTHESES}
    return {name: exact(e, len(seeds)) for name, e in largest.items()}, _draw(worst)


CLAIM = Claim(
    id="attention",
    question=Text("What is self-attention, as mathematics?",
                  "Transformer 模型中自注意力机制的数学表达式是什么？"),
    formula="Attention(Q, K, V) = softmax(QKᵀ/√d_k) V",
    function=tfm.scaled_dot_product_attention,
    hypotheses=HYPOTHESES,
    measure=measure,
    lesson=Text(
        "Each query is compared with every key; softmax turns the comparisons into weights that "
        "sum to 1, and the output is the mean of the values under these weights. So an output can "
        "never leave the range of the values, and the order of the keys does not matter.",
        "每个查询与所有键比较，softmax 把比较结果变成和为 1 的权重，输出就是值在这些权重下的平均。"
        "因此输出不会超出值的范围，键的先后次序也无关紧要。",
    ),
)  # fmt: skip
