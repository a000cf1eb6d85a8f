"""Vocabularies of other libraries: pieces and their ids in a JSON object."""

from pathlib import Path

import numpy as np
import sentencepiece

from experiments.interop.files import BridgeError, Folder, named_few


def read_ids(folder: Folder, name: str) -> dict[str, int]:
    """The id of each piece; BridgeError naming a file with other content."""
    ids = folder.json(name)
    for piece, i in ids.items():
        if type(i) is not int:
            raise BridgeError(f"{folder.root / name}: the id of {piece!r} is {i!r}")
    return ids


def pieces_of(path: Path, ids: dict[str, int], order: np.ndarray) -> tuple[str, ...]:
    """The pieces in the order of our ids, where `order` is our id -> theirs.

    Raises BridgeError unless each id of the model occurs exactly once.
    """
    by_id = {i: piece for piece, i in ids.items()}
    size = len(order)
    if sorted(ids.values()) != list(range(size)):
        missing = [str(i) for i in range(size) if i not in by_id]
        beyond = [f"{p!r} ({i})" for p, i in ids.items() if not 0 <= i < size]
        what = (
            f"no piece has the id {named_few(missing)}" if missing
            else f"{named_few(beyond)}: outside the vocabulary" if beyond
            else "several pieces have one id"
        )  # fmt: skip
        raise BridgeError(f"{path}: {what}, where the model has {size} ids")
    return tuple(by_id[i] for i in order.tolist())


def numbered(pieces: tuple[str, ...], order: np.ndarray) -> dict[str, int]:
    """The content of vocab.json: pieces with their ids, in the order of the ids."""
    theirs = sorted(zip(order.tolist(), pieces, strict=True))
    return {piece: i for i, piece in theirs}


def own_ids(model: bytes) -> dict[str, int]:
    """The ids of the pieces in the SentencePiece model itself."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
