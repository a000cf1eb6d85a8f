"""The text of a translation run: the files named by flags, or validation text carved from them."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from experiments.data.cleaning import Clean, Limits
from experiments.data.text import CorpusError, Files, Hub, Pair
from experiments.translate.config import TranslateConfig

CARVED = 1000  # most pairs of validation text where none is given


@dataclasses.dataclass(frozen=True)
class Texts:
    """The text of one run."""

    train: Files | Hub
    valid: list[Pair]
    test: list[Pair]
    sha256: dict[str, Any]
    """The identity of each part, as JSON."""


def _carve(corpus: Iterable[Pair], limits: Limits, test: list[Pair]) -> Iterator[Pair]:
    """About one clean pair in a hundred, chosen by a hash, that is not in the test text."""
    for source, target in Clean(corpus, limits, test):
        digest = hashlib.blake2b(f"{source}\0{target}".encode(), digest_size=8).digest()
        if int.from_bytes(digest, "big") % 100 == 0:
            yield source, target


def read(config: TranslateConfig) -> Texts:
    """Reads the validation and test text; the training text is read later, as a stream.

    Raises CorpusError: no training text named, a fault in a file, or too few pairs to carve
    validation text from.
    """
    if bool(config.train) == (config.dataset is not None):
        raise CorpusError(
            "give the training text by one of --train SOURCE TARGET and --dataset NAME"
        )
    if config.dataset is None:
        train: Files | Hub = Files(config.train)
    else:
        columns = config.dataset_columns or ()
        train = Hub(config.dataset, *columns, subset=config.dataset_subset)
    parts = {
        name: Files(getattr(config, name)) for name in ("valid", "test") if getattr(config, name)
    }
    test = list(parts.get("test", ()))
    if "valid" in parts:
        valid = list(parts["valid"])
    else:
        valid = list(itertools.islice(_carve(train, config.limits, test), CARVED))
    if not valid:
        raise CorpusError("too few training pairs to carve validation pairs from: give --valid")
    test = test or valid
    identities = {name: part.identity() for name, part in {"train": train, **parts}.items()}
    return Texts(train, valid, test, identities)
