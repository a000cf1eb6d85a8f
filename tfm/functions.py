"""What the model computes with, and what a user puts in the place of a part of it."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from tfm.attention import attention_weights
from tfm.feed_forward import feed_forward
from tfm.normalization import layer_norm
from tfm.positions import sinusoidal_positions

Replacement = Callable[..., Any]
"""A function, or a linen module class (or a `functools.partial` of one)."""


@dataclasses.dataclass(frozen=True)
class Functions:
    """The functions that the layers call. Put another in the place of one to study it:

        Transformer(config, Functions(feed_forward=mine))

    A function has the signature of the one that it replaces: it gets the same parameters, so a
    trained checkpoint fits either. A linen module class has parameters of its own in the place of
    ours. It is made with the config, for each layer one, and called without weights:

        attention_weights: module(query, key, mask)
        feed_forward, layer_norm: module(x)
        sinusoidal_positions: module(positions, d_model)

    Of the options only those need be there that the config sets apart from the default. A
    replacement of `attention_weights` that names them also gets

        query_positions, key_positions: [..., L] and [..., K], with as many axes as a batch of
          sequences has: where each query and key stands in its sequence, in training, in packed
          rows and in decoding alike. In decoding the queries are the hypotheses of one position,
          and the keys those of all hypotheses.
        kind: "encoder", "decoder" or "cross".

    Parameters are divided over a mesh by their names (`tfm.parallel.sharding.PARAM_LOGICAL_AXES`);
    one of another name is not divided.

    Raises:
      TypeError: what is neither; and, once the model is applied, one that does not take the
        arguments or returns something of another shape, with its layer.
    """

    attention_weights: Replacement = attention_weights
    feed_forward: Replacement = feed_forward
    layer_norm: Replacement = layer_norm
    sinusoidal_positions: Replacement = sinusoidal_positions

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if wrong := _what_is_wrong(getattr(self, field.name)):
                raise TypeError(f"Functions({field.name}=…): {wrong}")


def _what_is_wrong(given: Any) -> str | None:
    if isinstance(given, nn.Module):
        kind = type(given).__name__
        return f"must be the class {kind}, not a module made of it; partial({kind}, …) sets fields"
    if not callable(given):
        return f"must be a function or a linen module class, not {type(given).__name__}"
    made = _whole(given)
    if _is_module_class(made) and "config" not in {f.name for f in dataclasses.fields(made)}:
        return (
            f"{made.__name__} must have a field config: tfm.TransformerConfig, with which it is "
            "made; call a ready module in one of yours"
        )
    return None


def _whole(given: Replacement) -> Any:
    """What a `functools.partial` is of."""
    return getattr(given, "func", given)


def _is_module_class(made: Any) -> bool:
    return inspect.isclass(made) and issubclass(made, nn.Module)


def own_module(owner: Any, name: str) -> nn.Module | None:
    """The module that a class in the place of function `name` makes; None of a function."""
    given = getattr(owner.functions, name)
    if not _is_module_class(_whole(given)):
        return None
    return given(config=owner.config)


def call(
    owner: Any,
    name: str,
    arguments: tuple[Any, ...],
    shape: tuple[int, ...],
    module: nn.Module | None = None,
    options: Mapping[str, Any] | None = None,
    how: Mapping[str, Any] | None = None,
    **offered: Any,
) -> Array:
    """The function `name` of a model, or the module in its place, of these arguments.

    Args:
      owner: the module that calls, whose `functions` are called.
      shape: of the result.
      options: keyword arguments that it must take.
      how: those that it gets if its signature names them, or has a `**` for them.
      offered: those that it gets if its signature names them.
    """
    given = getattr(owner.functions, name)
    takes = inspect.signature(given if module is None else type(module).__call__)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in takes.parameters.values())
    kwargs = {k: x for k, x in offered.items() if k in takes.parameters} | dict(options or {})
    apart = {k: x for k, x in (how or {}).items() if x != "auto"}  # which is the default of all
    kwargs |= {k: x for k, x in apart.items() if takes_all or k in takes.parameters}
    if given is getattr(Functions, name):
        return given(*arguments, **kwargs)
    where = f"{'/'.join(owner.path) or 'the model'}: Functions.{name}={_named(given)}"
    try:
        takes.bind(*([] if module is None else [module]), *arguments, **kwargs)
    except TypeError as error:
        may = f", and it may name {', '.join(offered)}" if offered else ""
        raise TypeError(f"{where}: {error}; its signature is {takes}{may}") from None
    try:
        result = (given if module is None else module)(*arguments, **kwargs)
    except Exception as error:
        error.add_note(f"in {where}")
        raise
    form = getattr(result, "shape", None)
    if form != shape or not jnp.issubdtype(result.dtype, jnp.floating):
        kind = type(result).__name__ if form is None else f"{result.dtype} {form}"
        of = ", ".join(
            f"{x.dtype} {x.shape}" if hasattr(x, "shape") else repr(x) for x in arguments
        )
        message = f"returned {kind}, not floating numbers {shape}; it was given {of}"
        raise TypeError(f"{where}: {message}")
    return result


def _named(given: Replacement) -> str:
    return getattr(_whole(given), "__qualname__", repr(given))
