"""The translation task: trains on the user's parallel text."""

import dataclasses
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import numpy as np

from experiments.checkpoints.checkpoint import Checkpoints, state_sha256
from experiments.checkpoints.run_folder import RunFolder, RunFolderError, named, plain
from experiments.checkpoints.trained import without_moments, write_final
from experiments.data.cleaning import Clean, Cleaned
from experiments.data.subwords import Subwords, train_subwords
from experiments.data.text import CorpusError
from experiments.data.token_store import Store, fetch_store, plan_rows, stored_batches
from experiments.errors import UserError
from experiments.functions import check_folder, identity_of, make_model
from experiments.inference.predictor import Predictor, Settings
from experiments.inference.saved import load_translation
from experiments.progress import ProgressBar
from experiments.training.config import decide_compute_dtype, parameter_count
from experiments.training.fitting import TrainingData, train_model
from experiments.training.placement import Layout, divisible
from experiments.training.run import Run, make_identity
from experiments.training.task import carry_out, distributed_session
from experiments.translate.config import MAY_DIFFER, TranslateConfig, configured
from experiments.translate.report import report, show
from experiments.translate.scores import (
    make_evaluate,
    results_of,
    scores,
    tokenizer,
    translated,
)
from experiments.translate.texts import Texts, read
from tfm.averaging import average
from tfm.parallel.mesh import fit_vocabulary


def _vocabulary(
    config: TranslateConfig, folder: RunFolder, clean: Clean, start: Predictor | None
) -> tuple[Subwords, Subwords]:
    """Both vocabularies: of the run folder, of the model to start from, or trained jointly."""
    place = folder.path / "vocabulary"
    if place.exists():
        return Subwords.load(place, "source"), Subwords.load(place, "target")
    if start is not None:
        source, target = start.source, start.target
    else:
        lines = itertools.chain.from_iterable(clean)
        source = target = train_subwords(
            lines, config.vocabulary_size, config.subwords, config.seed
        )
    with named(place):
        partial_place = place.with_name("vocabulary.partial")
        source.save(partial_place, "source")
        target.save(partial_place, "target")
        partial_place.rename(place)
    return source, target


def resolve(
    config: TranslateConfig, source: Subwords, target: Subwords, folder: RunFolder | None = None
) -> TranslateConfig:
    """The config with the vocabulary sizes of the data, or of the model to start from.

    They are padded as in the folder's config.json.

    Raises UserError where --model names other sizes than the vocabularies have.
    """
    if config.from_run is not None:  # two vocabularies may share its one matrix, as Marian's do
        return dataclasses.replace(config, model=divisible(config.model, config.mesh, folder))
    usual = configured(config.preset, config.variant)["model"]
    own_source = config.model.source_vocab_size is not None or source.sha256 != target.sha256
    sizes = {"vocab_size": target.size, "source_vocab_size": source.size if own_source else None}
    for name, size in sizes.items():
        asked = getattr(config.model, name)
        if asked not in (size, getattr(usual, name)):
            raise UserError(
                f"--model.{name.replace('_', '-')}={asked}, but the vocabulary has {size} pieces: "
                "see --vocabulary-size"
            )
    model = divisible(dataclasses.replace(config.model, **sizes), config.mesh, folder)
    return dataclasses.replace(config, model=model)


def valid_examples(
    config: TranslateConfig, texts: Texts, source: Subwords, target: Subwords
) -> list[dict[str, np.ndarray]]:
    """The validation pairs of the loss: those that fit into a packed row."""
    ids = zip(
        source.encode_all(sentence for sentence, _ in texts.valid),
        target.encode_all(sentence for _, sentence in texts.valid),
        strict=True,
    )
    examples = [
        {"source": np.array(source, np.int32), "target": np.array(target, np.int32)}
        for source, target in ids
        if len(source) <= config.source_length and len(target) <= config.target_length
    ]
    if not examples:
        raise CorpusError("no validation pair is short enough for --source-length, --target-length")
    return examples


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run with its text as ids, ready to train."""

    run: Run
    texts: Texts
    start: Predictor | None
    source: Subwords
    target: Subwords
    store: Store
    valid: list[dict[str, np.ndarray]]

    def summary(self) -> str:
        return (
            f"{len(self.store):,} training pairs, {len(self.texts.valid):,} validation, "
            f"{len(self.texts.test):,} test, {self.target.size:,} pieces, "
            f"{parameter_count(self.run.config):,} parameters"
        )

    def train(self) -> tuple[Predictor, dict[str, Any]]:
        """Trains; returns the translator with the weights that `weights` names, and the facts.

        Raises SystemExit after SIGINT or SIGTERM, with everything saved.
        """
        run, config = self.run, self.run.config
        plan = plan_rows(
            self.store, source_length=config.source_length, target_length=config.target_length,
            seed=config.seed,
        )  # fmt: skip
        batches = stored_batches(self.store, plan, rows=config.rows, own=run.layout.own_rows)
        settings = Settings(**run.identity["settings"])
        untrained = Predictor(run.model, {}, self.source, self.target, settings)
        start = self.start
        initial = None if start is None else fit_vocabulary(start.params, config.model)
        data = TrainingData(batches, self.valid, self.target.bos)
        evaluate = make_evaluate(config, self.texts, untrained)
        params, facts = train_model(run, data, evaluate, initial)
        weights = "of the last step"
        if run.processes.is_first:
            params, weights = chosen_weights(config, run.folder, params)
        return dataclasses.replace(untrained, params=params), facts | {"weights": weights}

    def finish(
        self, translator: Predictor, facts: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[], None]]:
        """Translates and scores validation and test text, and writes the report."""
        run, config, texts = self.run, self.run.config, self.texts
        translations, measured = {}, {}
        for part in ("test", "valid"):
            sources, references = zip(*getattr(texts, part), strict=True)
            if part == "valid" and texts.valid is texts.test:
                translations[part], measured[part] = translations["test"], measured["test"]
                continue
            with ProgressBar(f"translating {part} sentences", len(sources)) as bar:
                translations[part] = translated(translator, sources, done=bar.advance)
                bar.reached(len(sources))  # blank ones are not translated
            tokenize = tokenizer(config, references)
            measured[part] = scores(translations[part], list(references), tokenize)
        about = facts | {"asked_steps": config.steps}
        results = results_of(config, self.store, self.target.size, about, measured, texts)
        write_final(run.folder, translator.params, results["steps"], run.identity)
        shown = results, texts.test, translations["test"]
        report(run.record, run.folder, *shown)
        return results, partial(show, *shown)


def chosen_weights(
    config: TranslateConfig, folder: RunFolder, last: chex.ArrayTree
) -> tuple[chex.ArrayTree, str]:
    """The parameters that `weights` names, and a description of them."""
    if config.weights == "last":
        return last, "of the last step"
    place = folder.best if config.weights == "best" else folder.checkpoints
    with Checkpoints(place, read_only=True) as checkpoints:
        steps = checkpoints.steps
        if not steps:
            raise RunFolderError(
                f"{place}: no checkpoint that --weights {config.weights} could take; "
                "--weights last takes the parameters of the last step"
            )
        trees = [checkpoints.restore_params(step, last) for step in steps]
    if config.weights == "best":
        return trees[-1], f"of step {steps[-1]}, the lowest validation loss"
    return average(trees), f"average of the steps {', '.join(map(str, steps))}"


def begun_from(config: TranslateConfig, start: Predictor) -> TranslateConfig:
    """The config with the model of the run to start from.

    Raises UserError where flags ask for another model or vocabulary, or where the lengths exceed
    its learned positions.
    """
    usual = configured(config.preset, config.variant)["model"]
    flags = [
        f"--model.{field.name.replace('_', '-')}"
        for field in dataclasses.fields(usual)
        if getattr(config.model, field.name)
        not in (getattr(usual, field.name), getattr(start.model.config, field.name), "auto")
    ]
    if config.vocabulary_size not in (None, start.target.size):
        flags.append("--vocabulary-size")
    if flags:
        raise UserError(
            f"{', '.join(flags)}: --from takes the model and the vocabulary of {config.from_run} "
            "as they are"
        )
    try:
        return dataclasses.replace(config, model=start.model.config)
    except ValueError as error:
        raise UserError(f"{config.from_run}: {error}") from None


@dataclasses.dataclass(frozen=True)
class TranslateTask:
    """The text of a run, and the model to start from where one is named."""

    run: Run
    texts: Texts
    start: Predictor | None
    may_differ = MAY_DIFFER
    makes = ("vocabulary", "vocabulary.partial", "tokens")

    def is_finished(self, results: dict[str, Any], config: dict[str, Any]) -> bool:
        wanted = self.run.config
        as_far = results.get("steps") == wanted.steps or (
            # Its patience ended it, and would again.
            results.get("asked_steps") == wanted.steps and config.get("patience") == wanted.patience
        )
        return as_far and config.get("weights") == wanted.weights

    def prepare(self) -> Prepared:
        """Cleans and encodes the training text, or opens what the run folder has of it."""
        run, config, texts = self.run, self.run.config, self.texts
        clean = Clean(texts.train, config.limits, [*texts.valid, *texts.test])
        source, target = _vocabulary(config, run.folder, clean, self.start)
        config = resolve(config, source, target, run.folder)
        lengths = config.source_length, config.target_length
        place = run.folder.path / "tokens"
        was_there = place.exists()
        store, why = fetch_store(place, clean, source, target, lengths, texts.sha256)
        if why and was_there:
            print(f"{why}; written anew", file=sys.stderr)
        print(f"training text: {Cleaned.from_json(store.facts['cleaned'])}", flush=True)
        settings = Settings(*lengths, config.beam, config.alpha, config.penalty)
        identity = make_identity(
            config,
            run.inputs,
            MAY_DIFFER,
            settings=plain(settings),
            vocabulary_sha256={"source": source.sha256, "target": target.sha256},
            tokens_sha256=store.sha256,
        )
        run = dataclasses.replace(run, config=config, identity=identity)
        valid = valid_examples(config, texts, source, target)
        return Prepared(run, texts, self.start, source, target, store, valid)


def run(config: TranslateConfig) -> None:
    """The translate command: text, vocabulary, training, test, report."""
    with distributed_session(config) as processes:
        folder = RunFolder(config.run)
        check_folder(folder, config.functions)
        inputs = identity_of(config.functions)  # refuses a wrong file before the text is read
        texts = read(config)
        inputs = {"task": "translate", "corpora": texts.sha256} | inputs
        start = None
        if config.from_run is not None:
            start = load_translation(config.from_run, config.functions)
            config = begun_from(config, start)
        config = dataclasses.replace(config, model=decide_compute_dtype(config.model, folder))
        make_model(config.model, config.functions)  # refuses what does not fit, before any work
        model = divisible(config.model, config.mesh)
        layout = Layout(config.mesh, model, config.rows, config.accumulation)
        if start is not None:
            inputs["start_sha256"] = state_sha256(without_moments(start.params, 1), None)
        # What its checkpoints are known by comes with the vocabulary.
        carry_out(TranslateTask(Run(config, {}, layout, processes, inputs), texts, start))
