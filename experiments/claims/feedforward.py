"""Question 7: what is the feed-forward network, and what is it for?"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import tfm
from experiments.claims import drawing, study
from experiments.claims.evidence import Budget, Claim, Estimate, Hypothesis, Text, exact, paired_t
from experiments.reporting import style
from tfm.kernels.precision import linear

WIDER = 100  # d_model without the network: 12·100² parameters in the attentions of 1 + 1 layers,
# a little more than the 12·64² + 4·64·256 of the model with it

HYPOTHESES = {
    "formula": Hypothesis(
        Text("The function is the formula: max(0, xW₁ + b₁)W₂ + b₂.",
             "函数与公式 max(0, xW₁ + b₁)W₂ + b₂ 一致。"),
        "largest |error| against float64", bound=1e-5),
    "alone": Hypothesis(
        Text("It is applied to each position alone: no position depends on another.",
             "它对每个位置独立作用：位置之间互不影响。"),
        "largest |∂ output at one position / ∂ input at another|", bound=1e-30),
    "nonlinear": Hypothesis(
        Text("Its non-linearity matters: with the identity in ReLU's place training ends worse.",
             "非线性很重要：用恒等函数代替 ReLU，训练结果更差。"),
        "validation loss with the identity minus with ReLU, nats a sound", 0.02),
    "expressive": Hypothesis(
        Text("It adds more than the same number of parameters in wider attention.",
             "它带来的提升大于把同样多的参数用于加宽注意力。"),
        "validation loss without the network (d_model 100) minus with it (64), nats a sound", 0.02),
}  # fmt: skip


def leaky(slope: float | Array) -> Callable[..., Array]:
    """The network with slope·h for h < 0: 0 is ReLU, 1 the identity, and the map is affine."""

    def feed_forward(
        x: Array, w1: Array, b1: Array, w2: Array, b2: Array, *, compute_dtype: str | None = None
    ) -> Array:
        hidden = linear(x, w1, compute_dtype) + b1
        return linear(jnp.where(hidden > 0, hidden, slope * hidden), w2, compute_dtype) + b2

    return feed_forward


def nothing(x: Array, *weights: Array, compute_dtype: str | None = None) -> Array:
    """No network at all: 0 on the residual path."""
    return jnp.zeros_like(x)


def _reference(x: np.ndarray, w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray):
    """The formula in float64, sum by sum: [L, D] -> [L, D]."""
    y = np.zeros((len(x), len(b2)))
    for i, row in enumerate(x):
        hidden = [
            max(0.0, sum(row[d] * w1[d, f] for d in range(len(row))) + b1[f])
            for f in range(len(b1))
        ]
        for d in range(len(b2)):
            y[i, d] = sum(h * w2[f, d] for f, h in enumerate(hidden)) + b2[d]
    return y


def _formula_errors(seed: int) -> dict[str, float]:
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = {"x": (6, 8), "w1": (8, 32), "b1": (32,), "w2": (32, 8), "b2": (8,)}
    drawn = [jax.random.normal(k, s) / 3 for k, s in zip(keys, shapes.values(), strict=True)]
    expected = _reference(*(np.asarray(a, np.float64) for a in drawn))
    jacobian = np.array(jax.jacrev(tfm.feed_forward)(*drawn))  # [L, D, L, D]
    for position in range(len(expected)):
        jacobian[position, :, position] = 0  # keeps the derivatives between different positions
    return {
        "formula": float(np.abs(tfm.feed_forward(*drawn) - expected).max()),
        "alone": float(np.abs(jacobian).max()),
    }


def _train(budget: Budget) -> dict[str, np.ndarray]:
    """Validation losses [seeds] of each kind of model."""
    task, steps = study.pronunciation(), budget.steps(500)

    def one(slopes: tuple[float, ...], network: Callable, **changes: int) -> np.ndarray:
        def make(slope: Array) -> study.Trainee:
            functions = tfm.Functions(feed_forward=network(slope))
            model = tfm.Transformer(task.config(**changes), functions)
            return study.Trainee(model, study.optimizer(steps))

        trained = study.train(budget, task, make, steps, {"slope": slopes})
        return trained.probes["loss"][..., -1]

    relu, identity = one((0.0, 1.0), leaky)
    (none,) = one((0.0,), lambda slope: nothing, d_model=WIDER, d_ff=1)
    return {"ReLU": relu, "identity": identity, "no FFN": none}


def _draw(losses: dict[str, np.ndarray], seed: int) -> Figure:
    figure, (quality, jacobian) = style.panels("Quality", "Who depends on whom")
    drawing.points(quality, losses)
    style.label(quality, "in the place of the network", "validation loss, nats a sound")
    keys = jax.random.split(jax.random.key(seed), 3)
    x, w1, w2 = (
        jax.random.normal(k, s) for k, s in zip(keys, ((8, 8), (8, 32), (32, 8)), strict=True)
    )
    between = jax.jacrev(lambda x: tfm.feed_forward(x, w1, jnp.zeros(32), w2, jnp.zeros(8)))(x)
    sizes = np.sqrt(np.square(between).sum((1, 3)))
    image = jacobian.imshow(sizes / sizes.max(), cmap="Blues", vmin=0, vmax=1)
    scale = figure.colorbar(image, ax=jacobian)
    scale.set_label("norm of the derivative\nover the largest", fontsize=9, color=style.MUTED)
    scale.ax.tick_params(length=0, labelsize=9, colors=style.MUTED)
    scale.outline.set_visible(False)
    jacobian.grid(False)
    style.label(jacobian, "position of the input", "position of the output")
    return figure


def measure(budget: Budget) -> tuple[dict[str, Estimate], Figure]:
    """The formula and its Jacobian; then trainings with two things in its place."""
    losses = _train(budget)
    estimates = {name: exact(e) for name, e in _formula_errors(budget.first_seed).items()} | {
        "nonlinear": paired_t(losses["identity"] - losses["ReLU"]),
        "expressive": paired_t(losses["no FFN"] - losses["ReLU"]),
    }
    return estimates, _draw(losses, budget.first_seed)


CLAIM = Claim(
    id="feedforward",
    question=Text("What is the feed-forward network, and what is it for?",
                  "在 Transformer 中，如何数学上表达编码器和解码器中的前馈神经网络（FFN）？"),
    formula="FFN(x) = max(0, xW₁ + b₁)W₂ + b₂",
    function=tfm.feed_forward,
    hypotheses=HYPOTHESES,
    measure=measure,
    lesson=Text(
        "Attention mixes positions, the feed-forward network works within each one: it widens the "
        "features, cuts off what is negative, and narrows them again. Without the cut the two "
        "matrices would be one, and the sub-layer a linear map.",
        "注意力在位置之间混合信息，前馈网络在每个位置内部加工：先升维，截去负值，再降维。"
        "没有这一截断，两个矩阵就等于一个矩阵，该子层只是线性映射。",
    ),
)  # fmt: skip
