"""Learn to pronounce English words from CMUdict: letters in, sounds out."""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import data, metrics
from experiments.data import DataError, Lexicon
from experiments.keeper import check_newest
from experiments.loop import Schedule, train
from experiments.packing import packed_batches, packed_rows
from experiments.pronouncer import Pronouncer
from experiments.run_folder import RunFolder, named, plain, write_json
from experiments.stopping import StopSignal
from experiments.tasks.pronounce_report import report
from experiments.vocabulary import BOS, Vocabulary
from tfm.config import TransformerConfig
from tfm.model import Transformer
from tfm.sharing import export_params
from tfm.training import (
    cosine_schedule,
    init_state,
    make_optimizer,
    make_train_step,
    paper_schedule,
    skip_nonfinite,
    summed_loss,
)


@dataclasses.dataclass(frozen=True)
class PronounceConfig:
    """Train a Transformer to pronounce words, and report how well it does."""

    preset: Literal["default", "full"] = "default"
    """What the other flags start from: default takes minutes on two cores, full over an hour."""
    run: Path = Path("runs/pronounce")
    """Folder of the run: config, metrics, checkpoints, results, report."""
    seed: int = 0
    """Seed of the initialisation, the dropout and the order of the data."""
    steps: int = 5600
    """Updates in all; a larger number extends a finished run (its schedule is then stretched)."""
    save_every: int = 1400
    """Steps between checkpoints; an interrupted run resumes from the newest."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the best by validation is kept apart."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 1400
    """Steps between evaluations on the validation words."""
    most_skipped: int = 5
    """Steps in a row without a finite loss and gradient that end the run; one makes no update."""
    train_file: Path | None = None
    """Training lexicon, lines `word<TAB>PH PH …`. None: CMUdict and its test words."""
    valid_file: Path | None = None
    """Validation lexicon. None: a part of the training words, whole word families."""
    test_file: Path | None = None
    """Test lexicon. None beside a train_file: the validation words are the test."""
    rows: int = 25
    """Packed rows in a batch."""
    source_length: int = 40
    """Letters in a packed row, end symbols included."""
    target_length: int = 36
    """Sounds in a packed row, end symbols included."""
    accumulation: int = 1
    """Micro-batches that a batch's rows are cut into, to save memory; divides rows."""
    model: TransformerConfig = TransformerConfig(
        vocab_size=42, source_vocab_size=30, d_model=128, d_ff=512, num_heads=4,
        num_encoder_layers=2, num_decoder_layers=2, dropout_rate=0.0,
    )  # fmt: skip
    """The Transformer. Its vocabulary sizes must be those of the data."""
    schedule: Literal["cosine", "paper"] = "cosine"
    """Learning rate after the warm-up: half a cosine to 0, or the paper's inverse square root."""
    learning_rate: float = 1.5e-3
    """Peak of the learning rate, at the end of the warm-up (the paper's own is
    1 / √(d_model · warmup_steps))."""
    warmup_steps: int = 400
    """Steps of linear warm-up; the cosine schedule takes at most half of all steps."""
    clip: float = 1.0
    """Threshold θ of the global gradient norm."""
    smoothing: float = 0.1
    """Label smoothing ε."""
    beam: int = 4
    """Beam width of the evaluation and of predict."""
    alpha: float = 0.6
    """Exponent of the beam's length penalty ((5 + n)/6)^α."""

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "keep_checkpoints", "log_every", "evaluate_every",
                     "most_skipped", "rows", "source_length", "target_length", "accumulation",
                     "beam", "warmup_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.rows % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} does not divide rows={self.rows}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be at least 0 and finite")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing} must be in [0, 1)")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32)")
        longest = max(self.source_length, self.target_length)
        if self.model.positions == "learned" and self.model.max_learned_positions < longest:
            raise ValueError(
                f"model.max_learned_positions={self.model.max_learned_positions} is less than the "
                f"packing lengths' {longest}"
            )
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

MAY_DIFFER = {
    "preset", "run", "steps", "save_every", "log_every", "evaluate_every", "most_skipped",
    "keep_checkpoints",
}  # fmt: skip
"""Fields that may change from one sitting to the next: they change no update, or (steps) extend."""


@dataclasses.dataclass(frozen=True)
class Lexicons:
    """The words of one run, and its vocabularies."""

    train: Lexicon
    valid: Lexicon
    test: Lexicon
    letters: Vocabulary
    phones: Vocabulary

    def parts(self) -> dict[str, Lexicon]:
        """The words by what they are for."""
        return {"training": self.train, "validation": self.valid, "test": self.test}


def load_lexicons(config: PronounceConfig) -> Lexicons:
    """CMUdict under its split, or the files that the config names.

    Raises DataError: a file that is missing, empty or malformed.
    """
    if config.train_file is None:
        parts = data.split_by_family(data.load_cmudict())
    else:
        train = data.read_lexicon(config.train_file)
        if config.valid_file is None:
            train, valid = data.carve_validation(train)
        else:
            valid = data.read_lexicon(config.valid_file)
        parts = train, valid, data.read_lexicon(config.test_file) if config.test_file else valid
    # Of all parts, so that a rare letter in a test word is a hard word, not an error.
    letters = Vocabulary.of(word for part in parts for word in part)
    phones = Vocabulary.of(p for part in parts for variants in part.values() for p in variants)
    return Lexicons(*parts, letters, phones)


def resolve(config: PronounceConfig, lexicons: Lexicons) -> PronounceConfig:
    """The config with the vocabulary sizes of the data.

    Raises DataError where --model names other sizes than the data has.
    """
    sizes = {"vocab_size": lexicons.phones.size, "source_vocab_size": lexicons.letters.size}
    default = PRESETS["default"].model
    for name, size in sizes.items():
        asked = getattr(config.model, name)
        if asked not in (size, getattr(default, name)):
            raise DataError(f"--model.{name}={asked}, but the data's vocabulary has {size} symbols")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))


def make_learning_rate(config: PronounceConfig) -> Callable:
    """The schedule that the config names, with its peak at `learning_rate`."""
    if config.schedule == "paper":
        d_model, warmup = config.model.d_model, config.warmup_steps
        papers_peak = (d_model * warmup) ** -0.5
        return paper_schedule(d_model, warmup, config.learning_rate / papers_peak)
    warmup = min(config.warmup_steps, config.steps // 2)
    return cosine_schedule(config.learning_rate, warmup, config.steps)


@dataclasses.dataclass(frozen=True)
class Score:
    """Error rates as fractions, and the hypotheses that they come from."""

    wer: float
    per: float
    hypotheses: list[tuple[str, ...]]


def score(pronouncer: Pronouncer, lexicon: Lexicon, beam: int | None = None) -> Score:
    """WER and PER of the best pronunciations of all words of a lexicon."""
    hypotheses = [p.phones for p in pronouncer(list(lexicon), beam)]
    references = list(lexicon.values())
    return Score(
        metrics.word_error_rate(hypotheses, references),
        metrics.phone_error_rate(hypotheses, references),
        hypotheses,
    )


def make_evaluate(
    config: PronounceConfig, lexicons: Lexicons, pronouncer: Pronouncer
) -> Callable[[Any], dict[str, float]]:
    """params -> `valid_loss` (nats a sound, no smoothing, no dropout), `valid_wer`, `valid_per`.

    The words are decoded greedily: this is to watch the training, and the beam is for the result.
    """
    made = data.examples(lexicons.valid, lexicons.letters, lexicons.phones)
    arrays = packed_rows(made, config.source_length, config.target_length)
    missing = -len(arrays["source"]) % config.rows  # rows of padding, so that one shape serves all
    batches = [
        {k: np.pad(v, ((0, missing), (0, 0)))[i : i + config.rows] for k, v in arrays.items()}
        for i in range(0, len(arrays["source"]), config.rows)
    ]
    loss = jax.jit(lambda params, b: summed_loss(pronouncer.model, params, b, BOS, smoothing=0.0))

    def evaluate(params: Any) -> dict[str, float]:
        sums = jax.device_get([loss(params, batch) for batch in batches])
        found = score(dataclasses.replace(pronouncer, params=params), lexicons.valid, beam=1)
        valid_loss = sum(float(s) for s, _ in sums) / sum(int(n) for _, n in sums)
        return {"valid_loss": valid_loss, "valid_wer": found.wer, "valid_per": found.per}

    return evaluate


def fit(
    config: PronounceConfig,
    lexicons: Lexicons,
    examples: list[dict[str, Any]],
    identity: dict[str, Any],
    folder: RunFolder,
) -> tuple[Pronouncer, dict[str, Any]]:
    """Trains (or goes on training); returns the pronouncer and what there is to say of the run.

    Raises SystemExit after SIGINT or SIGTERM, with everything saved.
    """
    model = Transformer(config.model)
    learning_rate = make_learning_rate(config)
    optimizer = make_optimizer(learning_rate, config.clip)
    train_step = make_train_step(
        model, optimizer, bos=BOS, smoothing=config.smoothing, accumulation=config.accumulation
    )
    batches = packed_batches(
        examples, rows=config.rows, source_length=config.source_length,
        target_length=config.target_length, seed=config.seed,
    )  # fmt: skip
    schedule = Schedule(
        config.steps, config.log_every, config.evaluate_every, config.save_every,
        config.most_skipped, config.keep_checkpoints,
    )  # fmt: skip
    with StopSignal() as stop:
        # A raw key: a plain array, like all else in the state.
        state = init_state(model, optimizer, jax.random.PRNGKey(config.seed))
        untrained = Pronouncer(
            model, state.params, lexicons.letters, lexicons.phones,
            config.source_length, config.target_length, config.beam, config.alpha,
        )  # fmt: skip
        trained, facts = train(
            jax.jit(skip_nonfinite(train_step), donate_argnums=0), state, batches, folder, schedule,
            learning_rate=learning_rate,
            evaluate=make_evaluate(config, lexicons, untrained),
            identity=identity,
            stop=stop,
        )  # fmt: skip
    parameters = sum(x.size for x in jax.tree.leaves(trained.params))
    return dataclasses.replace(untrained, params=trained.params), {"parameters": parameters} | facts


def results_of(config: PronounceConfig, about: dict, valid: Score, test: Score) -> dict[str, Any]:
    """results.json: error rates as fractions."""
    return {
        "test_wer": test.wer,
        "test_per": test.per,
        "valid_wer": valid.wer,
        "valid_per": valid.per,
        "test_words": len(test.hypotheses),
        "valid_words": len(valid.hypotheses),
        **about,
        "seed": config.seed,
        "beam": config.beam,
        "weights": "of the last step",
    }


def prepare(config: PronounceConfig, lexicons: Lexicons) -> tuple[list[dict[str, Any]], str]:
    """The training examples, and the fingerprint of all data.

    Raises DataError for words that no packed row can hold.
    """
    vocabularies = (lexicons.letters, lexicons.phones)
    made = {name: data.examples(part, *vocabularies) for name, part in lexicons.parts().items()}
    for name, examples in made.items():
        try:
            data.check_lengths(examples, config.source_length, config.target_length)
        except DataError as error:
            raise DataError(f"{name} words: {error}") from None
    return made["training"], data.fingerprint(sum(made.values(), []), *vocabularies)


def run(config: PronounceConfig) -> None:
    """The whole job: data, training, evaluation, report."""
    lexicons = load_lexicons(config)
    config = resolve(config, lexicons)
    examples, fingerprint = prepare(config, lexicons)
    folder = RunFolder(config.run)
    as_json = plain(config) | {"data_sha256": fingerprint}
    vocabularies = {"letters": lexicons.letters.to_json(), "phones": lexicons.phones.to_json()}
    identity = {name: value for name, value in as_json.items() if name not in MAY_DIFFER}
    identity = json.loads(json.dumps(identity | {"vocabularies": vocabularies}))
    check = partial(check_newest, folder, config.steps, identity)
    with folder.claim(as_json, MAY_DIFFER, check):
        done = folder.read("results.json")
        if done and done.get("steps") == config.steps:
            print(f"{config.run} is finished ({config.steps} steps); a larger --steps extends it")
            return
        if done:
            folder.set_aside(done.get("steps", 0))
        sizes = [f"{len(part):,} {name} words" for name, part in lexicons.parts().items()]
        print(*sizes, f"{config.model.parameter_count():,} parameters", sep=", ", flush=True)
        pronouncer, about = fit(config, lexicons, examples, identity, folder)
        valid, test = score(pronouncer, lexicons.valid), score(pronouncer, lexicons.test)
        results = results_of(config, about, valid, test)
        report(as_json, lexicons, folder, pronouncer, results, test.hypotheses)
        about_params = {"config": json.dumps(as_json["model"]), "steps": str(results["steps"])}
        with named(folder.path / "params.safetensors"):
            export_params(folder.path / "params.safetensors", pronouncer.params, about_params)
        # Last, so that a folder with results is a folder with everything.
        write_json(folder.path / "results.json", results)
