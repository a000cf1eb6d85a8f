"""Question 1: why is QKᵀ divided by √d_k?"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import tfm
from experiments.claims import drawing, study
from experiments.claims.evidence import Budget, Claim, Estimate, Hypothesis, Text, exact, paired_t
from experiments.reporting import style

SIZES = (4, 16, 64, 256, 1024, 4096)  # d_k
QUERIES, KEYS = 256, 64
SILENT = (
    0.01  # a Jacobian of this norm passes next to nothing on; a uniform softmax has 1/√K ≈ 0.12
)
D_MODEL = 64
EXPONENTS = {"no factor": 0.0, "1/√d_k": 0.5, "1/d_k": 1.0}

HYPOTHESES = {
    "growth": Hypothesis(
        Text("For q and k of unit variance the standard deviation of q·k grows as √d_k.",
             "当 q、k 的分量方差为 1 时，q·k 的标准差按 √d_k 增长。"),
        "largest |log-log slope − ½| over d_k = 4 … 4096", bound=0.02),
    "steady": Hypothesis(
        Text("Divided by √d_k it does not depend on d_k.", "除以 √d_k 之后，它与 d_k 无关。"),
        "largest |log-log slope| over d_k = 4 … 4096", bound=0.02),
    "saturates": Hypothesis(
        Text("Without the factor softmax saturates: at d_k = 1024 its entropy falls.",
             "不缩放时 softmax 会饱和：d_k = 1024 时熵明显下降。"),
        "entropy with the factor minus without, as a share of ln K, at d_k = 1024", 0.5),
    "silent": Hypothesis(
        Text("Without the factor most rows' softmax gradient goes to about 0 (d_k = 4096).",
             "不缩放时，多数行的 softmax 梯度趋近于 0（d_k = 4096）。"),
        "share of rows with a softmax Jacobian of norm < 0.01, without the factor minus with it",
        0.5),
    "reaches_query": Hypothesis(
        Text("Without the factor the mean gradient that reaches a query is less than half "
             "(d_k = 4096).", "不缩放时，传到查询向量的平均梯度不到缩放时的一半（d_k = 4096）。"),
        "log₂ of the mean gradient norm with the factor over that without", 1.0),
    "hard": Hypothesis(
        Text("Without the factor the model trains worse at d_k = 64.",
             "d_k = 64 时，不缩放的模型训练得更差。"),
        "validation loss without the factor minus with it, nats a sound", 0.02),
    "adapts": Hypothesis(
        Text("The harm is larger early in training than at its end: W_Q and W_K learn to shrink.",
             "训练早期的损害大于训练结束时：W_Q、W_K 能学会变小。"),
        "that difference after a tenth of the steps minus at the end, nats", 0.02,
        caveat_of="hard"),
    "harm_grows": Hypothesis(
        Text("The harm is larger at d_k = 64 than at d_k = 8.", "d_k = 64 时的损害大于 d_k = 8。"),
        "loss without the factor minus with it, at d_k = 64 minus at d_k = 8, nats", 0.02),
    "one_over_d_k": Hypothesis(
        Text("Dividing by d_k, as question 4's prose has it, trains worse than by √d_k (d_k = 64).",
             "按问题 4 的文字除以 d_k，比除以 √d_k 训练得更差（d_k = 64）。"),
        "validation loss with 1/d_k minus with 1/√d_k, nats a sound", 0.02),
}  # fmt: skip


def _one_size(key: Array, d_k: int, factor: float) -> dict[str, Array]:
    """Logits' deviation; and of softmax(factor · q·k): entropy, Jacobian norms, q's gradient."""
    q_key, k_key, u_key = jax.random.split(key, 3)
    query = jax.random.normal(q_key, (QUERIES, d_k))
    keys = jax.random.normal(k_key, (KEYS, d_k))
    upstream = jax.random.normal(u_key, (QUERIES, KEYS))

    def weights(query):
        return tfm.attention_weights(query * factor * d_k**0.5, keys)  # which divides by √d_k

    p = weights(query)
    gradient = jax.grad(lambda q: (weights(q) * upstream).sum())(query)
    squares = jnp.square(p).sum(-1)
    # ‖diag(p) − ppᵀ‖² = Σp² − 2Σp³ + (Σp²)²; rounding may leave a little less than 0
    jacobian = jnp.sqrt(jnp.maximum(squares - 2 * (p**3).sum(-1) + squares**2, 0))
    return {
        "deviation": (query @ keys.T * factor).std(),
        "entropy": -(p * jnp.log(jnp.maximum(p, 1e-30))).sum(-1).mean() / np.log(KEYS),
        "silent": (jacobian < SILENT).mean(),
        "gradient": jnp.linalg.norm(gradient, axis=-1).mean(),
    }


def _at_initialisation(budget: Budget) -> dict[str, dict[str, np.ndarray]]:
    """{'without' | 'with': {quantity: [seeds, sizes]}}."""
    seeds = range(budget.first_seed, budget.first_seed + max(budget.seeds, 5))
    measured = {}
    for name, power in (("without", 0.0), ("with", -0.5)):
        rows = [
            [_one_size(jax.random.key(seed), d_k, float(d_k) ** power) for d_k in SIZES]
            for seed in seeds
        ]
        measured[name] = {k: np.array([[float(x[k]) for x in r] for r in rows]) for k in rows[0][0]}
    return measured


def _make(task: study.Task, heads: int, steps: int):
    def make(exponent: Array) -> study.Trainee:
        def weights(query, key, mask=None, **options):
            scaled = query * query.shape[-1] ** (0.5 - exponent)
            return tfm.attention_weights(scaled, key, mask, **options)

        config = task.config(d_model=D_MODEL, num_heads=heads)
        model = tfm.Transformer(config, tfm.Functions(attention_weights=weights))
        return study.Trainee(model, study.optimizer(steps))

    return make


def _train(budget: Budget, heads: int) -> np.ndarray:
    """Validation losses [exponents, seeds, (early, end)]."""
    task, steps = study.pronunciation(), budget.steps(400)
    settings = {"exponent": list(EXPONENTS.values())}
    make = _make(task, heads, steps)
    trained = study.train(budget, task, make, steps, settings, probe_at=(2, study.PIECES))
    return trained.probes["loss"]


def _estimates(initial: dict, small: np.ndarray, large: np.ndarray) -> dict[str, Estimate]:
    without, with_ = initial["without"], initial["with"]
    logs = np.log(SIZES)
    slopes = {n: np.polyfit(logs, np.log(f["deviation"]).T, 1)[0] for n, f in initial.items()}
    seeds, last = len(slopes["with"]), SIZES.index(4096)
    ratio = np.log2(with_["gradient"][:, last] / without["gradient"][:, last])
    harm = large[0] - large[1]  # [seeds, (early, end)]
    at_1024 = SIZES.index(1024)
    return {
        "growth": exact(np.abs(slopes["without"] - 0.5).max(), seeds),
        "steady": exact(np.abs(slopes["with"]).max(), seeds),
        "saturates": paired_t((with_["entropy"] - without["entropy"])[:, at_1024]),
        "silent": paired_t((without["silent"] - with_["silent"])[:, last]),
        "reaches_query": paired_t(ratio),
        "hard": paired_t(harm[:, 1]),
        "adapts": paired_t(harm[:, 0] - harm[:, 1]),
        "harm_grows": paired_t(harm[:, 1] - (small[0] - small[1])[:, 1]),
        "one_over_d_k": paired_t((large[2] - large[1])[:, 1]),
    }


def _draw(initial: dict, large: np.ndarray) -> Figure:
    figure, (growth, entropy, loss) = style.panels(
        "Logits grow", "Softmax saturates", "Training, d_k = 64"
    )
    for axes, quantity, unit in (
        (growth, "deviation", "standard deviation of the logits"),
        (entropy, "entropy", "entropy / ln K"),
    ):
        names = {"without": "no factor", "with": "1/√d_k"}
        drawing.bands(axes, SIZES, {names[n]: f[quantity] for n, f in initial.items()})
        axes.set_xscale("log", base=2)
        style.label(axes, "d_k", unit)
    growth.set_yscale("log", base=2)
    drawing.points(loss, {name: large[i, :, 1] for i, name in enumerate(EXPONENTS)})
    style.label(loss, "factor", "validation loss, nats a sound")
    return figure


def measure(budget: Budget) -> tuple[dict[str, Estimate], Figure]:
    """At initialisation over d_k; then trainings with d_k = 8 and 64, three factors each."""
    initial = _at_initialisation(budget)
    small, large = (_train(budget, heads) for heads in (D_MODEL // 8, 1))
    return _estimates(initial, small, large), _draw(initial, large)


CLAIM = Claim(
    id="scaling",
    question=Text("Why is QKᵀ divided by √d_k?", "为什么 Query 和 Key 的点乘需要除以 √d_k？"),
    formula="softmax(QKᵀ/√d_k)",
    function=tfm.attention_weights,
    hypotheses=HYPOTHESES,
    measure=measure,
    lesson=Text(
        "A dot product of d_k independent terms of variance 1 has the variance d_k. So the wider "
        "a head, the further apart its logits, and softmax turns from a mixture into a choice. "
        "Dividing by √d_k gives every head the same spread, whatever its width.",
        "d_k 个方差为 1 的独立项之和，其方差为 d_k。因此头越宽，logits 相差越大，softmax "
        "就从“加权混合”变成“只选一个”。除以 √d_k，使任何宽度的头都有同样的离散程度。",
    ),
)
