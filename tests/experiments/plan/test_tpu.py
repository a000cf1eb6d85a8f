"""The plan beside what XLA makes of the same step for TPUs, which need not be here.

Run as a program, it compiles one case: libtpu is loaded in a process of its own.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.topologies import get_topology_desc
from jax.sharding import SingleDeviceSharding

from experiments.plan.compiled import lower
from experiments.plan.memory import TPU, temporary_bytes
from experiments.plan.traffic import products
from experiments.plan.work import Work, argument_bytes, parameter_bytes
from tfm import BASE, Transformer, beam_search, start_decoding
from tfm.parallel.mesh import MeshConfig

# A layer of each, since the compiler takes most of a minute for them; sizes that fill a chip's
# tiles of 8 × 128, and enough rows that the activations do not fit beside its processor.
CONFIG = dataclasses.replace(
    BASE, vocab_size=8000, d_model=256, d_ff=1024, num_heads=4, num_encoder_layers=1,
    num_decoder_layers=1, compute_dtype="bfloat16",
)  # fmt: skip


def work_of(mesh: list[int]) -> Work:
    return Work(CONFIG, MeshConfig(*mesh), rows=64, source=128, target=128)


def lower_search(device):
    """Beam search of 32 sentences of 64 pieces, 4 hypotheses wide, lowered for one device."""
    model = Transformer(CONFIG)
    source = jax.ShapeDtypeStruct((32, 64), jnp.int32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def decode(params, source):
        step, cache = start_decoding(model, params, source, num_hypotheses=4, max_length=64)
        return beam_search(step, cache, bos=1, eos=2, max_length=64)

    params = jax.eval_shape(model.init, key, source, source)["params"]
    arguments = jax.tree.map(lambda x: x.update(sharding=device), (params, source))
    return jax.jit(decode).lower(*arguments)


def said(mesh: list[int] | None) -> dict:
    """What XLA says of a training step over four chips or one; None: of beam search on one."""
    devices = get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    if mesh:
        lowered = lower(work_of(mesh), devices)
    else:
        lowered = lower_search(SingleDeviceSharding(devices[0]))
    # With less effort it takes a third of the time, and leaves more of the temporaries in memory.
    program = lowered.compile(compiler_options={"exec_time_optimization_effort": -1.0})
    used = program.memory_analysis()
    return {
        "arguments": used.argument_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
        "flops": program.cost_analysis()["flops"],
    }


@pytest.fixture(scope="module")
def compiled():
    """`said` of a case, by a process that knows of TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install libtpu==0.0.41")

    def compile_apart(mesh):
        root = Path(__file__).parents[3]
        inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # those are the CPU's
        # No query for the machine's own chips, and no lock on them: there are none.
        alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        here = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(mesh)], cwd=root, capture_output=True, text=True,
            timeout=900, env=inherited | alone | here,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return compile_apart


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[1, 1, 1], [1, 2, 2]])
def test_the_plan_is_near_what_xla_makes_for_tpus(compiled, mesh):
    work, answer = work_of(mesh), compiled(mesh)
    assert answer["arguments"] == pytest.approx(argument_bytes(work), rel=0.001)  # but for tiles
    assert answer["flops"] == pytest.approx(products(work).step / work.devices, rel=0.03)
    assert temporary_bytes(work, TPU) == pytest.approx(answer["temporaries"], rel=0.3)


@pytest.mark.slow
def test_beam_search_compiles_for_a_tpu(compiled):
    answer = compiled(None)
    assert answer["arguments"] == pytest.approx(parameter_bytes(work_of([1, 1, 1])), rel=0.01)
    keys_and_values, logits = 2 * 4 * 32 * 4 * 64 * CONFIG.d_model, 4 * 32 * 4 * CONFIG.vocab_size
    assert answer["temporaries"] < 2 * keys_and_values + 8 * logits


if __name__ == "__main__":
    print(json.dumps(said(json.loads(sys.argv[1]))))
