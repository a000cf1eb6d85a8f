"""The chips of a plan, with the peaks of their vendors' data sheets."""

from typing import NamedTuple


class Chip(NamedTuple):
    """A chip's peaks, which no program reaches."""

    name: str
    platform: str
    """JAX's name of the platform: 'cuda' or 'tpu'."""
    bfloat16: float
    """FLOP/s of dense 16-bit matrix products that are accumulated in f32."""
    float32: float
    """FLOP/s of exact f32 products, which `tfm.kernels.precision` requests: not of TF32."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s of the memory."""
    link: float
    """Bytes/s that a chip sends to its neighbours, in one direction."""
    source: str
    """The source of the numbers (without sparsity), and what the link is."""


# HIGHEST precision on a TPU is six products of bf16.
_SIX = 6

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100-40GB", "cuda", 312e12, 19.5e12, 40e9, 1.555e12, 300e9,
             "A100 SXM4 40GB data sheet; ½ of NVLink 600 GB/s"),
        Chip("A100-80GB", "cuda", 312e12, 19.5e12, 80e9, 2.039e12, 300e9,
             "A100 SXM4 80GB data sheet; ½ of NVLink 600 GB/s"),
        Chip("H100", "cuda", 989e12, 67e12, 80e9, 3.35e12, 450e9,
             "H100 SXM5 data sheet; ½ of NVLink 900 GB/s"),
        Chip("H200", "cuda", 989e12, 67e12, 141e9, 4.8e12, 450e9,
             "H200 SXM data sheet; ½ of NVLink 900 GB/s"),
        Chip("L4", "cuda", 121e12, 30.3e12, 24e9, 300e9, 32e9,
             "L4 data sheet; ½ of PCIe 4.0 ×16, 64 GB/s"),
        Chip("TPU-v4", "tpu", 275e12, 275e12 / _SIX, 32 * 2**30, 1.2e12, 300e9,
             "cloud.google.com/tpu/docs/v4; 2,400 Gbit/s"),
        Chip("TPU-v5e", "tpu", 197e12, 197e12 / _SIX, 16e9, 819e9, 200e9,
             "cloud.google.com/tpu/docs/v5e; ½ of 400 GB/s"),
        Chip("TPU-v5p", "tpu", 459e12, 459e12 / _SIX, 95e9, 2.765e12, 600e9,
             "cloud.google.com/tpu/docs/v5p; 4,800 Gbit/s"),
        Chip("TPU-v6e", "tpu", 918e12, 918e12 / _SIX, 32e9, 1.638e12, 400e9,
             "cloud.google.com/tpu/docs/v6e; ½ of 800 GB/s"),
    )
}  # fmt: skip
"""By name. A link reaches the chips of one machine or slice, not those of other hosts."""
