"""The table of single calls: the same work for everybody, and compilations that are counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from docs.scripts import calls

ARRAYS, HEADS = calls._arrays(2, 3, 8, 2), 2
SAME_SHAPE = "multi-head attention", "feed-forward", "layer norm", "dropout", "embedding", "loss"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(calls, "SECONDS", 1e-9)


def test_everybody_does_the_same_work():
    ours, linen = calls.ours(ARRAYS, HEADS), calls.linen(ARRAYS, HEADS)
    assert list(ours) == list(linen)
    for name in SAME_SHAPE:
        shapes = [jax.eval_shape(f, *given).shape for f, given in (ours[name], linen[name])]
        assert shapes[0] == shapes[1], name


def test_torch_does_it_too():
    pytest.importorskip("torch", reason="needs requirements-bench.txt")
    ours, torch = calls.ours(ARRAYS, HEADS), calls.torch_calls(ARRAYS, HEADS)
    assert list(ours) == list(torch)
    for name in ("attention", "loss"):
        function, arguments = ours[name]
        found, expected = np.ravel(function(*arguments)), np.ravel(torch[name]())
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)


def test_compilations_of_the_last_calls_are_counted():
    kept = jax.jit(lambda x: x + 1)
    milliseconds, none = calls.measure(lambda: kept(jnp.ones(2)))
    assert milliseconds > 0 and none == 0
    anew = lambda: jax.jit(lambda x: x + 2)(jnp.ones(2))  # noqa: E731
    assert calls.measure(anew)[1] == calls.LAST
