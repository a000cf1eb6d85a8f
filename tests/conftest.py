import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Most of the tests' time is compilation, and most of that LLVM's: without its expensive passes a
# search compiles in a sixth of the time, to the same operations. `--optimized` leaves them in.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if jax.__version_info__ < (0, 11):  # later ones have no other way to emit a fusion
    QUICK.append("--xla_cpu_use_fusion_emitters=false")


def pytest_addoption(parser):
    parser.addoption(
        "--optimized", action="store_true", help="compile what is tested as users compile it"
    )


def pytest_configure(config):
    # XLA reads it when the first array is made; the processes that tests start inherit it.
    if not config.getoption("optimized"):
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])


LONGEST = [
    "test_interrupting", "test_together", "test_compiled", "test_sharding", "test_measures",
    "test_predictor", "test_translate", "test_notebooks", "test_properties",
    "test_study", "test_predict", "test_model", "test_training", "test_decoding",
    "test_compilations", "test_strict",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    # The files that take longest come first: else one process is left with one of them at the end,
    # and the other with nothing.
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


# Eight devices on every CPU, so that what is shared out over devices is tested on any machine.
jax.config.update("jax_num_cpu_devices", 8)
# A test compiles what it tests, whatever cache the user has chosen.
jax.config.update("jax_enable_compilation_cache", False)

# Tests import `references`, `checks` and the like from there.
sys.path.append(str(Path(__file__).parent / "support"))


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """What a call of the command has compiled, here or in a process of its own, the next need not.

    For tests that do not care what is said on the way: a process that is killed may leave half an
    entry, of which JAX then warns. So each file of tests has a folder of its own.
    """
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
        # On some processors XLA says of each program that it reads that the machine may be another,
        # in 1.8 kB: a process whose pipe nobody empties then waits for ever.
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
        _configure(settings)
        yield
    _configure(before)


def _configure(settings):
    compilation_cache.reset_cache()  # so that JAX looks anew whether there is one
    for name, value in settings.items():
        jax.config.update(name, value)


@pytest.fixture
def traced_anew():
    """For a test that puts another function or number into a module: what was traced before is
    forgotten, and what it traces itself too."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def x64():
    """Runs a test with 64-bit types: float64 in, float64 out."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def tolerance(request):
    """Runs a test in both precisions; its value is the error that a result may have in each."""
    with jax.enable_x64(request.param == "float64"):
        yield {"float32": 1e-5, "float64": 1e-12}[request.param]
