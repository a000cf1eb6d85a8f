"""The former place of `experiments.inference.pronouncer`, for this release."""

import warnings

from experiments.inference.pronouncer import (  # noqa: F401
    Pronouncer,
    Pronunciation,
    UnpronounceableError,
    load,
)

warnings.warn(
    "experiments.pronouncer is experiments.inference.pronouncer now", FutureWarning, stacklevel=2
)
