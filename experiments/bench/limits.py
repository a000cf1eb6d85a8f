"""The least work of a workload, and the peak rates of this machine.

`python -m experiments.bench.limits` measures the machine and prints one line of JSON.
"""

import json
import time
from collections.abc import Callable
from typing import NamedTuple

from experiments.bench.inputs import examples
from experiments.bench.workloads import (
    Attention,
    Stream,
    Training,
    Workload,
)
from experiments.plan.flops import decoding_flops, training_flops


class Needs(NamedTuple):
    """The least work of one run."""

    flops: float
    """Floating-point (or 8-bit integer) operations of the matrix products."""
    bytes: float
    """Of what has to be read from memory, or written there, even if nothing is read twice."""


class Limits(NamedTuple):
    """The machine's best measured rates."""

    flops: dict[str, float]
    """Operations a second of a large matrix product, by the dtype of its operands."""
    bandwidth: float
    """Bytes a second read by a matrix-vector product too large for the caches."""

    def seconds(self, work: Workload) -> float:
        """A lower bound: all products at the peak rate, or all bytes at the bandwidth."""
        needs = least_work(work)
        return max(needs.flops / self.flops[work.dtype], needs.bytes / self.bandwidth)


def least_work(work: Workload) -> Needs:
    """Operations and bytes of one run of a workload; of 1,000 tokens of a `Stream`.

    Training reads and writes parameters and both moments once. Attention reads its three inputs
    and writes its output; its backward pass, of twice the products, reads output and cotangent and
    writes three gradients. Decoding reads the decoder's matrices and the output's at each step;
    `stopping` ends a source between a quarter and the whole of the target, 5/8 in the mean.
    """
    if isinstance(work, Training):
        flops = work.rows * training_flops(work.config, work.length, work.length)
        return Needs(flops, 6 * 4 * work.config.parameter_count())
    if isinstance(work, Stream):
        lengths = [(len(e["source"]), len(e["target"])) for e in examples(work)]
        flops = sum(training_flops(work.config, *pair) for pair in lengths)
        return Needs(1000 * flops / sum(map(sum, lengths)), 0)
    if isinstance(work, Attention):
        product = 2 * work.rows * work.heads * work.length**2 * work.features
        array = 4 * work.rows * work.heads * work.length * work.features
        return Needs(6 * product, 8 * array) if work.backward else Needs(2 * product, 4 * array)
    c, width = work.config, 1 if work.int8 else 4
    layer = 6 * c.d_model**2 + 2 * c.d_model * c.d_ff  # without K and V of the source
    matrices = c.num_decoder_layers * layer + c.d_model * c.vocab_size
    steps = work.target * (5 / 8 if work.stopping else 1)
    flops = work.rows * decoding_flops(c, work.source, steps, work.beam)
    return Needs(flops, width * matrices * work.target)


def _best(run: Callable[[], object], seconds: float = 1.5) -> float:
    """Seconds of the fastest run, after one to warm up."""
    run()
    times: list[float] = []
    while sum(times) < seconds:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def peak_flops(dtype: str, n: int = 2048) -> float:
    """The best rate of an n × n matrix product of `dtype`, summed in f32, of int8 in int32."""
    import jax
    import jax.numpy as jnp

    total = jnp.int32 if dtype == "int8" else jnp.float32
    a, b = ((30 * jax.random.normal(jax.random.key(i), (n, n))).astype(dtype) for i in range(2))
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=total))
    return 2 * n**3 / _best(lambda: product(a, b).block_until_ready())


def read_bandwidth(megabytes: int = 1024) -> float:
    """Bytes a second of x W, where W is that large."""
    import jax
    import jax.numpy as jnp

    rows = 4096
    x = jnp.ones((1, rows))
    w = jnp.ones((rows, megabytes * 2**20 // 4 // rows))
    product = jax.jit(jnp.dot)
    return w.nbytes / _best(lambda: product(x, w).block_until_ready())


def measure() -> Limits:
    """Measures the limits of this machine, which should be idle."""
    flops = {dtype: peak_flops(dtype) for dtype in ("float32", "bfloat16", "int8")}
    # The operands are rounded at once where the processor gains nothing by it.
    flops["bfloat16"] = max(flops["bfloat16"], flops["float32"])
    return Limits(flops, read_bandwidth())


if __name__ == "__main__":
    print(json.dumps(measure()._asdict()))
