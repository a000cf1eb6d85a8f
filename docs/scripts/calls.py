"""Single calls as a notebook makes them, un-jitted and in `jax.jit`.

    python -m docs.scripts.calls

Beside each stands what flax linen takes for the same work, and torch (eager) where it is installed:
milliseconds of a call after the first ones, and how many programs ten calls compiled.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import tfm
from experiments.bench.contenders import installed
from experiments.reporting.tables import table

SIZES = ((2, 10, 64, 4), (32, 64, 512, 8))  # B, L, D, H
WORDS, SECONDS, WARM_UP, LAST = 1000, 0.5, 5, 10
Call = Callable[[], Any]

_compilations = 0


@jax.monitoring.register_event_duration_secs_listener
def _count(event: str, _: float, **__: Any) -> None:
    global _compilations
    _compilations += event == "/jax/core/compile/backend_compile_duration"


def measure(call: Call) -> tuple[float, int]:
    """Median milliseconds of a call, and compilations in the last `LAST` calls."""
    for _ in range(WARM_UP):
        jax.block_until_ready(call())
    times: list[float] = []
    while sum(times) < SECONDS:
        before = _compilations
        for _ in range(LAST):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times), _compilations - before


def _arrays(rows: int, length: int, d_model: int, heads: int) -> dict[str, Any]:
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    return {
        "x": normal(0, rows, length, d_model),
        "q": normal(1, rows, heads, length, d_model // heads),
        "w": normal(2, 4, d_model, d_model) / d_model**0.5,
        "w1": normal(3, d_model, 4 * d_model) / d_model**0.5,
        "w2": normal(4, 4 * d_model, d_model) / d_model**0.5,
        "b1": jnp.zeros(4 * d_model),
        "b": jnp.zeros(d_model),
        "table": normal(5, WORDS, d_model) / d_model**0.5,
        "ids": jax.random.randint(jax.random.key(6), (rows, length), 0, WORDS),
        "z": normal(7, rows, length, WORDS),
    }


def ours(a: dict[str, Any], heads: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    network = a["x"], a["w1"], a["b1"], a["w2"], a["b"]

    def attend(x, w):
        return tfm.multi_head_attention(x, x, *w, num_heads=heads)

    return {
        "attention": (tfm.scaled_dot_product_attention, (a["q"], a["q"], a["q"])),
        "multi-head attention": (attend, (a["x"], a["w"])),
        "its gradient (x, W)": (_gradient(attend), (a["x"], a["w"])),
        "feed-forward": (tfm.feed_forward, network),
        "its gradient (x, W, b)": (_gradient(tfm.feed_forward), network),
        "layer norm": (tfm.layer_norm, (a["x"], a["b"], a["b"])),
        "dropout": (lambda x: tfm.dropout(jax.random.key(8), x, 0.1), (a["x"],)),
        "embedding": (lambda t: tfm.embed(a["ids"], t), (a["table"],)),
        "loss": (lambda z: tfm.label_smoothed_cross_entropy(z, a["ids"]), (a["z"],)),
    }


def _gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """By all arguments."""

    def gradient(*arguments):
        total = lambda *x: function(*x).sum()  # noqa: E731
        return jax.grad(total, argnums=tuple(range(len(arguments))))(*arguments)

    return gradient


def linen(a: dict[str, Any], heads: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """What flax linen has of these; the loss is optax's."""
    nn, key, x = flax.linen, jax.random.key(8), a["x"]
    q = jnp.swapaxes(a["q"], 1, 2)
    attention = nn.MultiHeadAttention(num_heads=heads, use_bias=False)
    network = nn.Sequential([nn.Dense(a["w1"].shape[1]), nn.relu, nn.Dense(x.shape[-1])])
    norm, dropout = nn.LayerNorm(), nn.Dropout(0.1, deterministic=False)
    table = nn.Embed(WORDS, x.shape[-1])

    def loss(z):
        smooth = optax.smooth_labels(jax.nn.one_hot(a["ids"], WORDS), 0.1)
        return optax.softmax_cross_entropy(z, smooth)

    def with_params(module, x):
        return module.apply, (module.init(key, x), x)

    attend, network = with_params(attention, x), with_params(network, x)
    return {
        "attention": (nn.dot_product_attention, (q, q, q)),
        "multi-head attention": attend,
        "its gradient (x, W)": (_gradient(attend[0]), attend[1]),
        "feed-forward": network,
        "its gradient (x, W, b)": (_gradient(network[0]), network[1]),
        "layer norm": with_params(norm, x),
        "dropout": (lambda x: dropout.apply({}, x, rngs={"dropout": key}), (x,)),
        "embedding": (lambda p: table.apply(p, a["ids"]), (table.init(key, a["ids"]),)),
        "loss": (loss, (a["z"],)),
    }


def torch_calls(a: dict[str, Any], heads: int) -> dict[str, Call]:
    """The same by torch, eager."""
    import numpy as np
    import torch
    from torch.nn import functional

    t = {name: torch.tensor(np.asarray(value)) for name, value in a.items()}
    x, ids, d_model = t["x"], t["ids"].long(), a["x"].shape[-1]
    attention = torch.nn.MultiheadAttention(d_model, heads, bias=False, batch_first=True)
    network = torch.nn.Sequential(
        torch.nn.Linear(d_model, 4 * d_model),
        torch.nn.ReLU(),
        torch.nn.Linear(4 * d_model, d_model),
    )
    norm = torch.nn.LayerNorm(d_model)

    def attend(x):
        return attention(x, x, x, need_weights=False)[0]

    def gradient(function, module):
        def call():
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(function(leaf).sum(), [leaf, *module.parameters()])

        return call

    def without_gradient(function, *arguments):
        return lambda: torch.no_grad()(function)(*arguments)

    by_words = t["z"].flatten(0, 1), ids.flatten()
    return {
        "attention": without_gradient(
            functional.scaled_dot_product_attention, t["q"], t["q"], t["q"]
        ),
        "multi-head attention": without_gradient(attend, x),
        "its gradient (x, W)": gradient(attend, attention),
        "feed-forward": without_gradient(network, x),
        "its gradient (x, W, b)": gradient(network, network),
        "layer norm": without_gradient(norm, x),
        "dropout": without_gradient(functional.dropout, x, 0.1),
        "embedding": without_gradient(functional.embedding, ids, t["table"]),
        "loss": without_gradient(
            lambda: functional.cross_entropy(*by_words, reduction="none", label_smoothing=0.1)
        ),
    }


def main() -> None:
    console = Console()
    for size in SIZES:
        shown = table(
            "[B, L, D] = [{}, {}, {}], {} heads; ms".format(*size),
            [""],
            ("tfm", "compiles", "in jit", "linen", "compiles", "in jit", "torch"),
        )
        a, heads = _arrays(*size), size[-1]
        peers, eager = linen(a, heads), torch_calls(a, heads) if installed("torch eager") else {}
        for name, (function, arguments) in ours(a, heads).items():
            cells = []
            for call, given in ((function, arguments), peers[name]):
                milliseconds, compiled = measure(lambda: call(*given))  # noqa: B023
                jitted = jax.jit(call)
                cells += [f"{milliseconds:.3g}", str(compiled)]
                cells += [f"{measure(lambda: jitted(*given))[0]:.3g}"]  # noqa: B023
            cells += [f"{measure(eager[name])[0]:.3g}"] if eager else ["–"]
            shown.add_row(name, *cells)
        console.print(shown)


if __name__ == "__main__":
    main()
