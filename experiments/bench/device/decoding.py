"""Greedy and beam search of BASE in bf16, from random sources to a fixed length.

Bytes that a step must read: 4 of each parameter that it multiplies, as they are stored in f32 (the
decoder's without W^K and W^V of the cross-attention, and the output's matrix), and the whole cache,
its own and the cross-attention's keys and values of all rows. Times the steps, over the seconds and
the measured bandwidth: the share that a decoding bound by memory alone would have at 1. The
encoder's pass, in the same seconds, counts as time and not as bytes.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.bench.device import accelerator
from experiments.bench.device.inputs import BOS, full_batch, random_params
from experiments.bench.device.session import Row, Session
from experiments.bench.device.timing import (
    compile_timed,
    median_seconds,
    program_bytes,
)
from tfm import Transformer, beam_search, greedy, start_decoding


def read_bytes(model: Transformer, params: Any, source: Any, beam: int, length: int) -> int:
    """Bytes that one step reads, as the module says."""

    def size(tree: Any) -> int:
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    weights = size({k: v for k, v in params.items() if k.startswith("decoder")})
    for name, layer in params.items():
        if name.startswith("decoder") and "cross_attention" in layer:
            weights -= size([layer["cross_attention"][n] for n in ("w_k", "w_v")])
    weights += size(params["embedding"])
    memory, cache = jax.eval_shape(
        lambda params, source: model.apply({"params": params}, source, beam, length,
                                           method="start"),
        params, source,
    )  # fmt: skip
    return weights + size(memory) + size(cache)


def measure(session: Session, sources: int, beam: int) -> Row:
    sizes = session.sizes
    model = Transformer(dataclasses.replace(sizes.decoding, compute_dtype="bfloat16"))
    params = random_params(model)
    length, never = sizes.target_length, model.config.vocab_size
    source = jax.device_put(full_batch(model.config, sources, sizes.source_length)["source"])

    def decode(params: Any, source: jax.Array) -> Any:
        step, cache = start_decoding(model, params, source, beam, length)
        search = greedy if beam == 1 else beam_search
        return search(step, cache, bos=BOS, eos=never, max_length=length)

    before = accelerator.peak_bytes()
    program, compiling = compile_timed(decode, params, source)
    timed = median_seconds(lambda: program(params, source), sizes.least_runs)
    seconds, peak = timed["seconds"], accelerator.peak_bytes()
    made = timed | {
        "compile_seconds": compiling,
        "target_tokens_per_second": sources * length / seconds,
        "program_bytes": program_bytes(program),
    }
    made |= {"peak_bytes": peak} if peak is not None and peak > (before or 0) else {}
    read = read_bytes(model, params, source, beam, length)
    return made | session.share_of_bandwidth(length * read / seconds)


def run(session: Session) -> None:
    for sources in session.sizes.sources:
        for beam in (1, 4):
            name = "greedy" if beam == 1 else f"beam {beam}"
            work = partial(measure, session, sources, beam)
            session.row(f"{name}, {sources} sources", work, needs=0 if session.tiny else 8)
