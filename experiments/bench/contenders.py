"""The contenders: this library, and the installed peers."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.bench.workloads import Workload

OURS = "tfm"
_MODULES = {
    OURS: ("ours", "jax"),
    "torch eager": ("torch_peer", "torch"),
    "torch compile": ("torch_peer", "torch"),
    "torch SDPA": ("torch_peer", "torch"),
    "ctranslate2": ("ctranslate2_peer", "ctranslate2"),
    "transformers": ("transformers_peer", "transformers"),
    "flax linen": ("flax_peers", "flax"),
    "flax nnx": ("flax_peers", "flax"),
    "jax.nn": ("flax_peers", "jax"),
}
"""name -> (the module here that builds it, the package that it needs)"""


class Contender(NamedTuple):
    """A library's implementation of a workload."""

    run: Callable[[], object]
    """Does the work once, and returns when it is done: of a `Stream` the number of real tokens."""
    check: Callable[[], np.ndarray]
    """What all contenders must agree on: a loss, log-probabilities, an output."""


def installed(name: str) -> bool:
    return importlib.util.find_spec(_MODULES[name][1]) is not None


def version(name: str) -> str:
    """`torch compile (torch 2.13.0)`"""
    package = _MODULES[name][1]
    return f"{name} ({package} {importlib.metadata.version(package)})"


def build(name: str, work: Workload, weights: Path) -> Contender:
    """Builds the contender of that name, with the parameters of the file `weights`."""
    module = importlib.import_module(f"experiments.bench.{_MODULES[name][0]}")
    return module.build(name, work, weights)
