"""When the public functions are compiled."""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import jax
import numpy as np
from jax import lax
from jax.extend.core import get_opaque_trace_state

from tfm.shapes import is_traced

P = ParamSpec("P")
R = TypeVar("R")
Result = TypeVar("Result", covariant=True)


class Compiled(Protocol[P, Result]):
    """A function as `jax.jit` makes it: it is called, or lowered to look at its program."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result: ...

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Lowered: ...


def compiled(
    *,
    static: Sequence[str] = (),
    check: Callable[..., None] | None = None,
    compile_if: Callable[..., bool] | None = None,
) -> Callable[[Callable[P, R]], Compiled[P, R]]:
    """`jax.jit` of a function where it is defined; inside another compiled function itself.

    A jit inside a jit is a call, which XLA opens up only after it has simplified both sides: on a
    CPU a training step in bf16 then takes 5 % longer.

    Args:
      static: names of the arguments that are no arrays; each value of theirs compiles anew.
      check: is called first, with the same arguments, and raises what needs their values, which a
        compiled function has not (a rate, an id).
      compile_if: whether to compile for these arguments. What is compiled keeps its static
        arguments for ever: functions that are made anew each time, and all that they hold, would
        pile up.
    """

    def decorate(function: Callable[P, R]) -> Compiled[P, R]:
        alone = jax.jit(function, static_argnames=static)
        signature = inspect.signature(function)
        places = [i for i, name in enumerate(signature.parameters) if name in static]

        def ask(question: Callable[..., Any] | None, args: Any, kwargs: Any) -> Any:
            try:
                return question is None or question(*args, **kwargs)
            except TypeError:
                signature.bind(*args, **kwargs)  # where arguments are missing, says which
                raise

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            args = tuple(_number(x) if i in places else x for i, x in enumerate(args))
            kwargs = {name: _number(x) if name in static else x for name, x in kwargs.items()}
            ask(check, args, kwargs)
            plain = _is_inside_jit() or not ask(compile_if, args, kwargs)
            try:
                return (function if plain else alone)(*args, **kwargs)
            except TypeError as error:
                if "forward-mode" not in str(error):
                    raise
                raise TypeError(
                    f"{function.__name__}: its kernels have derivatives in reverse mode alone; "
                    "for jax.jvp and jax.linearize set implementation='formula', of a model "
                    "TransformerConfig(implementation='formula')"
                ) from None

        vars(call)["lower"] = alone.lower
        return cast(Compiled[P, R], call)

    return decorate


def _number(x: Any) -> Any:
    """A size that comes as an array without axes, as a number: arrays are not hashable."""
    is_one = isinstance(x, jax.Array | np.ndarray) and x.ndim == 0 and not is_traced(x)
    return x.item() if is_one else x


with jax.ensure_compile_time_eval():  # so that it is that of the prompt wherever we are imported
    _AT_THE_PROMPT = get_opaque_trace_state(convention="tfm")


def _is_inside_jit() -> bool:
    """Whether what is computed now is traced for a program, and not only differentiated or vmapped:
    what JAX computes from constants is traced inside of `jax.jit` alone."""
    if get_opaque_trace_state(convention="tfm") == _AT_THE_PROMPT:  # a hundredth of the time
        return False
    return is_traced(lax.neg(np.int32(0)))
