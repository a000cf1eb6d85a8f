"""When the public functions are compiled."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import numpy as np
from jax import lax

from tfm.shapes import is_traced


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit(function, **options)`, but inside another compiled function the function itself.

    A jit inside a jit is a call, which XLA opens up only after it has simplified both sides: on a
    CPU a training step in bf16 then takes 5 % longer.
    """
    alone = jax.jit(function, **options)

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return (function if _is_inside_jit(arguments, named) else alone)(*arguments, **named)

    return call


def compiled_if(
    can_be_kept: Callable[..., bool], function: Callable[..., Any]
) -> Callable[..., Any]:
    """`compiled` of a function whose keyword-only arguments are static, where `can_be_kept` of all
    its arguments; else the function itself.

    What is compiled keeps its static arguments for ever: functions that are made anew each time,
    and all that they hold, would pile up.
    """
    kept = compiled(function, static_argnames=inspect.getfullargspec(function).kwonlyargs)

    @wraps(function)
    def call(*arguments: Any, **static: Any) -> Any:
        chosen = kept if can_be_kept(*arguments, **static) else function
        return chosen(*arguments, **static)

    return call


def _is_inside_jit(*arguments: Any) -> bool:
    """Whether an argument is traced, and not only differentiated or vmapped: what JAX computes from
    constants is traced inside of `jax.jit` alone."""
    return any(map(is_traced, jax.tree.leaves(arguments))) and is_traced(lax.neg(np.int32(0)))
