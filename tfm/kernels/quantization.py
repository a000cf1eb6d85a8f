"""Matrices in 8 bits, for decoding: a quarter of the bytes to read, and products of integers."""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import Array, lax

LEVELS = 127  # -127 … 127: as far from zero on both sides

MATRICES = {"w_q", "w_k", "w_v", "w_o", "w1", "w2"}


@flax.struct.dataclass
class Quantized:
    """A matrix [I, O] in 8 bits: column o is about values[o] · scale[o].

    It lies transposed, as a product with few rows wants it; `precision.linear` takes it.
    """

    values: Array  # int8 [O, I]
    scale: Array  # f32 [O, 1]

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.values.shape
        return inputs, outputs


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """x ≈ values · scale: each row in steps of its own, max|x|/127.

    x: [N, I] -> int8 [N, I] and [N, 1]. A row of zeros has the scale 0.
    """
    scale = jnp.abs(x).max(-1, keepdims=True) / LEVELS
    return jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale


def quantized_linear(x: Array, w: Quantized) -> Array:
    """x w, where the rows of x are rounded to 8 bits too, each when it comes (dynamically).

    Integers are multiplied and summed without error, so the rounding of x and w is all that is
    lost. It has no gradient to speak of: it is for a trained model.

    x: [N, I], w: [I, O] -> [N, O]
    """
    values, scale = quantize_rows(x)
    axes = (((1,), (1,)), ((), ()))
    products = lax.dot_general(w.values, values, axes, preferred_element_type=jnp.int32)
    return (products * w.scale).T * scale


def quantize(params: Any) -> Any:
    """The parameters of a `tfm.Transformer` with its matrices in 8 bits.

    What takes parameters takes these too: `model.apply`, `start_decoding`. Embeddings, norms and
    biases stay as they are; the matrix of the output becomes one of its own. Attention's products
    of queries, keys and values are those of `compute_dtype`.
    """

    def transposed(w: Array) -> Quantized:
        return Quantized(*quantize_rows(w))

    def walk(tree: dict[str, Any]) -> dict[str, Any]:
        return {name: part(name, value) for name, value in tree.items()}

    def part(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return walk(value)
        return transposed(value.T) if name in MATRICES else value

    output = params["output"].T if "output" in params else params["embedding"]
    return walk(params) | {"output": transposed(output)}
