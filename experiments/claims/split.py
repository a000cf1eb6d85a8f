"""Question 8: how is d_model split into heads?"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import tfm
from experiments.claims.evidence import Budget, Claim, Estimate, Hypothesis, Text, exact
from experiments.reporting import style
from tfm.kernels.softmax import masked_softmax
from tfm.training import param_shapes

D_MODEL, BATCH, LENGTH = 64, 2, 16
HEADS = (1, 2, 4, 8, 16)

HYPOTHESES = {
    "inverse": Hypothesis(
        Text("Splitting and merging again is the identity: merge(split(x)) = x.",
             "先拆分再合并等于原样：merge(split(x)) = x。"),
        "largest |change|, over h", bound=1e-30),
    "contiguous": Hypothesis(
        Text("Head i holds the features i·d_k … (i + 1)·d_k − 1, with d_k = d_model/h.",
             "第 i 个头保存第 i·d_k 到 (i + 1)·d_k − 1 维，d_k = d_model/h。"),
        "largest |difference|, over h", bound=1e-30),
    "parameters": Hypothesis(
        Text("The number of parameters is the same for every h.", "参数数量与头数 h 无关。"),
        "largest relative difference from h = 1", bound=1e-9),
    "products": Hypothesis(
        Text("The matrix products' work is the same for every h.", "矩阵乘法的计算量与 h 无关。"),
        "largest relative difference from h = 1 of the compiled program's FLOPs, less those of "
        "its softmax", bound=1e-9),
    "softmax": Hypothesis(
        Text("The softmax's work grows with h: h·L² exponentials.",
             "softmax 的计算量随 h 增长：共 h·L² 次指数运算。"),
        "largest relative difference from h·L² a row of the compiled program's exponentials",
        bound=1e-9),
    "refused": Hypothesis(
        Text("An h that does not divide d_model is refused, and both numbers are named.",
             "不能整除 d_model 的 h 会被拒绝，并指明两个数。"),
        "share of such h that are let through or not named", bound=1e-9),
}  # fmt: skip


def _compiled(function: Callable[..., Array], *shapes: tuple[int, ...]) -> dict[str, float]:
    """The compiler's own count of the work in `function` of f32 arrays of these shapes."""
    # Always for the CPU, so that the counts do not depend on the machine.
    with jax.default_device(jax.devices("cpu")[0]):
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.jit(function).lower(*arrays).compile().cost_analysis()


def _work(heads: int) -> tuple[float, float]:
    """(FLOPs of the products, exponentials) of one self-attention, from its compiled program.

    The division by √d_k counts as the softmax's; it is done to the queries.
    """

    def attention(x: Array, *weights: Array) -> Array:
        return tfm.multi_head_attention(x, x, *weights, heads)

    def divide(query: Array) -> Array:
        return query / (D_MODEL // heads) ** 0.5

    rows = (BATCH, LENGTH, D_MODEL)
    whole = _compiled(attention, rows, *[(D_MODEL, D_MODEL)] * 4)
    softmax = _compiled(masked_softmax, (BATCH, heads, LENGTH, LENGTH))
    products = whole["flops"] - softmax["flops"] - _compiled(divide, rows)["flops"]
    return products, whole["transcendentals"]


def _parameters(heads: int) -> int:
    config = tfm.TransformerConfig(vocab_size=50, d_model=D_MODEL, d_ff=128, num_heads=heads,
                                   num_encoder_layers=1, num_decoder_layers=1)  # fmt: skip
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))


def _let_through() -> float:
    """The share of h in 0 … 2·d_model that do not divide d_model and are not refused by name."""
    wrong = [h for h in range(2 * D_MODEL + 1) if h == 0 or D_MODEL % h]
    missed = 0
    for heads in wrong:
        try:
            tfm.split_heads(jnp.zeros((LENGTH, D_MODEL)), heads)
            missed += 1
        except ValueError as error:
            missed += not (f"={heads} " in str(error) and f"={D_MODEL}" in str(error))
    return missed / len(wrong)


def _shapes(seed: int) -> dict[str, float]:
    x = jax.random.normal(jax.random.key(seed), (BATCH, LENGTH, D_MODEL))
    inverse = contiguous = 0.0
    for heads in HEADS:
        split, d_k = tfm.split_heads(x, heads), D_MODEL // heads
        inverse = max(inverse, float(jnp.abs(tfm.merge_heads(split) - x).max()))
        for i in range(heads):
            part = x[..., i * d_k : (i + 1) * d_k]
            contiguous = max(contiguous, float(jnp.abs(split[:, i] - part).max()))
    return {"inverse": inverse, "contiguous": contiguous}


def _draw(work: dict[int, tuple[float, float]], parameters: dict[int, int]) -> Figure:
    figure, (same, grows) = style.panels("The same for every h", "Grows with h")
    names = [f"{h}" for h in HEADS]
    for i, (text, counts) in enumerate(
        (("parameters of a model", [parameters[h] for h in HEADS]),
         ("products' FLOPs of one attention", [work[h][0] for h in HEADS]))
    ):  # fmt: skip
        places = np.arange(len(HEADS)) + 0.38 * i
        same.bar(places, np.array(counts) / counts[0], 0.36, color=style.LINES[i], label=text)
    same.set_xticks(np.arange(len(HEADS)) + 0.19, names)
    same.set_ylim(0, 1.5)
    style.legend(same)
    style.label(same, f"heads h at d_model {D_MODEL}", "relative to h = 1")
    grows.bar(names, [work[h][1] for h in HEADS], 0.6, color=style.LINES[2])
    style.label(grows, f"heads h at d_model {D_MODEL}", f"exponentials ({BATCH} rows, L = 16)")
    return figure


def measure(budget: Budget) -> tuple[dict[str, Estimate], Figure]:
    """Counts, and bitwise comparisons."""
    work = {heads: _work(heads) for heads in HEADS}
    parameters = {heads: _parameters(heads) for heads in HEADS}
    errors = _shapes(budget.first_seed) | {
        "parameters": max(abs(n / parameters[1] - 1) for n in parameters.values()),
        "products": max(abs(products / work[1][0] - 1) for products, _ in work.values()),
        "softmax": max(abs(e / (BATCH * h * LENGTH**2) - 1) for h, (_, e) in work.items()),
        "refused": _let_through(),
    }
    return {name: exact(error) for name, error in errors.items()}, _draw(work, parameters)


CLAIM = Claim(
    id="split",
    question=Text("How is d_model split into heads?",
                  "Transformer 模型中多头注意力机制的维度拆分是如何实现的？"),
    formula="d_k = d_model/h",
    function=tfm.split_heads,
    hypotheses=HYPOTHESES,
    measure=measure,
    lesson=Text(
        "Splitting is a matter of bookkeeping: the features of a position are cut into h equal "
        "pieces, and each head works on its own. Nothing is added or lost, so parameters and "
        "matrix products stay the same; only the softmax has h times as many rows to normalise.",
        "拆分只是重新编排：每个位置的特征被切成 h 份，每个头处理自己的一份。既不增加也不丢失，"
        "因此参数和矩阵乘法的量不变；只有 softmax 要归一化的行数变为 h 倍。",
    ),
)  # fmt: skip
