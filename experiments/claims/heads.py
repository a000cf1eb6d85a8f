"""Question 2: why several heads?"""

import time
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import tfm
from experiments.claims import drawing, study
from experiments.claims.evidence import Budget, Claim, Estimate, Hypothesis, Text, exact, paired_t
from experiments.data.vocabulary import EOS
from experiments.reporting import style
from tfm.kernels.precision import linear

HEADS = (1, 2, 4, 8)  # at d_model 64; the claims compare 1 with 4
MANY = 4
SMALL = 256  # packed rows, about 1,200 words: few enough to be learned by heart
PAIRS = 12  # timed pairs
LONG = 6  # sounds that a sequence must have for its alignment to count

HYPOTHESES = {
    "together": Hypothesis(
        Text("Eight heads computed together are faster than one after another.",
             "八个头并行计算比逐个计算更快。"),
        "log₂ of the time of a loop over heads over that of one contraction, forward and backward",
        0.1, timed=True),
    "same_work": Hypothesis(
        Text("At fixed d_model several heads are no less work than one.",
             "d_model 固定时，多头的计算量并不比单头少。"),
        "floating-point operations of 8 heads over those of 1, minus 1", -0.01,
        caveat_of="together"),
    "faster_than_one": Hypothesis(
        Text("Eight heads are faster than one head of the same total width.",
             "八个头比总宽度相同的单头更快。"),
        "log₂ of the time with 1 head over that with 8, forward and backward", 0.1, timed=True),
    "richer": Hypothesis(
        Text("Several heads represent more: 4 heads reach a lower loss than 1.",
             "多头表征能力更强：4 个头的损失低于 1 个头。"),
        "validation loss with 1 head minus with 4, nats a sound", 0.02),
    "diverse": Hypothesis(
        Text("The heads of a layer attend differently.", "同一层的不同头关注的内容不同。"),
        "mean Jensen–Shannon divergence of two heads' attention, nats (at most ln 2 = 0.69)", 0.1),
    "needed": Hypothesis(
        Text("Every head does its part: without one the loss rises.",
             "每个头都有贡献：去掉一个，损失就上升。"),
        "smallest rise of the validation loss after ablating one head, nats a sound", 0.02),
    "overfits_less": Hypothesis(
        Text("4 heads overfit less than 1 (1,200 words).", "4 个头比 1 个头更不易过拟合。"),
        "(validation − training loss) with 1 head minus with 4, nats a sound", 0.02),
    "aligns": Hypothesis(
        Text("A head of four can be read: it follows the letters as the sounds are written.",
             "四个头中有一个可以直接解读：写出音素时，它沿着字母移动。"),
        "correlation of its strongest letter's place with the sound's, best head", 0.8),
    "interpretable": Hypothesis(
        Text("The best of 4 heads follows the letters more closely than a single head does.",
             "4 个头中最好的一个，比单个头更紧密地跟随字母。"),
        "that correlation with 4 heads minus with 1", 0.05),
}  # fmt: skip


def _in_a_loop(x: Array, w_q: Array, w_k: Array, w_v: Array, w_o: Array, heads: int) -> Array:
    """The formula of question 5 literally: one head after another."""

    def head(columns: Array) -> Array:
        q, k, v = (linear(x, w) for w in columns)
        return tfm.scaled_dot_product_attention(q, k, v)

    weights = jnp.stack([jnp.stack(jnp.split(w, heads, axis=1)) for w in (w_q, w_k, w_v)], axis=1)
    merged = jnp.moveaxis(jax.lax.map(head, weights), 0, -2)
    return linear(merged.reshape(x.shape), w_o)


def _together(x: Array, w_q: Array, w_k: Array, w_v: Array, w_o: Array, heads: int) -> Array:
    return tfm.multi_head_attention(x, x, w_q, w_k, w_v, w_o, heads)


def _compiled(attend: Callable, heads: int) -> tuple[Callable[[], None], float]:
    """A runner of forward and backward at the paper's width, and its operations."""
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (8, 64, 512))
    weights = [jax.random.normal(key, (512, 512)) / 512**0.5 for key in keys[1:]]

    def loss(*arrays: Array) -> Array:
        return jnp.square(attend(*arrays, heads)).sum()

    program = jax.jit(jax.grad(loss, argnums=range(5))).lower(x, *weights).compile()
    run = lambda: jax.block_until_ready(program(x, *weights))  # noqa: E731
    run()
    return run, program.cost_analysis()["flops"]


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    for _ in range(3):
        run()
    return time.perf_counter() - started


def _speed() -> dict[str, Estimate]:
    """Interleaved timings, so that a disturbance of the machine affects all variants."""
    (loop, _), (parallel, work), (one, work_of_one) = (
        _compiled(*c) for c in ((_in_a_loop, 8), (_together, 8), (_together, 1))
    )
    times = np.log2([[_seconds(run) for run in (loop, parallel, one)] for _ in range(PAIRS)])
    return {
        "together": paired_t(times[:, 0] - times[:, 1]),
        "faster_than_one": paired_t(times[:, 2] - times[:, 1]),
        "same_work": exact(work / work_of_one - 1),
    }


def divergence(weights: Array, real: Array) -> Array:
    """Mean Jensen–Shannon divergence of every two heads: [..., H, L, K], real [..., L] -> nats."""

    def entropy(p: Array) -> Array:
        return -(p * jnp.log(jnp.maximum(p, 1e-30))).sum(-1)

    first, second = np.triu_indices(weights.shape[-3], 1)
    a, b = weights[..., first, :, :], weights[..., second, :, :]
    apart = entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2
    return jnp.where(real[..., None, :], apart, 0).mean(-2).sum() / real.sum()


def alignment(weights: Array, batch: tfm.training.Batch) -> Array:
    """How closely each head follows the letters: weights [B, H, T, S] -> correlations [H].

    The correlation of a sound's position with that of the letter of largest weight, over the words
    of at least `LONG` sounds; both positions are relative to their mean in the word.
    """
    places = jnp.take_along_axis(batch["source_positions"][:, None], weights.argmax(-1), -1)
    segments, most = batch["target_segment_ids"], batch["target"].shape[-1] + 1

    def centred(values: Array) -> Array:  # [B, T], each less its word's mean
        def one(v, s):
            count = jnp.maximum(jax.ops.segment_sum(jnp.ones_like(v), s, most), 1)
            return v - (jax.ops.segment_sum(v, s, most) / count)[s]

        return jax.vmap(one)(values.astype(jnp.float32), segments)

    lengths = jax.vmap(lambda s: jax.ops.segment_sum(jnp.ones_like(s), s, most)[s])(segments)
    counts = (segments != 0) & (lengths > LONG) & (batch["target"] != EOS)
    sounds = centred(batch["target_positions"])

    def correlation(place: Array) -> Array:
        letters = centred(place)
        total = lambda v: jnp.where(counts, v, 0).sum()  # noqa: E731
        spread = jnp.sqrt(total(letters**2) * total(sounds**2))
        return total(letters * sounds) / jnp.maximum(spread, 1e-9)

    return jax.vmap(correlation)(jnp.moveaxis(places, 1, 0))


def _probe(model: tfm.Transformer, params: chex.ArrayTree, task: study.Task) -> dict[str, Array]:
    """Quality, and measures of the cross-attention heads (one layer)."""
    logits, weights = study.forward(model, params, task.valid, return_weights=True)
    cross, heads = weights["cross"][0], model.config.num_heads
    probes = study.judge(model, params, task)
    probes["alignment"] = alignment(cross, task.valid)
    if heads > 1:
        probes["divergence"] = divergence(cross, task.valid["target_segment_ids"] != 0)
    if heads == MANY:
        probes["map"] = cross[0]
        # [kinds · heads] masks, each without one head of one kind of attention
        without = 1 - jnp.eye(3 * heads).reshape(-1, 3, 1, heads)
        names = ("encoder", "decoder", "cross")

        def loss(masks: Array) -> Array:
            masks = dict(zip(names, masks, strict=True))
            return study.judge_batch(model, params, task.valid, head_masks=masks)["loss"]

        probes["ablated"] = jax.lax.map(loss, without) - probes["loss"]
    return probes


def _train(budget: Budget) -> dict[int, dict[str, np.ndarray]]:
    """h -> probes [(small, all), seeds, 1, ...]."""
    task, steps = study.pronunciation(), budget.steps(400)

    def one(heads: int) -> dict[str, np.ndarray]:
        model = tfm.Transformer(task.config(num_heads=heads))
        trainee = study.Trainee(model, study.optimizer(steps))
        return study.train(
            budget, task, lambda: trainee, steps, probe=_probe,
            train_rows=(SMALL, len(task.train["source"])),
        ).probes  # fmt: skip

    return {heads: one(heads) for heads in HEADS}


def _draw(by_heads: dict[int, dict[str, np.ndarray]]) -> Figure:
    task = study.pronunciation()
    figure, (quality, ablated, maps) = style.panels(
        "Quality over heads", "Without one head (h = 4)", "Four heads reading one row of words"
    )
    drawing.points(quality, {f"{h}": probes["loss"][1, :, 0] for h, probes in by_heads.items()})
    style.label(quality, "heads h at d_model 64", "validation loss, nats a sound")
    rises = by_heads[MANY]["ablated"][1, :, 0]  # [seeds, 3 · heads]
    drawing.points(ablated, {f"{i + 1}": rises[:, i] for i in range(rises.shape[1])})
    style.level(ablated, HYPOTHESES["needed"].threshold, "δ")
    style.label(ablated, "head: 1–4 encoder, 5–8 decoder, 9–12 cross", "rise of the loss, nats")
    real = np.count_nonzero(task.valid["target"][0]), np.count_nonzero(task.valid["source"][0])
    cross = by_heads[MANY]["map"][1, 0, 0][:, : real[0], : real[1]]
    gap = np.full((real[0], 2), np.nan)
    maps.imshow(np.concatenate([np.hstack([head, gap]) for head in cross], axis=1),
                aspect="auto", cmap="Blues", vmin=0, vmax=1)  # fmt: skip
    maps.grid(False)
    maps.set_xticks([])
    style.label(maps, "letters, once for each head", "sounds, downwards")
    return figure


def measure(budget: Budget) -> tuple[dict[str, Estimate], Figure]:
    """Speed at the paper's width; then h = 1 … 8, on a small and on the whole training set."""
    speed = _speed()
    by_heads = _train(budget)
    one, many = by_heads[1], by_heads[MANY]
    gap = {h: (f["loss"] - f["train_loss"])[0, :, 0] for h, f in by_heads.items()}
    best = {h: f["alignment"][1, :, 0].max(-1) for h, f in by_heads.items()}
    estimates = speed | {
        "richer": paired_t((one["loss"] - many["loss"])[1, :, 0]),
        "diverse": paired_t(many["divergence"][1, :, 0]),
        "needed": paired_t(many["ablated"][1, :, 0].min(-1)),
        "overfits_less": paired_t(gap[1] - gap[MANY]),
        "aligns": paired_t(best[MANY]),
        "interpretable": paired_t(best[MANY] - best[1]),
    }
    return estimates, _draw(by_heads)


CLAIM = Claim(
    id="heads",
    question=Text("Why several heads?", "Transformer 为何使用多头注意力机制？"),
    formula="MultiHead(Q, K, V) = Concat(head₁, …, head_h) W^O",
    function=tfm.multi_head_attention,
    hypotheses=HYPOTHESES,
    measure=measure,
    lesson=Text(
        "One softmax can point to one mixture of places. Several heads point to several at once, "
        "each with its own comparison, and the next layer sees them side by side. Splitting a "
        "fixed width costs no parameters; it does not save work either.",
        "一个 softmax 只能给出一种位置的混合。多个头可以同时指向多处，各用各的比较方式，"
        "下一层能同时看到它们。在宽度固定时，拆分不增加参数，但也不减少计算量。",
    ),
)
