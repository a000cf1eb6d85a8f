"""Ensembles: several models as one predictor."""

import dataclasses
from collections.abc import Sequence

from experiments.errors import UserError
from experiments.inference.predictor import Predictor
from experiments.inference.search import Mean


class EnsembleError(UserError):
    """The models cannot form an ensemble."""


def ensemble(members: Sequence[tuple[str, Predictor]], mean: Mean = "log_linear") -> Predictor:
    """Joins named predictors, with the settings of the first and the shortest lengths of all.

    Raises:
      EnsembleError: names the first predictor with other vocabularies than the first one.
    """
    (first_name, first), *others = members
    for name, other in others:
        for side in ("source", "target"):
            a, b = getattr(first, side), getattr(other, side)
            if a.sha256 != b.sha256:
                raise EnsembleError(
                    f"{name}: its {side} vocabulary is not that of {first_name} "
                    f"(SHA-256 {b.sha256[:12]}…, not {a.sha256[:12]}…), so they are no ensemble"
                )
    everyone = [first, *(other for _, other in others)]
    settings = dataclasses.replace(
        first.settings,
        source_length=min(one.settings.source_length for one in everyone),
        target_length=min(one.settings.target_length for one in everyone),
    )
    return dataclasses.replace(first, settings=settings, others=tuple(everyone[1:]), mean=mean)
