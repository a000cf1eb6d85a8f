"""§3.1 The stack of N layers, one after another or as one loop of the program."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tfm.compilation import compiled
from tfm.functions import Functions
from tfm.layers import DecoderLayer, EncoderLayer
from tfm.sublayers import Flag

LAYERS = EncoderLayer, DecoderLayer
REMAT_LAYERS = nn.remat(EncoderLayer), nn.remat(DecoderLayer)
"""Each computed again in the backward pass."""


def apply_stack(
    layers: Sequence[EncoderLayer] | Sequence[DecoderLayer],
    x: Array,
    context: tuple[Array, ...],
    own: tuple[Any, ...],
    return_weights: bool,
) -> tuple[Array, list[Any]]:
    """x through N layers, and their attention weights [N, ...] of each kind, or None.

    context: what every layer gets: masks, positions, and in the decoder the encoder's output.
    own: of each further argument one a layer: N dropout keys, head masks [N, H], or N times None.
    """
    if layers[0].config.scan_layers and not layers[0].is_initializing():
        one = type(layers[0])(layers[0].config, layers[0].functions, parent=None)
        params = jax.tree.map(lambda *p: jnp.stack(p), *(x.variables["params"] for x in layers))
        each = params, *(None if a[0] is None else jnp.stack(a) for a in own)
        return _scan(x, context, each, model=one, return_weights=return_weights)
    layer_weights = []
    for layer, *arguments in zip(layers, *own, strict=True):
        x, *weights = layer(x, *context, *arguments, Flag(return_weights))
        layer_weights.append(weights)
    return x, jax.tree.map(lambda *w: jnp.stack(w), *layer_weights)


def uses_our_functions(*_: Any, model: Any, **__: Any) -> bool:
    """Whether a model has no `Functions` of its own, which may be made anew for each call."""
    return model.functions == Functions()


@compiled(static=("model", "return_weights"), compile_if=uses_our_functions)
def _scan(
    x: Array,
    context: tuple[Array, ...],
    each: tuple[Any, ...],
    *,
    model: nn.Module,
    return_weights: bool,
) -> tuple[Array, list[Any]]:
    """x through layers whose parameters and own arguments are stacked; and their weights."""

    def apply(x: Array, own: tuple[Any, ...]) -> tuple[Array, list[Any]]:
        params, *arguments = own
        flag = Flag(return_weights)
        applied: Any = model.apply({"params": params}, x, *context, *arguments, flag)
        x, *weights = applied
        return x, weights

    return jax.lax.scan(apply, x, each)
