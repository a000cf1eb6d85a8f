"""Question 5: what is multi-head attention, as mathematics, and does it perform better?"""

import jax
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import tfm
from experiments.claims import drawing, study
from experiments.claims.evidence import Budget, Claim, Estimate, Hypothesis, Text, exact, paired_t
from experiments.reporting import style
from tfm.training import init_params

D_MODEL, LENGTH = 32, 6
HEADS = (1, 2, 4, 8)  # of the formula's check
MANY = 4  # heads of the trained model; d_k is then 16 of 64 features

HYPOTHESES = {
    "formula": Hypothesis(
        Text("The fused product is the printed formula: Concat(head₁, …, head_h)W^O.",
             "融合计算与公式 Concat(head₁, …, head_h)W^O 一致。"),
        "largest |error| against a literal loop over the heads, h = 1 … 8", bound=1e-5),
    "one_head": Hypothesis(
        Text("With h = 1 it is one attention between two projections.",
             "h = 1 时，它就是一次普通注意力加两侧投影。"),
        "largest |error|", bound=1e-5),
    "full_rank": Hypothesis(
        Text("A trained head uses all d_k dimensions of its subspace.",
             "训练后的每个头都用到其子空间的全部 d_k 维。"),
        "effective rank of W_Qᵢ and W_Kᵢ over d_k, mean of the heads", 0.75),
    "apart": Hypothesis(
        Text("Trained heads look at different subspaces: they overlap less than random ones.",
             "训练后的各头关注不同子空间：重叠小于随机子空间。"),
        "overlap of random subspaces minus that of trained heads' W_Q and W_K (1: the same "
        "subspace)", 0.02),
    "better": Hypothesis(
        Text("It performs better than one head of the same size (h = 4 against 1).",
             "它优于同样大小的单头（h = 4 对 1）。"),
        "validation loss with 1 head minus with 4, nats a sound", 0.02),
}  # fmt: skip


def _literal(x: Array, w_q: Array, w_k: Array, w_v: Array, w_o: Array, heads: int) -> np.ndarray:
    """headᵢ = softmax(xWᵢ^Q (xWᵢ^K)ᵀ/√d_k) xWᵢ^V, concatenated, times W^O; float64."""
    x, w_q, w_k, w_v, w_o = (np.asarray(a, np.float64) for a in (x, w_q, w_k, w_v, w_o))
    d_k, parts = w_q.shape[1] // heads, []
    for i in range(heads):
        columns = slice(i * d_k, (i + 1) * d_k)
        q, k, v = (x @ w[:, columns] for w in (w_q, w_k, w_v))
        logits = q @ k.T / np.sqrt(d_k)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        parts.append(weights / weights.sum(1, keepdims=True) @ v)
    return np.concatenate(parts, 1) @ w_o


def _formula_errors(seed: int) -> dict[str, float]:
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (LENGTH, D_MODEL))
    weights = [jax.random.normal(key, (D_MODEL, D_MODEL)) / D_MODEL**0.5 for key in keys[1:]]

    def error(heads: int, expected: np.ndarray) -> float:
        return float(np.abs(tfm.multi_head_attention(x, x, *weights, heads) - expected).max())

    w_q, w_k, w_v, w_o = weights
    one = tfm.scaled_dot_product_attention(*((x @ w)[None] for w in (w_q, w_k, w_v)))[0] @ w_o
    return {
        "formula": max(error(heads, _literal(x, *weights, heads)) for heads in HEADS),
        "one_head": error(1, np.asarray(one)),
    }


def overlap(w: np.ndarray, heads: int) -> float:
    """Mean squared cosine of the principal angles between every two heads' column spaces.

    1 where they span the same subspace; d_k/D is expected of random ones.
    """
    bases = [np.linalg.qr(part)[0] for part in np.split(np.asarray(w, np.float64), heads, 1)]
    pairs = zip(*np.triu_indices(heads, 1), strict=True)
    d_k = bases[0].shape[1]
    return float(np.mean([np.square(bases[i].T @ bases[j]).sum() / d_k for i, j in pairs]))


def effective_rank(w: np.ndarray, heads: int) -> float:
    """exp(entropy of the normalised singular values) over d_k, mean of the heads (Roy 2007)."""
    shares = []
    for part in np.split(np.asarray(w, np.float64), heads, 1):
        values = np.linalg.svd(part, compute_uv=False)
        p = values / values.sum()
        shares.append(np.exp(-(p * np.log(np.maximum(p, 1e-30))).sum()) / len(p))
    return float(np.mean(shares))


def _projections(params: dict) -> list[np.ndarray]:
    """W_Q and W_K of every attention in one model."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return [leaf for path, leaf in flat if path[-1].key in ("w_q", "w_k")]


def _train(budget: Budget) -> tuple[dict[int, np.ndarray], list[dict], list[dict]]:
    """h -> validation losses [seeds]; and the parameters with `MANY` heads, trained and fresh."""
    task, steps = study.pronunciation(), budget.steps(500)
    losses = {}
    for heads in (1, MANY):
        model = tfm.Transformer(task.config(num_heads=heads))
        trainee = study.Trainee(model, study.optimizer(steps))
        trained = study.train(budget, task, lambda trainee=trainee: trainee, steps)
        losses[heads] = trained.probes["loss"][0, :, 0]
    seeds = range(len(losses[MANY]))
    after = [jax.tree.map(lambda leaf, i=i: leaf[0, i], trained.params) for i in seeds]
    keys = [jax.random.PRNGKey(budget.first_seed + i) for i in seeds]
    return losses, after, [init_params(model, jax.random.split(key)[0]) for key in keys]


def _draw(losses: dict, overlaps: dict, ranks: dict, chance: float) -> Figure:
    figure, (quality, apart, rank) = style.panels("Quality", "Overlap of heads", "Rank")
    drawing.points(quality, {f"h = {heads}": values for heads, values in losses.items()})
    style.label(quality, "at d_model 64", "validation loss, nats a sound")
    drawing.points(apart, overlaps)
    style.level(apart, chance, "random subspaces")
    style.label(apart, f"W_Q, W_K of {MANY} heads", "mean squared cosine")
    drawing.points(rank, ranks)
    rank.set_ylim(0, 1.05)
    style.level(rank, HYPOTHESES["full_rank"].threshold, "δ")
    style.label(rank, f"W_Q, W_K of {MANY} heads", "effective rank / d_k")
    return figure


def measure(budget: Budget) -> tuple[dict[str, Estimate], Figure]:
    """The formula; then 1 head against 4, and what the 4 have learned to look at."""
    losses, trained, fresh = _train(budget)
    times = {"before training": fresh, "after": trained}

    def each(function) -> dict[str, list[float]]:
        return {
            name: [np.mean([function(w, MANY) for w in _projections(params)]) for params in models]
            for name, models in times.items()
        }

    overlaps, ranks, chance = each(overlap), each(effective_rank), 1 / MANY
    errors = _formula_errors(budget.first_seed)
    estimates = {name: exact(error) for name, error in errors.items()} | {
        "full_rank": paired_t(ranks["after"]),
        "apart": paired_t(chance - np.array(overlaps["after"])),
        "better": paired_t(losses[1] - losses[MANY]),
    }
    return estimates, _draw(losses, overlaps, ranks, chance)


CLAIM = Claim(
    id="multihead",
    question=Text("What is multi-head attention, as mathematics, and does it perform better?",
                  "多头注意力机制如何在数学上被实现，它如何改进自注意力机制的性能？"),
    formula="MultiHead(Q, K, V) = Concat(head₁, …, head_h) W^O",
    function=tfm.multi_head_attention,
    hypotheses=HYPOTHESES,
    measure=measure,
    lesson=Text(
        "Each head projects the input to its own d_k dimensions, attends there, and W^O mixes the "
        "results. Whether the heads come to look at different subspaces is up to training: the "
        "formula allows it, and nothing in it demands it.",
        "每个头把输入投影到自己的 d_k 维空间，在其中做注意力，最后由 W^O 混合结果。"
        "各头是否关注不同子空间取决于训练：公式允许，但并不要求。",
    ),
)  # fmt: skip
