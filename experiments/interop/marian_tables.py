"""Finds the embedding matrices and position tables in a file of Marian weights."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.interop.files import BridgeError, Tensors
from experiments.interop.links import sinusoids

SHARED, ENCODER, DECODER, HEAD = (
    "model.shared.weight", "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight", "lm_head.weight",
)  # fmt: skip


def without_positions(path: Path, tensors: Tensors, d_model: int) -> Tensors:
    """Removes the position tables, after checking them against the formula."""
    names = [f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")]
    for name in set(names) & tensors.keys():
        table = tensors[name]
        if table.ndim == 2 and table.shape[1] == d_model and d_model % 2 == 0:
            expected = sinusoids(len(table), d_model, "halves")
            # The precision of a sine in 16 bits, where the file has 16.
            tolerance = 5e-3 if table.dtype.itemsize == 2 else 1e-5
            if np.abs(table.astype(np.float32) - expected).max() <= tolerance:
                continue
        raise BridgeError(f"{path}: {name} {list(table.shape)} does not hold Marian's sinusoids")
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def find_tables(
    path: Path, tensors: Tensors, fields: dict[str, Any]
) -> tuple[Tensors, dict[str, str]]:
    """One tensor name for each matrix: 'source' (if separate), 'target', 'output' (if untied).

    A file may hold a matrix under several names, whose values must then be equal. For untied models
    their library keeps separate matrices for encoder and decoder even where the config says that
    they are shared; where the two differ, they are separate here too.
    """
    shared, tied = fields["share_encoder_decoder_embeddings"], fields["tie_word_embeddings"]
    sides = [tensors[n] for n in (ENCODER, DECODER) if n in tensors]
    if shared and not tied and len(sides) == 2 and not np.array_equal(*sides):
        shared = False
        tensors = {n: t for n, t in tensors.items() if n != SHARED}  # it is not used
    groups = {
        (True, True): {"target": (SHARED, ENCODER, DECODER, HEAD)},
        (True, False): {"target": (SHARED, ENCODER, DECODER), "output": (HEAD,)},
        (False, True): {"source": (ENCODER,), "target": (DECODER, HEAD)},
        (False, False): {"source": (ENCODER,), "target": (DECODER,), "output": (HEAD,)},
    }[shared, tied]
    kept, names = dict(tensors), {}
    for table, group in groups.items():
        there = [name for name in group if name in tensors]
        names[table] = there[0] if there else group[0]
        for other in there[1:]:
            if not np.array_equal(tensors[other], tensors[there[0]]):
                raise BridgeError(
                    f"{path}: {other} and {there[0]} differ, though the config says that they are "
                    "one matrix (share_encoder_decoder_embeddings, tie_word_embeddings)"
                )
            del kept[other]
    return kept, names
