"""Question 11: what is gradient clipping, and why does it matter?"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    wilson_difference,
)
from experiments.reporting import style

THRESHOLD = 1.0
SPIKE = 1e4  # what the gradient of one step is multiplied by, in the middle of the training
# What trains well at this size, and a raised one: where most trainings fail without clipping.
RATES = {"sgd": (0.3, 2.0), "adam": (3e-3, 0.06)}
TRIALS = 64  # random gradient trees

_MORE = "share of seeds that survive with clipping minus without"
HYPOTHESES = {
    "length": Hypothesis(
        Text("The clipped gradient is never longer than θ.", "裁剪后的梯度范数不超过 θ。"),
        "largest ‖g′‖/θ − 1", bound=1e-5),
    "direction": Hypothesis(
        Text("Its direction is that of the gradient.", "裁剪不改变梯度的方向。"),
        "largest 1 − cos(g′, g)", bound=1e-6),
    "optax": Hypothesis(
        Text("The formula equals optax's clip_by_global_norm.",
             "该公式与 optax 的 clip_by_global_norm 一致。"),
        "largest relative difference of an element", bound=1e-5),
    "sgd_rate": Hypothesis(
        Text("With SGD, clipping keeps a raised learning rate from diverging.",
             "使用 SGD 时，裁剪能防止偏高的学习率导致发散。"), _MORE, 0.25),
    "sgd_spike": Hypothesis(
        Text("With SGD, clipping saves the training from an injected gradient spike.",
             "使用 SGD 时，裁剪能使训练经受住人为注入的梯度尖峰。"), _MORE, 0.25),
    "adam_rate": Hypothesis(
        Text("With Adam, clipping keeps a raised learning rate from diverging.",
             "使用 Adam 时，裁剪能防止偏高的学习率导致发散。"), _MORE, 0.25),
    "adam_spike": Hypothesis(
        Text("With Adam, clipping saves the training from an injected gradient spike.",
             "使用 Adam 时，裁剪能使训练经受住人为注入的梯度尖峰。"), _MORE, 0.25),
    "undone": Hypothesis(
        Text("Adam alone already undoes a constant factor on the gradient.",
             "Adam 本身就能抵消梯度上的常数因子。"),
        "largest relative change of Adam's update when every gradient is 1000 times as long",
        bound=1e-3, caveat_of="sgd_rate"),
}  # fmt: skip


class _Count(NamedTuple):
    step: Array


def _spike(at: int, factor: Array) -> optax.GradientTransformation:
    """Multiplies the gradient of one step."""

    def update(updates, state, params=None):
        scale = jnp.where(state.step == at, factor, 1.0)
        return jax.tree.map(lambda g: g * scale, updates), _Count(state.step + 1)

    return optax.GradientTransformation(lambda params: _Count(jnp.zeros((), jnp.int32)), update)


def _formula_errors(seed: int) -> dict[str, float]:
    """Over gradients from far below to far above the threshold, compared in float64."""
    rng = np.random.default_rng(seed)
    worst = {"length": 0.0, "direction": 0.0, "optax": 0.0}
    for scale in np.logspace(-4, 4, TRIALS):
        tree = [(scale * rng.standard_normal(n)).astype(np.float32) for n in (3, 50, 7)]
        clipped = tfm.clip_by_global_norm(tree, THRESHOLD)
        theirs = optax.clip_by_global_norm(THRESHOLD).update(tree, optax.EmptyState())[0]
        g, ours, other = (
            np.concatenate([np.asarray(x, np.float64) for x in t]) for t in (tree, clipped, theirs)
        )
        norm = np.linalg.norm(ours)
        errors = {
            "length": norm / THRESHOLD - 1,
            "direction": 1 - ours @ g / (norm * np.linalg.norm(g)),
            "optax": np.abs(ours / other - 1).max(),
        }
        worst = {name: max(worst[name], float(errors[name])) for name in worst}
    return worst


def _adam_change(seed: int) -> float:
    """How much Adam's updates change when all gradients grow 1000 times."""
    rng = np.random.default_rng(seed)
    gradients = jnp.asarray(rng.standard_normal((50, 20)), jnp.float32)
    adam = optax.adam(1.0, b1=0.9, b2=0.98, eps=1e-9)

    def last_update(gradients: Array) -> Array:
        def step(state, gradient):
            update, state = adam.update(gradient, state)
            return state, update

        return jax.lax.scan(step, adam.init(gradients[0]), gradients)[1][-1]

    return float(jnp.abs(last_update(1000 * gradients) / last_update(gradients) - 1).max())


def _train(budget: Budget, kind: str) -> np.ndarray:
    """Losses [(rate, rate clipped, spike, spike clipped), seeds, steps]."""
    task, steps = study.pronunciation(), budget.steps(120)
    usual, raised = RATES[kind]

    def make(rate: Array, spike: Array, threshold: Array) -> study.Trainee:
        descent = optax.sgd(rate) if kind == "sgd" else optax.adam(rate, b2=0.98, eps=1e-9)
        clip = optax.clip_by_global_norm(threshold)
        optimizer = optax.chain(_spike(steps // 2, spike), clip, descent)
        return study.Trainee(tfm.Transformer(task.config(d_model=32, d_ff=128)), optimizer)

    settings = {
        "rate": [raised, raised, usual, usual],
        "spike": [1.0, 1.0, SPIKE, SPIKE],
        "threshold": [np.inf, THRESHOLD, np.inf, THRESHOLD],
    }
    return study.train(budget, task, make, steps, settings, seeds=budget.many, probe_at=()).loss


def frequency_loss(task: study.Task) -> float:
    """−Σ p ln p of the sounds' frequencies: the loss of a model that knows nothing else."""
    counts = np.bincount(task.train["target"][task.train["target_segment_ids"] != 0])
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def survivors(loss: np.ndarray, worthless: float) -> np.ndarray:
    """Which trainings [..., steps] end below the loss of a model that has learned nothing."""
    end = loss[..., -max(1, loss.shape[-1] // 10) :].mean(-1)
    return np.isfinite(end) & (end < worthless)


def _draw(losses: dict[str, np.ndarray], worthless: float) -> Figure:
    titles = {
        "sgd": ("SGD, raised rate", "SGD, spike"),
        "adam": ("Adam, raised rate", "Adam, spike"),
    }
    figure, axes = style.panels(*titles["sgd"], *titles["adam"])
    for kind, pair in (("sgd", axes[:2]), ("adam", axes[2:])):
        for i, plot in enumerate(pair):
            # Losses beyond the panel, infinite ones included, run along its upper edge.
            shown = np.nan_to_num(losses[kind][2 * i : 2 * i + 2], nan=8.0, posinf=8.0).clip(0, 8)
            steps = range(1, shown.shape[-1] + 1)
            drawing.bands(plot, steps, {"without clipping": shown[0], "clipped": shown[1]})
            style.level(plot, worthless, "knows frequencies only")
            plot.set_ylim(0, 8.2)
            style.label(plot, "step", "training loss, nats a sound" if plot is axes[0] else "")
    return figure


def measure(budget: Budget) -> tuple[dict[str, Estimate], Figure]:
    """The formula on random trees; then trainings that clipping should save."""
    losses = {kind: _train(budget, kind) for kind in RATES}
    worthless = frequency_loss(study.pronunciation())
    estimates = {name: exact(e) for name, e in _formula_errors(budget.first_seed).items()}
    for kind, loss in losses.items():
        alive = survivors(loss, worthless).sum(-1)
        for i, trial in enumerate(("rate", "spike")):
            without, clipped = int(alive[2 * i]), int(alive[2 * i + 1])
            estimates[f"{kind}_{trial}"] = wilson_difference(clipped, without, loss.shape[1])
    estimates["undone"] = exact(_adam_change(budget.first_seed))
    return estimates, _draw(losses, worthless)


CLAIM = Claim(
    id="clipping",
    question=Text("What is gradient clipping, and why does it matter?",
                  "Transformer 模型训练中的梯度裁剪是如何数学定义的，它为何重要？"),
    formula="g′ = min(1, θ/‖g‖) · g",
    function=tfm.clip_by_global_norm,
    hypotheses=HYPOTHESES,
    measure=measure,
    lesson=Text(
        "Clipping keeps the direction of the gradient and limits its length, over all parameters "
        "together. A plain gradient step is as long as the gradient, so one bad batch can throw "
        "the model out of the region where it learns. Adam divides by the gradient's own size, so "
        "a constant factor never reaches the parameters, and only a sudden spike can.",
        "裁剪保持梯度的方向，只限制它（对全部参数）的总长度。普通梯度下降的步长与梯度成正比，"
        "一个坏批次就可能把模型抛出可学习的区域。Adam 会除以梯度自身的大小，"
        "常数因子传不到参数，只有突然的尖峰才会。",
    ),
)  # fmt: skip
