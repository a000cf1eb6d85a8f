"""Standard input to standard output, line for line: words are pronounced, sentences translated."""

from experiments.checkpoints.run_folder import RunFolder
from experiments.errors import UserError
from experiments.inference import predict_words
from experiments.inference.predict_config import PredictConfig


class PredictError(UserError):
    """What was asked of a run that it cannot do."""


def run(config: PredictConfig) -> None:
    """Standard input to standard output, by what the run was trained for.

    Raises PredictError for flags that the run has no use for.
    """
    if (RunFolder(config.run).read("config.json") or {}).get("task") == "translate":
        from experiments.inference import predict_sentences  # what it needs takes long to import

        predict_sentences.run(config)
        return
    if flags := config.only_for_translation():
        named = ", ".join(f"--{flag.replace('_', '-')}" for flag in flags)
        raise PredictError(f"{named}: for translation alone, and {config.run} is no such run")
    predict_words.run(config)
