"""The pronunciation task: letters to sounds, trained on CMUdict or the user's lexicons."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments.checkpoints.run_folder import RunFolder
from experiments.data import pronunciations
from experiments.data.packing import packed_batches
from experiments.data.pronunciations import DataError, Lexicon
from experiments.data.tokenizer import Symbols
from experiments.data.vocabulary import BOS, Vocabulary
from experiments.evaluation import error_rates
from experiments.functions import check_folder, identity_of, make_model
from experiments.inference.batches import WORDS
from experiments.inference.predictor import Predictor, Settings
from experiments.progress import ProgressBar
from experiments.pronounce.report import report, show
from experiments.training.config import (
    MAY_DIFFER,
    TrainingConfig,
    decide_compute_dtype,
    parameter_count,
)
from experiments.training.fitting import TrainingData, train_model
from experiments.training.placement import Layout, divisible
from experiments.training.run import Run, make_identity
from experiments.training.task import carry_out, distributed_session
from tfm.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class PronounceConfig(TrainingConfig):
    """Train a Transformer to pronounce words, and report how well it does."""

    preset: Literal["default", "full"] = "default"
    """What the other flags start from: default takes minutes on two cores, full over an hour."""
    run: Path = Path("runs/pronounce")
    """Folder of the run: config, metrics, checkpoints, results, report."""
    train_file: Path | None = None
    """Training lexicon, lines `word<TAB>PH PH …`, plain or gzip; or as CMUdict, MFA and Kaldi have
    them. None: CMUdict and its test words."""
    valid_file: Path | None = None
    """Validation lexicon. None: a part of the training words, whole word families."""
    test_file: Path | None = None
    """Test lexicon. None beside a train_file: the validation words are the test."""
    model: TransformerConfig = TransformerConfig(
        vocab_size=42, source_vocab_size=30, d_model=128, d_ff=512, num_heads=4,
        num_encoder_layers=2, num_decoder_layers=2, dropout_rate=0.0,
    )  # fmt: skip
    """The Transformer. Its vocabulary sizes must be those of the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_file is None and (self.valid_file or self.test_file):
            raise ValueError("valid_file and test_file go with a train_file")


PRESETS = {
    "default": PronounceConfig(),
    "full": PronounceConfig(
        preset="full",
        run=Path("runs/pronounce-full"),
        steps=27_000,
        evaluate_every=1500,
        model=TransformerConfig(
            vocab_size=42, source_vocab_size=30, d_model=256, d_ff=1024, num_heads=4,
            num_encoder_layers=4, num_decoder_layers=2, dropout_rate=0.05,
        ),
        learning_rate=4e-4,
        warmup_steps=2000,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lexicons:
    """The words of one run, and its vocabularies."""

    train: Lexicon
    valid: Lexicon
    test: Lexicon
    letters: Vocabulary
    phones: Vocabulary
    notes: tuple[str, ...] = ()
    """What a user should know of the files: what was left out of them, and what is rare in them."""

    def tokenizers(self) -> tuple[Symbols, Symbols]:
        """The tokenizers of words and of pronunciations."""
        return Symbols(self.letters), Symbols(self.phones, spaced=True)

    def parts(self) -> dict[str, Lexicon]:
        """The lexicons by the name of their part."""
        return {"training": self.train, "validation": self.valid, "test": self.test}


def load_lexicons(config: PronounceConfig) -> Lexicons:
    """Loads CMUdict with its split, or the files that the config names.

    Raises DataError: a file that is missing, empty or malformed.
    """
    notes: list[str] = []
    if config.train_file is None:
        parts = pronunciations.split_by_family(pronunciations.load_cmudict())
    else:
        train = _read(config.train_file, notes)
        if config.valid_file is None:
            train, valid = pronunciations.carve_validation(train)
        else:
            valid = _read(config.valid_file, notes)
        parts = train, valid, _read(config.test_file, notes) if config.test_file else valid
        notes += _repeated(config)
    parts = tuple(
        _fitting(part, name, config, notes)
        for part, name in zip(parts, ("training", "validation", "test"), strict=True)
    )
    notes += pronunciations.describe(parts[0])
    # From all parts, so that a rare letter in a test word is no error.
    letters = Vocabulary.of(word for part in parts for word in part)
    phones = Vocabulary.of(p for part in parts for variants in part.values() for p in variants)
    return Lexicons(*parts, letters, phones, tuple(notes))


def _read(path: Path, notes: list[str]) -> Lexicon:
    """A lexicon; what was left out of its lines is noted."""
    skipped: Counter[str] = Counter()
    lexicon = pronunciations.read_lexicon(path, skipped)
    if skipped:
        counts = ", ".join(f"{count:,} {what}" for what, count in skipped.items())
        notes.append(f"{path}: left out {counts}")
    return lexicon


def _repeated(config: PronounceConfig) -> list[str]:
    """Notes on files that serve twice."""
    files = {"training": config.train_file, "validation": config.valid_file,
             "test": config.test_file}  # fmt: skip
    names: dict[Path, list[str]] = {}
    for name, file in files.items():
        if file is not None:
            names.setdefault(Path(file).resolve(), []).append(name)
    return [
        f"warning: {path} is the file for {' and '.join(twice)}: scores on words that were "
        "learned, or chosen by, say little"
        for path, twice in names.items()
        if len(twice) > 1
    ]


def _fitting(part: Lexicon, name: str, config: PronounceConfig, notes: list[str]) -> Lexicon:
    """What the packing lengths hold of a part; DataError where it is less than half."""
    kept, long = pronunciations.fitting(part, config.source_length, config.target_length)
    if long:
        source = max(len(word) for word, _ in long) + 1
        target = max(len(phones) for _, phones in long) + 1
        count = sum(map(len, part.values()))
        few = 2 * len(long) <= count
        line = (
            f"{len(long):,} of {count:,} {name} pronunciations "
            f"{'left out' if few else 'are too long'}, as that of {long[0][0]!r}: "
            f"--source-length {max(source, config.source_length)} "
            f"--target-length {max(target, config.target_length)} takes them"
        )
        if not few:
            raise DataError(line)
        notes.append(line)
    return kept


def resolve(
    config: PronounceConfig, lexicons: Lexicons, folder: RunFolder | None = None
) -> PronounceConfig:
    """The config with the vocabulary sizes of the data, padded as in its config.json.

    Raises DataError where --model names other sizes than the data has.
    """
    sizes = {"vocab_size": lexicons.phones.size, "source_vocab_size": lexicons.letters.size}
    default = PRESETS["default"].model
    for name, size in sizes.items():
        asked = getattr(config.model, name)
        if asked not in (size, getattr(default, name)):
            raise DataError(f"--model.{name}={asked}, but the data's vocabulary has {size} symbols")
    model = divisible(dataclasses.replace(config.model, **sizes), config.mesh, folder)
    return dataclasses.replace(config, model=model)


@dataclasses.dataclass(frozen=True)
class Score:
    """Error rates as fractions, and the hypotheses."""

    wer: float
    per: float
    hypotheses: list[tuple[str, ...]]


def score(pronouncer: Predictor, lexicon: Lexicon, **options: Any) -> Score:
    """WER and PER of the best pronunciations of all words of a lexicon; options as
    `Predictor.nbest`."""
    hypotheses = [tuple(text.split()) for text in pronouncer(list(lexicon), **options)]
    references = list(lexicon.values())
    return Score(
        error_rates.word_error_rate(hypotheses, references),
        error_rates.phone_error_rate(hypotheses, references),
        hypotheses,
    )


def make_evaluate(lexicons: Lexicons, pronouncer: Predictor) -> Callable[[Any], dict[str, float]]:
    """params -> `valid_wer`, `valid_per`.

    Greedy decoding is enough to watch the training; the final result uses the beam.
    """

    def evaluate(params: Any) -> dict[str, float]:
        result = score(dataclasses.replace(pronouncer, params=params), lexicons.valid, beam=1)
        return {"valid_wer": result.wer, "valid_per": result.per}

    return evaluate


def fit(
    run: Run, lexicons: Lexicons, examples: list[dict[str, Any]]
) -> tuple[Predictor, dict[str, Any]]:
    """Trains, or resumes training; returns the pronouncer and the facts for results.json.

    Raises SystemExit after SIGINT or SIGTERM, with everything saved.
    """
    config = run.config
    batches = packed_batches(
        examples, rows=config.rows, source_length=config.source_length,
        target_length=config.target_length, seed=config.seed, own=run.layout.own_rows,
    )  # fmt: skip
    untrained = Predictor(
        run.model, {}, *lexicons.tokenizers(),
        Settings(config.source_length, config.target_length, config.beam, config.alpha),
        batching=WORDS,
    )  # fmt: skip
    valid = pronunciations.examples(lexicons.valid, lexicons.letters, lexicons.phones)
    data = TrainingData(batches, valid, BOS)
    params, facts = train_model(run, data, make_evaluate(lexicons, untrained))
    return dataclasses.replace(untrained, params=params), facts


def results_of(config: PronounceConfig, about: dict, valid: Score, test: Score) -> dict[str, Any]:
    """The content of results.json: error rates as fractions."""
    return {
        "test_wer": test.wer,
        "test_per": test.per,
        "valid_wer": valid.wer,
        "valid_per": valid.per,
        "test_words": len(test.hypotheses),
        "valid_words": len(valid.hypotheses),
        "test_is_valid": config.train_file is not None and config.test_file is None,
        **about,
        "seed": config.seed,
        "beam": config.beam,
        "weights": "of the last step",
    }


def prepare(lexicons: Lexicons) -> tuple[list[dict[str, Any]], str]:
    """The training examples, and the fingerprint of all data."""
    vocabularies = (lexicons.letters, lexicons.phones)
    made = {
        name: pronunciations.examples(part, *vocabularies)
        for name, part in lexicons.parts().items()
    }
    return made["training"], pronunciations.fingerprint(sum(made.values(), []), *vocabularies)


@dataclasses.dataclass(frozen=True)
class PronounceTask:
    """A run with its words, ready to train."""

    run: Run
    lexicons: Lexicons
    examples: list[dict[str, Any]]
    may_differ = MAY_DIFFER
    makes = ()

    def is_finished(self, results: dict[str, Any], config: dict[str, Any]) -> bool:
        return results.get("steps") == self.run.config.steps

    def prepare(self) -> "PronounceTask":
        return self

    def summary(self) -> str:
        sizes = [f"{len(part):,} {name} words" for name, part in self.lexicons.parts().items()]
        parameters = f"{parameter_count(self.run.config):,} parameters"
        return "\n".join([*self.lexicons.notes, ", ".join([*sizes, parameters])])

    def train(self) -> tuple[Predictor, dict[str, Any]]:
        return fit(self.run, self.lexicons, self.examples)

    def finish(
        self, pronouncer: Predictor, facts: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[], None]]:
        run, lexicons = self.run, self.lexicons
        with ProgressBar("scoring words", len(lexicons.valid) + len(lexicons.test)) as bar:
            valid = score(pronouncer, lexicons.valid, done=bar.advance)
            test = score(pronouncer, lexicons.test, done=bar.advance)
        results = results_of(run.config, facts, valid, test)
        examples = report(run.record, lexicons, run.folder, pronouncer, results, test.hypotheses)
        return results, partial(show, results, examples)


def run(config: PronounceConfig) -> None:
    """The pronounce command: data, training, evaluation, report."""
    with distributed_session(config) as processes:
        folder = RunFolder(config.run)
        check_folder(folder, config.functions)
        config = dataclasses.replace(config, model=decide_compute_dtype(config.model, folder))
        make_model(config.model, config.functions)  # refuses what does not fit, before any work
        lexicons = load_lexicons(config)
        config = resolve(config, lexicons, folder)
        layout = Layout(config.mesh, config.model, config.rows, config.accumulation)
        examples, fingerprint = prepare(lexicons)
        inputs = identity_of(config.functions) | {"data_sha256": fingerprint}
        vocabularies = {"letters": lexicons.letters.to_json(), "phones": lexicons.phones.to_json()}
        identity = make_identity(config, inputs, MAY_DIFFER, vocabularies=vocabularies)
        resolved = Run(config, identity, layout, processes, inputs)
        carry_out(PronounceTask(resolved, lexicons, examples))
