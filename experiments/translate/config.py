"""The flags of a translation task, and its presets."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from experiments.data.cleaning import Limits
from experiments.reporting.variants import Name
from experiments.training.config import MAY_DIFFER as TRAININGS_MAY_DIFFER
from experiments.training.config import TrainingConfig
from tfm.config import BASE, BIG
from tfm.decoding import Penalty
from tfm.variants import VARIANTS


@dataclasses.dataclass(frozen=True)
class TranslateConfig(TrainingConfig):
    """Train a Transformer to translate, on your own text, and report how well it does.

    --train SOURCE TARGET are two files, one sentence a line, or one file of lines
    `source<TAB>target`; plain or gzip. The same command goes on where it was interrupted.
    """

    preset: Literal["small", "base", "big"] = "small"
    """What the other flags start from: small learns on two cores; base and big are the paper's."""
    variant: Name = "paper"
    """Whose Transformer the other flags start from: `python -m experiments.run variants`."""
    run: Path = Path("runs/translate")
    """Folder of the run: config, vocabulary, checkpoints, results, report, translations."""
    train: tuple[Path, ...] = ()
    """Training text."""
    valid: tuple[Path, ...] = ()
    """Validation text. None: up to 1,000 pairs of the training text, which are then not learned."""
    test: tuple[Path, ...] = ()
    """Test text. None: the validation text is the test."""
    dataset: str | None = None
    """In the place of --train: a dataset of the Hugging Face hub (needs `datasets`, a network)."""
    dataset_subset: str | None = None
    """Its subset (configuration), where it has several."""
    dataset_columns: tuple[str, str] | None = None
    """Its columns, or languages of its column `translation`. None: the only two that there are."""
    from_run: Path | None = None
    """Fine-tune the model of this run folder, its vocabulary and options kept (also --from)."""
    subwords: Literal["bpe", "unigram"] = "bpe"
    """How SentencePiece makes the vocabulary that both languages share."""
    vocabulary_size: int | None = None
    """Its number of pieces. None: by the amount of text."""
    limits: Limits = Limits()
    """What a training pair may be; others are left out and counted."""
    weights: Literal["best", "last", "average"] = "best"
    """What the result is: the parameters of the lowest validation loss, the last ones, or the
    average of the newest --keep-checkpoints."""
    evaluated: int = 500
    """Validation sentences that each evaluation translates, greedily, for its BLEU."""
    bleu: Literal["auto", "13a", "intl", "zh", "char"] = "auto"
    """sacreBLEU's tokenizer. auto: by the script of the references: 13a where words stand apart, zh
    for Chinese, char for Japanese, Thai, Lao, Khmer, Burmese and Tibetan."""
    penalty: Penalty = "paper"
    """Form of the beam's length penalty: ((5 + n)/6)^α, or n^α (power)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocabulary_size", "evaluated"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


_SIZES = {
    "small": {"d_model": 256, "d_ff": 1024, "num_heads": 4, "num_encoder_layers": 3,
              "num_decoder_layers": 3},
    "base": {"compute_dtype": "auto"},
    "big": {name: value for name, value in vars(BIG).items() if value != getattr(BASE, name)}
    | {"compute_dtype": "auto"},
}  # fmt: skip
_TRAININGS = {
    "small": {"steps": 10_000, "rows": 16, "learning_rate": 1e-3, "warmup_steps": 1000},
    "base": {"steps": 100_000, "rows": 192, "schedule": "paper", "learning_rate": 7e-4,
             "warmup_steps": 4000, "accumulation": 4, "keep_checkpoints": 5, "weights": "average"},
    "big": {"steps": 300_000, "rows": 192, "schedule": "paper", "learning_rate": 5e-4,
            "warmup_steps": 4000, "accumulation": 6, "keep_checkpoints": 20, "weights": "average"},
}  # fmt: skip


def configured(preset: str, variant: str) -> dict[str, Any]:
    """The defaults of a preset and a variant, which flags override."""
    v = VARIANTS[variant]
    changes = dict(_SIZES[preset])
    if variant == "paper":
        # The paper gives no ε; with this one the model can be exported to Marian.
        changes["layer_norm_epsilon"] = 1e-5
    common = {"evaluate_every": 1000, "save_every": 1000, "source_length": 128,
              "target_length": 128, "keep_checkpoints": 2}  # fmt: skip
    return common | _TRAININGS[preset] | {
        "preset": preset, "variant": variant, "model": dataclasses.replace(v.model, **changes),
        "smoothing": v.smoothing, "smoothed_over": v.smoothed_over, "alpha": v.alpha,
        "penalty": v.penalty,
    }  # fmt: skip


MAY_DIFFER = TRAININGS_MAY_DIFFER | {
    "variant", "train", "valid", "test", "weights", "evaluated", "bleu", "from_run",
    "model.vocab_size", "model.source_vocab_size", "model.vocab_multiple",
}  # fmt: skip
"""Texts and models are compared by SHA-256 and options, not by name."""
