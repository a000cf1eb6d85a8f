"""Parameters alone in one safetensors file: to share, and to load without unpickling anything."""

from collections.abc import Mapping
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file


def export_params(
    path: str | Path, params: chex.ArrayTree, about: Mapping[str, str] | None = None
) -> None:
    """Writes a tree of nested dicts; a leaf's name is its keys with `/` between.

    A file that is there already is replaced as a whole, or stays as it was.

    Args:
      about: text to be read beside the arrays, such as where they come from.
    """
    named = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    arrays = {name: jnp.asarray(leaf) for name, leaf in named.items()}
    partial = Path(path).with_name(Path(path).name + ".partial")
    try:
        save_file(arrays, partial, dict(about or {}))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def import_params(path: str | Path, like: chex.ArrayTree) -> chex.ArrayTree:
    """The tree that `export_params` wrote; `like` gives the names, shapes and dtypes it must have.

    Raises:
      ValueError: naming the file, and what is no safetensors file, or which array is missing, not
        known, or of another type.
    """
    try:
        arrays = load_file(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    expected = traverse_util.flatten_dict(like, sep="/")
    types = [{n: (x.dtype.name, x.shape) for n, x in named.items()} for named in (arrays, expected)]
    for name in sorted(types[0].keys() | types[1].keys()):
        there, wanted = (t.get(name) for t in types)
        if there != wanted:
            raise ValueError(f"{path}: {name} is {there or 'missing'}, not {wanted or 'known'}")
    return traverse_util.unflatten_dict(arrays, sep="/")
