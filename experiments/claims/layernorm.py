"""Question 9: what is layer normalisation, and what is it for?"""

import math
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
from experiments.reporting import style
from tfm.training import init_params

LAYERS = 2  # encoder and decoder layers of the trained models
DEEP = 6  # of the models that are only initialised, as in the paper
GOAL = 1.2  # training loss, nats a sound, smoothed over SMOOTH steps
SMOOTH = 10
SETTINGS = {  # learning rate and warm-up, as a share of the steps; the studies' rate is 2e-3
    "low": (1e-3, 0.2),
    "high": (4e-3, 0.2),  # two rates, since what is best with it may not be without
    "cold": (4e-3, 0.0),
}
TRAINED = {  # what is trained as one program, by where the normalisation stands
    "post": [("post-LN", name) for name in SETTINGS] + [("no LN", "low"), ("no LN", "high")],
    "pre": [("pre-LN", "high"), ("pre-LN", "cold")],
}
LARGEST = 128.0  # log₂ of the largest variance that f32 holds
PROBES = (0, 3, 7, 12, 20)  # the pieces of a training after which the activations are seen

HYPOTHESES = {
    "formula": Hypothesis(
        Text("The function is the formula, with the biased variance and ε inside the root.",
             "函数与公式一致：用有偏方差，ε 在根号内。"),
        "largest |error| against float64", bound=1e-5),
    "invariant": Hypothesis(
        Text("Scaling and shifting x changes nothing: LN(ax + b) = LN(x) for a > 0.",
             "对 x 作缩放和平移不改变结果：LN(ax + b) = LN(x)，a > 0。"),
        "largest |change| for a = 1 … 1000, |b| ≤ a, x of variance 1", bound=1e-5),
    "small": Hypothesis(
        Text("It is not where x's variance is as small as ε = 10⁻⁶: there LN(ax) shrinks with a.",
             "当 x 的方差小到 ε = 10⁻⁶ 的量级时则不然：LN(ax) 随 a 缩小。"),
        "share of LN(x) that is lost for a = 1/1000, x of variance 1", 0.1,
        caveat_of="invariant"),
    "faster": Hypothesis(
        Text("It speeds up training: fewer steps to a loss of 1.2, each at its better rate.",
             "加快训练：各取较好的学习率，用更少的步数达到 1.2 的训练损失。"),
        "log₂ of the steps without it over those with it (never reached counts as all steps)",
        0.25),
    "drift": Hypothesis(
        Text("It holds the size of the activations steady during training.",
             "训练过程中，它使激活值的大小保持稳定。"),
        "deviation over training of log₂ of the layers' variances, without it minus with it",
        0.25),
    "shift": Hypothesis(
        Text("It holds the features' means steady during training.",
             "训练过程中，它使各特征的均值保持稳定。"),
        "deviation over training of a feature's mean, in deviations of its layer, without it minus "
        "with it", 0.1),
    "gradients": Hypothesis(
        Text("At initialisation post-LN's gradients grow towards the output more than pre-LN's.",
             "初始化时，post-LN 的梯度朝输出方向增大得比 pre-LN 更多。"),
        "log₂ of the last decoder layer's gradient norm over the first's, post-LN minus pre-LN",
        0.5),
    "needs_warmup": Hypothesis(
        Text("Post-LN, the paper's own, needs warm-up where pre-LN does not.",
             "论文所用的 post-LN 需要学习率预热，而 pre-LN 不需要。"),
        "loss that leaving the warm-up out costs post-LN minus what it costs pre-LN, nats a sound",
        0.05,
        caveat_of="faster"),
}  # fmt: skip


def normalised(present: bool | Array) -> Callable[..., Array]:
    """LayerNorm where `present`, else the identity."""

    def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
        return jnp.where(present, tfm.layer_norm(x, scale, bias, epsilon), x)

    return layer_norm


def _reference(row: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> list[float]:
    """The formula in float64, number by number: [D] -> [D]."""
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + 1e-6)
    return [(x - mean) / deviation * g + b for x, g, b in zip(row, scale, bias, strict=True)]


def _formula_errors(seed: int) -> dict[str, float]:
    """Largest errors, and for `small` the share that is lost; [200, 64] numbers of variance 1."""
    x_key, scale_key, bias_key = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(x_key, (200, 64))
    weights = jax.random.normal(scale_key, (64,)), jax.random.normal(bias_key, (64,))
    normal = tfm.layer_norm(x, *weights)
    scale, bias = (np.asarray(w, np.float64) for w in weights)
    expected = [_reference(row, scale, bias) for row in np.asarray(x, np.float64)]
    changed = [tfm.layer_norm(a * x + b * a, *weights) for a in (1.0, 30.0, 1e3) for b in (-1, 1)]
    plain, small = (tfm.layer_norm(a * x, jnp.ones(64), jnp.zeros(64)) for a in (1.0, 1e-3))
    return {
        "formula": float(np.abs(normal - np.array(expected)).max()),
        "invariant": max(float(jnp.abs(c - normal).max()) for c in changed),
        "small": float(1 - jnp.linalg.norm(small) / jnp.linalg.norm(plain)),
    }


def _gradients_by_layer(placement: str, seeds: range, task: study.Task) -> np.ndarray:
    """Gradient norms [seeds, decoder layers] of W₁ at initialisation."""
    config = task.config(num_encoder_layers=DEEP, num_decoder_layers=DEEP, norm_placement=placement)
    model = tfm.Transformer(config)
    batch = {name: rows[: study.ROWS] for name, rows in task.train.items()}

    @jax.jit
    def norms(key: Array) -> Array:
        def loss(params):
            return study.judge_batch(model, params, batch)["loss"]

        gradient = jax.grad(loss)(init_params(model, key))
        layers = [gradient[f"decoder_{i}"]["feed_forward"]["w1"] for i in range(DEEP)]
        return jnp.stack([jnp.linalg.norm(layer) for layer in layers])

    return np.array([norms(jax.random.PRNGKey(seed)) for seed in seeds])


def _activations(
    model: tfm.Transformer, params: chex.ArrayTree, task: study.Task
) -> dict[str, Array]:
    """Statistics of the activations after each normalisation (or its absence).

    `mean` [sites, D]: each feature's mean over the positions, in deviations of the site;
    `variance` [sites]: log₂ of the variance of all its numbers. Where they have overflowed, the
    variance counts as f32's largest and the mean as 0.
    """
    means, variances, normalise = [], [], model.functions.layer_norm

    def watched(x, scale, bias, epsilon):
        y = normalise(x, scale, bias, epsilon)
        means.append(y.mean(range(y.ndim - 1)) / y.std())
        variances.append(jnp.log2(y.var()))
        return y

    batch = {name: rows[: study.ROWS] for name, rows in task.valid.items()}
    study.forward(tfm.Transformer(model.config, tfm.Functions(layer_norm=watched)), params, batch)
    variance = jnp.nan_to_num(jnp.stack(variances), nan=LARGEST, posinf=LARGEST, neginf=-LARGEST)
    loss = study.judge_batch(model, params, task.valid)["loss"]
    guessing = math.log(model.config.vocab_size)  # stands for a diverged training
    return {
        "loss": jnp.minimum(jnp.nan_to_num(loss, nan=guessing), guessing),
        "mean": jnp.nan_to_num(jnp.stack(means), posinf=0, neginf=0),
        "variance": jnp.clip(variance, -LARGEST, LARGEST),
    }


def _train(budget: Budget) -> dict[tuple[str, str], study.Trained]:
    """Post-LN, pre-LN and no normalisation, by name and setting; each [seeds, ...]."""
    task, steps = study.pronunciation(), budget.steps(240)
    trainings = {}
    for placement, runs in TRAINED.items():
        config = task.config(
            num_encoder_layers=LAYERS, num_decoder_layers=LAYERS, norm_placement=placement
        )

        def make(present: Array, rate: Array, warm: Array, config=config) -> study.Trainee:
            model = tfm.Transformer(config, tfm.Functions(layer_norm=normalised(present)))
            decay = tfm.cosine_schedule(1.0, 0, steps)
            rises = jnp.maximum(warm * steps, 1)  # so that a share of 0 is no warm-up

            def schedule(count: Array) -> Array:
                return rate * decay(count) * jnp.minimum(1, (count + 1) / rises)

            return study.Trainee(model, tfm.make_optimizer(schedule, 1.0))

        rates, warm = zip(*(SETTINGS[setting] for _, setting in runs), strict=True)
        settings = {"present": [kind != "no LN" for kind, _ in runs], "rate": rates, "warm": warm}
        trained = study.train(
            budget, task, make, steps, settings, probe=_activations, probe_at=PROBES
        )
        trainings |= {run: jax.tree.map(lambda x, i=i: x[i], trained) for i, run in enumerate(runs)}
    return trainings


def smoothed(loss: np.ndarray) -> np.ndarray:
    """The mean of the last SMOOTH steps, for [..., steps] -> [..., steps − SMOOTH + 1]."""
    return np.lib.stride_tricks.sliding_window_view(loss, SMOOTH, axis=-1).mean(-1)


def steps_to(loss: np.ndarray, goal: float) -> np.ndarray:
    """The first step whose smoothed loss is at most `goal`; all steps where none is."""
    reached = smoothed(loss) <= goal
    return np.where(reached.any(-1), reached.argmax(-1) + SMOOTH, loss.shape[-1])


def _estimates(
    trained: dict[tuple[str, str], study.Trained], gradients: dict[str, np.ndarray]
) -> dict[str, Estimate]:
    def steps(kind: str) -> np.ndarray:
        return np.minimum(*(steps_to(trained[kind, rate].loss, GOAL) for rate in ("low", "high")))

    def calmer(quantity: str) -> Estimate:
        none, post = (  # [seeds, sites, ...]
            trained[kind, "low"].probes[quantity].std(1) for kind in ("no LN", "post-LN")
        )
        return paired_t((none - post).reshape(len(none), -1).mean(1))

    def cost(kind: str) -> np.ndarray:
        cold, warm = (trained[kind, s].probes["loss"][:, -1] for s in ("cold", "high"))
        return cold - warm

    growth = {name: np.log2(norms[:, -1] / norms[:, 0]) for name, norms in gradients.items()}
    return {
        "faster": paired_t(np.log2(steps("no LN") / steps("post-LN"))),
        "drift": calmer("variance"),
        "shift": calmer("mean"),
        "gradients": paired_t(growth["post"] - growth["pre"]),
        "needs_warmup": paired_t(cost("post-LN") - cost("pre-LN")),
    }


def _draw(
    trained: dict[tuple[str, str], study.Trained], gradients: dict[str, np.ndarray]
) -> Figure:
    figure, (curve, gradient, warmup) = style.panels(
        "Training", "Gradients at initialisation", "Warm-up or none"
    )
    steps = np.arange(trained["no LN", "low"].loss.shape[-1] - SMOOTH + 1) + SMOOTH
    curves = {
        f"{kind}, {SETTINGS[rate][0]:g}": smoothed(trained[kind, rate].loss)
        for kind in ("post-LN", "no LN")
        for rate in ("low", "high")
    }
    drawing.bands(curve, steps, {n: np.nan_to_num(c, nan=5).clip(0, 5) for n, c in curves.items()})
    style.level(curve, GOAL, "goal")
    style.label(curve, "step", "training loss, nats a sound")
    norms = {f"{name}-LN": g / g[:, :1] for name, g in gradients.items()}
    drawing.bands(gradient, np.arange(DEEP) + 1, norms)
    gradient.set_ylim(bottom=0)
    style.label(gradient, "decoder layer", "gradient of W₁, norm over the first's")
    ends = {
        f"{kind[:-3]},\n{words}": trained[kind, setting].probes["loss"][:, -1]
        for kind in ("post-LN", "pre-LN")
        for words, setting in (("warm-up", "high"), ("none", "cold"))
    }
    drawing.points(warmup, ends)
    style.label(warmup, "", "validation loss, nats a sound")
    return figure


def measure(budget: Budget) -> tuple[dict[str, Estimate], Figure]:
    """The formula; gradients at initialisation; trainings with it, around it and without it."""
    task = study.pronunciation()
    seeds = range(budget.first_seed, budget.first_seed + budget.seeds)
    gradients = {p: _gradients_by_layer(p, seeds, task) for p in ("post", "pre")}
    trained = _train(budget)
    errors = {name: exact(e) for name, e in _formula_errors(budget.first_seed).items()}
    return errors | _estimates(trained, gradients), _draw(trained, gradients)


CLAIM = Claim(
    id="layernorm",
    question=Text("What is layer normalisation, and what is it for?",
                  "Transformer 模型中 Layer Normalization 的数学原理是什么？"),
    formula="LN(x) = (x − μ)/√(σ² + ε) · γ + β",
    function=tfm.layer_norm,
    hypotheses=HYPOTHESES,
    measure=measure,
    lesson=Text(
        "Each position's features are brought to mean 0 and variance 1, then scaled and shifted by "
        "learned numbers. However large a layer's output grows, the next one sees the same range. "
        "Where the normalisation stands, after the residual sum or before the sub-layer, decides "
        "how the gradients are spread over the layers.",
        "把每个位置的特征变为均值 0、方差 1，再用可学习的参数缩放和平移。无论某层输出多大，"
        "下一层看到的范围都一样。归一化放在残差相加之后还是子层之前，决定了梯度在各层之间如何分布。",
    ),
)  # fmt: skip
