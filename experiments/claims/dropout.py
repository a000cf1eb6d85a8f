"""Question 3: why dropout?"""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import tfm
from experiments.claims import drawing, study
from experiments.claims.evidence import Budget, Claim, Estimate, Hypothesis, Text, exact, paired_t
from experiments.reporting import style

RATES = (0.0, 0.1, 0.3)
SMALL = 256  # packed rows, about 1,200 words: few enough to be learned by heart
DRAWS = 2**20
PROBES = (2, 5, 10, 15, 20)  # the pieces of a training after which it is judged

HYPOTHESES = {
    "expectation": Hypothesis(
        Text("Dropout leaves the expectation as it is: E[out] = x.",
             "dropout 不改变期望：E[out] = x。"),
        # Of 2²⁰ draws at rate 0.3 the mean has a deviation of 6.4e-4.
        "largest |mean of 2²⁰ draws − x| for x = 1, over the rates", bound=4e-3),
    "gap": Hypothesis(
        Text("Dropout 0.1 narrows the gap between training and validation (1,200 words).",
             "0.1 的 dropout 缩小训练与验证之间的差距（约 1,200 个单词）。"),
        "(validation − training loss) at rate 0 minus at rate 0.1, nats a sound", 0.05),
    "generalises": Hypothesis(
        Text("Dropout 0.1 generalises better when data is scarce (1,200 words).",
             "数据少时（约 1,200 个单词），0.1 的 dropout 泛化更好。"),
        "validation loss at rate 0 minus at rate 0.1, nats a sound", 0.02),
    "generalises_strong": Hypothesis(
        Text("Dropout 0.3 generalises better still.", "0.3 的 dropout 泛化更好。"),
        "validation loss at rate 0.1 minus at rate 0.3, 1,200 words, nats a sound", 0.02),
    "slows": Hypothesis(
        Text("With plenty of data and few steps dropout 0.3 slows learning.",
             "数据充足而步数少时，0.3 的 dropout 会减慢学习。"),
        "validation loss at rate 0.3 minus at rate 0, all words, nats a sound", 0.02,
        caveat_of="generalises"),
}  # fmt: skip


def _expectation_error(seed: int) -> float:
    keys = jax.random.split(jax.random.key(seed), len(RATES))
    means = [tfm.dropout(k, jnp.ones(DRAWS), r).mean() for k, r in zip(keys, RATES, strict=True)]
    return max(abs(float(mean) - 1) for mean in means)


def _train(budget: Budget) -> tuple[np.ndarray, np.ndarray]:
    """Validation and training losses [rates, (small, all), seeds, probes]."""
    task, steps = study.pronunciation(), budget.steps(400)

    def one_rate(rate: float) -> dict[str, np.ndarray]:
        model = tfm.Transformer(task.config(dropout_rate=rate))
        trainee = study.Trainee(model, study.optimizer(steps))
        return study.train(
            budget, task, lambda: trainee, steps,
            train_rows=(SMALL, len(task.train["source"])), probe_at=PROBES,
        ).probes  # fmt: skip

    probes = [one_rate(rate) for rate in RATES]
    return np.stack([p["loss"] for p in probes]), np.stack([p["train_loss"] for p in probes])


def _draw(valid: np.ndarray, train: np.ndarray) -> Figure:
    figure, (curves, small, large) = style.panels(
        "Few words: over training", "Few words: at the end", "All words: at the end"
    )
    share = np.array(PROBES) / study.PIECES * 100
    lines = {
        f"{name}, rate {rate:g}": losses[i, 0]
        for i, rate in enumerate(RATES)
        if rate != 0.1
        for name, losses in (("validation", valid), ("training", train))
    }
    drawing.bands(curves, share, lines)
    curves.set_ylim(0, 1.6 * max(line.max() for line in lines.values()))  # the legend's place
    style.label(curves, "steps done, %", "loss, nats a sound")
    for axes, size in ((small, 0), (large, 1)):
        drawing.points(axes, {f"{r:g}": valid[i, size, :, -1] for i, r in enumerate(RATES)})
        style.label(axes, "dropout rate", "validation loss, nats a sound")
    return figure


def measure(budget: Budget) -> tuple[dict[str, Estimate], Figure]:
    """Three rates, each on a small and on the whole training set."""
    valid, train = _train(budget)
    end, gap = valid[..., -1], (valid - train)[..., -1]  # [rates, sizes, seeds]
    estimates = {
        "expectation": exact(_expectation_error(budget.first_seed)),
        "gap": paired_t(gap[0, 0] - gap[1, 0]),
        "generalises": paired_t(end[0, 0] - end[1, 0]),
        "generalises_strong": paired_t(end[1, 0] - end[2, 0]),
        "slows": paired_t(end[2, 1] - end[0, 1]),
    }
    return estimates, _draw(valid, train)


CLAIM = Claim(
    id="dropout",
    question=Text("Why dropout?", "在 Transformer 模型中，为什么要使用 Dropout？"),
    formula="out = 0 with probability p, else x/(1 − p)",
    function=tfm.dropout,
    hypotheses=HYPOTHESES,
    measure=measure,
    lesson=Text(
        "Dropout hides a random part of the activations at every step, so no feature can rely on "
        "one other feature being there. That makes learning by heart harder, which helps where "
        "there is little to learn from; where there is plenty, it is only noise. The paper drops "
        "activations, not connections.",
        "dropout 在每一步随机隐藏一部分激活值，任何特征都不能依赖另一个特征必然存在。"
        "这使“死记硬背”更难：数据少时有帮助，数据充足时只是噪声。论文丢弃的是激活值，而不是连接。",
    ),
)
