"""Compiles steps for 8 forced host devices, in a process of its own: cases in, what XLA says out.

Each line of standard input is the JSON of a case, see `work_of`; each line of standard output that
of its answer.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from experiments.plan.compiled import by_kind, compile_quickly, emitted
from experiments.plan.work import Work
from tfm.config import TransformerConfig
from tfm.parallel.mesh import MeshConfig


def work_of(model: dict, mesh: list[int], rows: int, source: int, target: int) -> Work:
    """A small step: of the model what differs from a tiny one."""
    tiny = {
        "vocab_size": 997, "vocab_multiple": 8, "d_model": 64, "d_ff": 256, "num_heads": 8,
        "num_encoder_layers": 1, "num_decoder_layers": 1,
    }  # fmt: skip
    return Work(TransformerConfig(**tiny | model), MeshConfig(*mesh), rows, source, target)


def said(work: Work) -> dict:
    """What XLA says of the compiled step."""
    program = compile_quickly(work)
    used = program.memory_analysis()
    found = emitted(program.as_text(), work)
    return {
        "arguments": used.argument_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
        "collectives": sorted([kind, list(axes), n] for (kind, axes), n in by_kind(found).items()),
        "kinds": sorted({c.kind for c in found}),
        "gathered": sorted({s for c in found if c.kind == "all-gather" for s in c.shapes}),
    }


def compiled_apart(cases: list[list]) -> list[dict]:
    """`said` of each case, by a process with 8 devices."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, __file__], input="\n".join(map(json.dumps, cases)), cwd=root, text=True,
        capture_output=True, timeout=900, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    for line in sys.stdin:
        print(json.dumps(said(work_of(*json.loads(line)))), flush=True)
