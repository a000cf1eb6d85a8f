"""Parameters in one safetensors file, which loads without unpickling."""

from collections.abc import Mapping
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.flax import load_file, save

from experiments.checkpoints.manifest import write_durably


def export_params(
    path: str | Path, params: chex.ArrayTree, about: Mapping[str, str] | None = None
) -> None:
    """Writes a tree of nested dicts; a leaf's name is its keys with `/` between.

    An existing file is replaced atomically.

    Args:
      about: metadata of the file, such as where the parameters come from.
    """
    named = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    arrays = {name: jnp.asarray(leaf) for name, leaf in named.items()}
    write_durably(Path(path), save(arrays, dict(about or {})))


def _short_name(dtype: jnp.dtype) -> str:
    """The name of a type in safetensors: F32, BF16, I64, BOOL."""
    letters = dtype.name.rstrip("0123456789").upper()
    return {"FLOAT": "F", "BFLOAT": "BF", "INT": "I", "UINT": "U"}.get(letters, letters) + (
        dtype.name[len(letters) :]
    )


def import_params(path: str | Path, like: chex.ArrayTree) -> chex.ArrayTree:
    """The tree that `export_params` wrote; `like` gives the names, shapes and dtypes it must have.

    Raises:
      ValueError: naming the file, where it is not a safetensors file, or an array that is missing,
        unknown, or of another type or shape.
    """
    try:
        with safe_open(path, "flax") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            there = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        arrays = load_file(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    expected = traverse_util.flatten_dict(like, sep="/")
    wanted = {n: (_short_name(x.dtype), x.shape) for n, x in expected.items()}
    for name in sorted(there.keys() | wanted.keys()):
        if (actual := there.get(name)) != (asked := wanted.get(name)):
            raise ValueError(f"{path}: {name} is {actual or 'missing'}, not {asked or 'known'}")
    return traverse_util.unflatten_dict(arrays, sep="/")
