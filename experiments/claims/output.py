"""Question 10: how are the probabilities of the output computed?"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import tfm
from experiments.claims import drawing, study
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
from experiments.vocabulary import BOS, EOS

BINS = 10  # of confidence
SYMBOLS, LONGEST = 6, 4  # the vocabulary and the length of which every sequence is scored
CASES = 64  # sources whose best sequence is searched
WIDTHS = (1, 2, 4)

HYPOTHESES = {
    "distribution": Hypothesis(
        Text("At every step the probabilities of all symbols sum to 1.",
             "在每一步，所有符号的概率之和为 1。"),
        "largest |Σ P − 1| over the validation sounds", bound=1e-5),
    "chain": Hypothesis(
        Text("The steps multiply: the sum of their ln P is the score of the whole sequence.",
             "逐步概率相乘：各步 ln P 之和等于整个序列的得分。"),
        "largest |Σ ln P − the search's score (α = 0)|", bound=1e-4),
    "calibrated": Hypothesis(
        Text("The trained model's confidence can be believed, to 5 points (ECE).",
             "训练后模型的置信度可信，误差不超过 5 个百分点（ECE）。"),
        "expected calibration error over the validation sounds, 10 bins", bound=0.05),
    "search": Hypothesis(
        Text("Beam search of width 4 finds the likeliest of all sequences.",
             "宽度为 4 的束搜索能找到所有序列中概率最大的一个。"),
        "share of sources where it does, against all sequences scored", 0.8),
    "beats_greedy": Hypothesis(
        Text("It finds it more often than taking the likeliest symbol at each step.",
             "它比每步取概率最大的符号更常找到该序列。"),
        "that share minus greedy's", 0.05),
}  # fmt: skip


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


def calibration_error(share: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray):
    """ECE = Σ_bins share · |accuracy − confidence|, over the last axis (Guo et al. 2017)."""
    return (share * np.abs(accuracy - confidence)).sum(-1)


def _tiny(seed: int) -> tuple[tfm.Transformer, chex.ArrayTree, Array]:
    """A small model with random parameters, larger than usual so that it has preferences."""
    config = tfm.TransformerConfig(
        vocab_size=SYMBOLS, d_model=16, d_ff=32, num_heads=2, num_encoder_layers=1,
        num_decoder_layers=1, dropout_rate=0.0,
    )  # fmt: skip
    model, keys = tfm.Transformer(config), jax.random.split(jax.random.key(seed))
    source = jax.random.randint(keys[0], (CASES, 5), EOS + 1, SYMBOLS)
    params = model.init(keys[1], source, source)["params"]
    return model, jax.tree.map(lambda p: 2.0 * p, params), source


def _every_score(model: tfm.Transformer, params: chex.ArrayTree, source: Array) -> np.ndarray:
    """ln P of each sequence that ends in EOS or is cut at LONGEST: [sources, sequences]."""
    drawn = np.array(list(itertools.product(range(SYMBOLS), repeat=LONGEST)), np.int32)
    ended = np.cumsum(drawn == EOS, axis=1) - (drawn == EOS) > 0  # after an earlier EOS
    sequences = np.unique(np.where(ended, EOS, drawn), axis=0)
    counted = np.cumsum(sequences == EOS, axis=1) - (sequences == EOS) == 0
    inputs = np.pad(sequences[:, :-1], ((0, 0), (1, 0)), constant_values=BOS)
    real = np.ones_like(inputs)  # symbol 0 is one like the others here

    @jax.jit
    def scores(one: Array) -> Array:
        sources = jnp.broadcast_to(one, (len(sequences), len(one)))
        logits = model.apply({"params": params}, sources, inputs, target_segment_ids=real)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), sequences[..., None], -1)[..., 0]
        return jnp.where(counted, log_p, 0).sum(-1)

    return np.stack([scores(one) for one in source])


def _search(seed: int) -> tuple[dict[int, int], float]:
    """How many of the best sequences each width finds, and the largest error of a score."""
    model, params, source = _tiny(seed)
    scores = _every_score(model, params, source)
    found, error = {}, 0.0
    for width in WIDTHS:
        step, cache = tfm.start_decoding(model, params, source, width, LONGEST)
        decoded = tfm.beam_search(step, cache, bos=BOS, eos=EOS, max_length=LONGEST, alpha=0.0)
        best = np.asarray(decoded.scores[:, 0], np.float64)
        found[width] = int((best > scores.max(1) - 1e-4).sum())
        error = max(error, float(np.abs(scores - best[:, None]).min(1).max()))
    return found, error


def _draw(probes: dict[str, np.ndarray], found: dict[int, int]) -> Figure:
    figure, (reliability, search) = drawing.panels("Confidence and truth", "Finding the likeliest")
    for seed in range(probes["share"].shape[0]):
        filled = probes["share"][seed] > 0.001
        reliability.plot(
            probes["confidence"][seed][filled], probes["accuracy"][seed][filled], "o-",
            color=drawing.LINES[0], ms=4, lw=1, alpha=0.7,
        )  # fmt: skip
    reliability.plot([0, 1], [0, 1], color=drawing.MUTED, lw=1, ls="--")
    drawing.label(reliability, "probability of the likeliest sound", "share of these that is right")
    places = range(len(WIDTHS))
    search.bar(places, [found[w] / CASES for w in WIDTHS], 0.6, color=drawing.LINES[0])
    search.set_xticks(places, ["greedy", *(f"beam {w}" for w in WIDTHS[1:])])
    search.set_ylim(0, 1.05)
    drawing.level(search, HYPOTHESES["search"].threshold, "δ")
    drawing.label(search, f"{CASES} sources", "share where it is found")
    return figure


def measure(budget: Budget) -> tuple[dict[str, Estimate], Figure]:
    """A trained model's distribution; and the search against all sequences of a tiny one."""
    task, steps = study.pronunciation(), budget.steps(600)
    trainee = study.Trainee(tfm.Transformer(task.config()), study.optimizer(steps))
    trained = study.train(budget, task, lambda: trainee, steps, probe=_reliability)
    probes = {name: values[0, :, 0] for name, values in trained.probes.items()}
    found, error = _search(budget.first_seed)
    errors = calibration_error(probes["share"], probes["confidence"], probes["accuracy"])
    estimates = {
        "distribution": exact(probes["sum_error"].max(), len(errors)),
        "chain": exact(error),
        "calibrated": paired_t(errors),
        "search": wilson(found[4], CASES),
        "beats_greedy": wilson_difference(found[4], found[1], CASES),
    }
    return estimates, _draw(probes, found)


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
