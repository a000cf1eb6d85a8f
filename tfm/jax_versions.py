"""The versions of JAX that give right numbers; to import this module refuses the others."""

import jax

OLDEST = "0.10.1"
UNSOUND = {
    "0.10.2": "sums wrongly and crashes on a CPU: jax issues 39103, 40412",
    "0.11.0": "crashes on a CPU, adds wrongly on some GPUs: jax issues 39257, 40633",
    "0.11.1": "copies whole arrays in loops, adds wrongly on some GPUs: jax issues 40101, 40633",
}
"""version -> why it is left out"""
RANGE = ",".join([f">={OLDEST}", *(f"!={version}" for version in UNSOUND)])
"""As setup.cfg has it."""


def check(version: str) -> None:
    """Raises ImportError, in one line with the range, where `version` is not supported."""
    release = [int(part) for part in version.split(".")[:3] if part.isdecimal()]
    why = UNSOUND.get(version)
    if release < [int(part) for part in OLDEST.split(".")]:
        why = "is too old"
    if why:
        raise ImportError(f"jax {version} {why}; tfm needs jax{RANGE}", name="jax")


check(jax.__version__)
