"""Question 9: what is layer normalisation, and what is it for?"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import tfm
from experiments.claims import drawing, study
from experiments.claims.evidence import Budget, Claim, Estimate, Hypothesis, Text, exact, paired_t
from tfm.training import init_params

LAYERS = 2  # encoder and decoder layers of the trained models
DEEP = 6  # of the models that are only initialised, as in the paper
GOAL = 1.2  # training loss, nats a sound, smoothed over SMOOTH steps
SMOOTH = 10
RATE = 4e-3  # twice the studies' rate: where warm-up should begin to matter
WARM = (0.0, 0.2)  # share of the steps
PROBES = (0, 2, 4, 8, 12, 16, 20)

HYPOTHESES = {
    "formula": Hypothesis(
        Text("The function is the formula, with the biased variance and ε inside the root.",
             "函数与公式一致：用有偏方差，ε 在根号内。"),
        "largest |error| against float64", bound=1e-5),
    "invariant": Hypothesis(
        Text("Scaling and shifting x changes nothing: LN(ax + b) = LN(x) for a > 0.",
             "对 x 作缩放和平移不改变结果：LN(ax + b) = LN(x)，a > 0。"),
        "largest |change| for a = 1 … 1000, |b| ≤ a, x of variance 1", bound=1e-5),
    "faster": Hypothesis(
        Text("It speeds up training: fewer steps to a training loss of 1.2.",
             "加快训练：用更少的步数达到 1.2 的训练损失。"),
        "log₂ of the steps without it over those with it (never reached counts as all steps)",
        0.25),
    "drift": Hypothesis(
        Text("It holds the size of the activations steady during training.",
             "训练过程中，它使激活值的大小保持稳定。"),
        "spread over training of log₂ of the layers' variances, without it minus with it", 0.25),
    "shift": Hypothesis(
        Text("It holds the mean of the activations steady during training.",
             "训练过程中，它使激活值的均值保持稳定。"),
        "spread over training of the layers' means, in deviations, without it minus with it",
        0.02),
    "gradients": Hypothesis(
        Text("At initialisation post-LN's gradients grow towards the output more than pre-LN's.",
             "初始化时，post-LN 的梯度朝输出方向增大得比 pre-LN 更多。"),
        "log₂ of the last decoder layer's gradient norm over the first's, post-LN minus pre-LN",
        0.5),
    "needs_warmup": Hypothesis(
        Text("Post-LN, the paper's own, needs warm-up where pre-LN does not.",
             "论文所用的 post-LN 需要学习率预热，而 pre-LN 不需要。"),
        "loss that leaving the warm-up out costs post-LN minus what it costs pre-LN, nats", 0.05,
        caveat_of="faster"),
}  # fmt: skip


def without(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """No normalisation: x as it is."""
    return x


def _formula_errors(seed: int) -> dict[str, float]:
    x_key, scale_key, bias_key = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(x_key, (200, 64))
    scale, bias = jax.random.normal(scale_key, (64,)), jax.random.normal(bias_key, (64,))
    normal = tfm.layer_norm(x, scale, bias)
    x64 = np.asarray(x, np.float64)
    mean = x64.mean(1, keepdims=True)
    deviation = np.sqrt(((x64 - mean) ** 2).mean(1, keepdims=True) + 1e-6)
    expected = (x64 - mean) / deviation * np.asarray(scale) + np.asarray(bias)
    changed = [
        tfm.layer_norm(a * x + b * a, scale, bias) for a in (1.0, 30.0, 1e3) for b in (-1.0, 1.0)
    ]
    return {
        "formula": float(np.abs(normal - expected).max()),
        "invariant": max(float(jnp.abs(c - normal).max()) for c in changed),
    }


def _gradients_by_layer(placement: str, seeds: range, task: study.Task) -> np.ndarray:
    """Gradient norms [seeds, decoder layers] of W₁ at initialisation."""
    config = task.config(
        num_encoder_layers=DEEP, num_decoder_layers=DEEP, norm_placement=placement
    )
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
    """Mean and log₂ variance of what each normalisation (or its absence) passes on: [sites]."""
    sites, normalise = [], model.functions.layer_norm

    def watched(x, scale, bias, epsilon):
        y = normalise(x, scale, bias, epsilon)
        sites.append((y.mean(), y.var()))
        return y

    batch = {name: rows[: study.ROWS] for name, rows in task.valid.items()}
    study.forward(tfm.Transformer(model.config, tfm.Functions(layer_norm=watched)), params, batch)
    means, variances = (jnp.stack(values) for values in zip(*sites, strict=True))
    loss = study.judge_batch(model, params, task.valid)["loss"]
    return {"loss": loss, "mean": means / jnp.sqrt(variances), "variance": jnp.log2(variances)}


def _train(budget: Budget) -> dict[str, study.Trained]:
    """Post-LN, pre-LN and no normalisation; each [(no warm-up, warm-up), seeds, ...]."""
    task, steps = study.pronunciation(), budget.steps(300)
    deeper = {"num_encoder_layers": LAYERS, "num_decoder_layers": LAYERS}
    kinds = {
        "post-LN": tfm.Transformer(task.config(**deeper)),
        "pre-LN": tfm.Transformer(task.config(**deeper, norm_placement="pre")),
        "no LN": tfm.Transformer(task.config(**deeper), tfm.Functions(layer_norm=without)),
    }

    def one(model: tfm.Transformer) -> study.Trained:
        def make(warm: Array) -> study.Trainee:
            decay = tfm.cosine_schedule(RATE, 0, steps)
            rises = jnp.maximum(warm * steps, 1)  # so that a share of 0 is no warm-up
            schedule = lambda count: decay(count) * jnp.minimum(1, (count + 1) / rises)  # noqa: E731
            return study.Trainee(model, tfm.make_optimizer(schedule, 1.0))

        settings = {"warm": WARM}
        return study.train(
            budget, task, make, steps, settings, probe=_activations, probe_at=PROBES
        )

    return {name: one(model) for name, model in kinds.items()}


def smoothed(loss: np.ndarray) -> np.ndarray:
    """The mean of the last SMOOTH steps, for [..., steps] -> [..., steps − SMOOTH + 1]."""
    return np.lib.stride_tricks.sliding_window_view(loss, SMOOTH, axis=-1).mean(-1)


def steps_to(loss: np.ndarray, goal: float) -> np.ndarray:
    """The first step whose smoothed loss is at most `goal`; all steps where none is."""
    reached = smoothed(loss) <= goal
    return np.where(reached.any(-1), reached.argmax(-1) + SMOOTH, loss.shape[-1])


def _spread(values: np.ndarray) -> np.ndarray:
    """Deviation over the probes, mean of the sites: [seeds, probes, sites] -> [seeds]."""
    return np.nan_to_num(values, nan=0, posinf=0, neginf=0).std(1).mean(-1)


def _estimates(
    trained: dict[str, study.Trained], gradients: dict[str, np.ndarray]
) -> dict[str, Estimate]:
    post, none = trained["post-LN"], trained["no LN"]
    steps = {name: steps_to(t.loss[1], GOAL) for name, t in trained.items()}
    cost = {n: t.probes["loss"][0, :, -1] - t.probes["loss"][1, :, -1] for n, t in trained.items()}
    growth = {name: np.log2(norms[:, -1] / norms[:, 0]) for name, norms in gradients.items()}

    def calmer(quantity: str) -> Estimate:
        return paired_t(_spread(none.probes[quantity][1]) - _spread(post.probes[quantity][1]))

    return {
        "faster": paired_t(np.log2(steps["no LN"] / steps["post-LN"])),
        "drift": calmer("variance"),
        "shift": calmer("mean"),
        "gradients": paired_t(growth["post"] - growth["pre"]),
        "needs_warmup": paired_t(cost["post-LN"] - cost["pre-LN"]),
    }


def _draw(trained: dict[str, study.Trained], gradients: dict[str, np.ndarray]) -> Figure:
    figure, (curve, gradient, warmup) = drawing.panels(
        "Training, with warm-up", "Gradients at initialisation", "Warm-up or none"
    )
    steps = np.arange(trained["no LN"].loss.shape[-1] - SMOOTH + 1) + SMOOTH
    curves = {name: smoothed(t.loss[1]) for name, t in trained.items()}
    drawing.bands(curve, steps, {n: np.nan_to_num(c, nan=5).clip(0, 5) for n, c in curves.items()})
    drawing.level(curve, GOAL, "goal")
    drawing.label(curve, "step", "training loss, nats a sound")
    norms = {f"{name}-LN": g / g[:, :1] for name, g in gradients.items()}
    drawing.bands(gradient, np.arange(DEEP) + 1, norms)
    gradient.set_ylim(bottom=0)
    drawing.label(gradient, "decoder layer", "norm of W₁'s gradient over the first's")
    ends = {
        f"{name[:-3]}\n{'warm-up' if warm else 'none'}": trained[name].probes["loss"][i, :, -1]
        for name in ("post-LN", "pre-LN")
        for i, warm in enumerate(WARM)
    }
    drawing.points(warmup, ends)
    drawing.label(warmup, "", "validation loss, nats a sound")
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
