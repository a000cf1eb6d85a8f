"""How a formula is computed: as it stands, or by the kernels of this folder."""

import warnings
from typing import Literal, TypedDict, cast, get_args

from jax.typing import DTypeLike

Implementation = Literal["auto", "formula", "chunked", "cudnn"]
"""How a function is computed, to the same result.

auto:    by the kernels of this folder, as they are fast on the device: attention by cudnn on a GPU
         where it fits, chunked on a CPU whose cache the logits overflow, or else as it stands, with
         a derivative of the softmax that keeps less
formula: as it stands in the paper, by plain operations and their own derivatives
chunked: attention a few heads at a time, and again in the backward pass: O(L·K) memory for those
         only. Its derivative is there in reverse mode alone. Where a size is 0, or symbolic (of
         `jax.export`), it is the formula. Everything else as auto
cudnn:   attention by NVIDIA's fused kernel, for operands that `tfm.kernels.attention.fits_cudnn`;
         everything else as auto
"""


class Options(TypedDict):
    """The keyword arguments by which one function tells another how to compute."""

    compute_dtype: DTypeLike | None
    implementation: Implementation


def resolve(implementation: str) -> Implementation:
    """The implementation of that name, or of a former one with a warning.

    Raises:
      ValueError: there is none of that name.
    """
    if implementation == "reference":
        message = "implementation='reference' is called 'formula' now"
        warnings.warn(message, FutureWarning, stacklevel=2)
        return "formula"
    if implementation not in get_args(Implementation):
        raise ValueError(f"{implementation=} must be one of {get_args(Implementation)}")
    return cast(Implementation, implementation)
