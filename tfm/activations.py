"""What a model computes on its way: to be seen, and to be replaced."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
from jax import Array

from tfm.config import TransformerConfig
from tfm.model import Transformer
from tfm.shapes import ArrayTree

OF_ATTENTION = ("queries", "keys", "values", "attention_weights", "head_outputs", "output")


def activation_names(config: TransformerConfig) -> list[str]:
    """The names that `activations` knows, in the order in which a model of that config computes
    them. After a layer's name:

        attention/queries, keys, values, head_outputs: [..., H, L, d_k]; self_attention/… and
          cross_attention/… in the decoder
        attention/attention_weights: [..., H, L, K], after the softmax
        attention/output: [..., L, D], Concat(head₁, …, head_h) W^O, the sub-layer's output
        feed_forward: [..., L, D], the sub-layer's output
        after_attention, after_cross_attention, after_feed_forward: [..., L, D], the residual
          stream behind each sub-layer; post-norm it is normalised

    and of the model as a whole source_embedded, target_embedded and logits.
    """
    kinds = {
        "encoder": (config.num_encoder_layers, ("attention",)),
        "decoder": (config.num_decoder_layers, ("self_attention", "cross_attention")),
    }
    names = []
    for side, (layers, attentions) in kinds.items():
        names.append("source_embedded" if side == "encoder" else "target_embedded")
        for layer in (f"{side}_{i}" for i in range(layers)):
            for attention in attentions:
                names += [f"{layer}/{attention}/{method}" for method in OF_ATTENTION]
                names.append(f"{layer}/after_{attention.removeprefix('self_')}")
            names += [f"{layer}/feed_forward", f"{layer}/after_feed_forward"]
    return [*names, "logits"]


def activations(
    model: Transformer,
    params: ArrayTree,
    source: Array,
    target: Array,
    *,
    names: Sequence[str] = ("*",),
    patch: Mapping[str, Callable[[Array], Array]] | None = None,
    **options: Any,
) -> tuple[dict[str, Array], Any]:
    """What the model computes on its way, by name, and its output.

        seen, logits = activations(model, params, source, target, names=["decoder_*/feed_forward"])
        silence = {"encoder_0/attention/head_outputs": lambda x: x.at[..., 2, :, :].set(0)}
        _, logits = activations(model, params, source, target, names=[], patch=silence)

    A pure function of its arguments, for `jax.jit`, `jax.vmap` and `jax.grad` like the others; it
    is traced anew at each call, so a patch may be made for one. The first line is a look at what
    each feed-forward network of the decoder adds, the others silence a head.

    Args:
      params: the model's parameters.
      source, target, options: as `Transformer.__call__` takes them.
      names: of `activation_names(model.config)`, or patterns of them (`decoder_*/feed_forward`).
      patch: name or pattern -> a function of what is computed there; what it returns goes on in its
        place, and is what is seen.

    Returns:
      {name: array} in the order of computation, and what the model returns.

    Raises:
      ValueError: a name that fits none; the message lists those that there are. Or scan_layers,
        whose layers have no names.
      TypeError: names that are one string; a patch that is no function, or returns another shape or
        type; the message has both.
    """
    config = model.config
    if config.scan_layers:
        raise ValueError("scan_layers=True: one loop has no layers to name; set scan_layers=False")
    if isinstance(names, str):
        raise TypeError(f"names={names!r} must be a list of names: [{names!r}]")
    for name, function in (patch or {}).items():
        if not callable(function):
            raise TypeError(f"the patch of {name} must be a function: lambda x: value")
    wanted = {name for pattern in names for name in _matching(pattern, config)}
    patches = {n: f for pattern, f in (patch or {}).items() for n in _matching(pattern, config)}
    seen: dict[str, Array] = {}

    def intercept(next_function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        value = next_function(*args, **kwargs)
        method = () if context.method_name == "__call__" else (context.method_name,)
        name = "/".join((*context.module.path, *method))
        if name in patches:
            value = _patched(name, value, patches[name])
        if name in wanted:
            seen[name] = value
        return value

    # Computed again in the backward pass, what is seen could not leave it.
    plain = Transformer(dataclasses.replace(config, rematerialize="nothing"), model.functions)
    # The weights are computed apart where they are asked for, and not within a fused attention.
    in_view = any(name.endswith("attention_weights") for name in wanted | patches.keys())
    asked = options.pop("return_weights", False)
    with nn.intercept_methods(intercept):
        output: Any = plain.apply(
            {"params": params}, source, target, return_weights=asked or in_view, **options
        )
    return seen, output[0] if in_view and not asked else output


def _matching(pattern: str, config: TransformerConfig) -> list[str]:
    known = activation_names(config)
    if found := fnmatch.filter(known, pattern):
        return found
    close = difflib.get_close_matches(pattern, known, n=3)
    meant = f"; did you mean {' or '.join(close)}?" if close else ";"
    raise ValueError(f"no activation is named {pattern!r}{meant} there are {', '.join(known)}")


def _patched(name: str, value: Array, function: Callable[[Array], Array]) -> Array:
    result = function(value)
    if not hasattr(result, "shape"):
        kind = type(result).__name__
        raise TypeError(f"the patch of {name} returned {kind}, not {value.dtype} {value.shape}")
    if (result.shape, result.dtype) != (value.shape, value.dtype):
        raise TypeError(
            f"the patch of {name} returned {result.dtype} {result.shape}, not {value.dtype} "
            f"{value.shape}"
        )
    return result
