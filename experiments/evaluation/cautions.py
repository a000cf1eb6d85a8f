"""What has to be said beside a score, lest it flatter."""

from typing import Any

FEW = 200  # sentences or words, below which a score says little and its interval less


def cautions(results: dict[str, Any], unit: str) -> list[str]:
    """A line for each reason to doubt the test's scores; `unit`: "words" or "sentences"."""
    count, lines = results[f"test_{unit}"], []
    if count < FEW:
        lines.append(
            f"{count} test {unit} are few: others could give quite other scores; take {FEW} or more"
        )
    if results.get("test_is_valid"):
        lines.append(
            f"the test {unit} are the validation {unit}, by which a run is watched and chosen: "
            "give others for a score to report"
        )
    return lines
