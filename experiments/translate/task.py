"""Learn to translate from parallel text of one's own."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import chex
import numpy as np

from experiments.checkpoints.checkpoint import Checkpoints, state_sha256
from experiments.checkpoints.run_folder import RunFolder, RunFolderError, named, plain, write_json
from experiments.checkpoints.trained import check_newest, without_moments, write_final
from experiments.data.cleaning import Clean
from experiments.data.subwords import Subwords, train_subwords
from experiments.data.text import CorpusError
from experiments.data.token_store import Store, fetch_store, plan_rows, stored_batches
from experiments.distributed.processes import Processes
from experiments.errors import UserError
from experiments.functions import check_folder, identity_of, keep_copy, make_model
from experiments.inference.translator import Settings, Translator, load
from experiments.training.config import decide_compute_dtype, parameter_count
from experiments.training.placement import Layout, divisible
from experiments.training.task import (
    check_same_run,
    distributed_session,
    make_valid_loss,
    train_model,
    write_params,
)
from experiments.translate.config import MAY_DIFFER, TranslateConfig, configured
from experiments.translate.report import report
from experiments.translate.scores import make_evaluate, results_of, scores, translated
from experiments.translate.texts import Texts, read
from tfm.averaging import average
from tfm.parallel.mesh import fit_vocabulary


def _vocabulary(
    config: TranslateConfig, folder: RunFolder, clean: Clean, start: Translator | None
) -> tuple[Subwords, Subwords]:
    """Those of the model to start from, of an earlier sitting, or one trained for both sides."""
    place = folder.path / "vocabulary"
    if place.exists():
        return Subwords.load(place, "source"), Subwords.load(place, "target")
    if start is not None:
        source, target = start.source, start.target
    else:
        print("training the vocabulary …", flush=True)
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
    """The config with the vocabulary sizes of the data; that of a model to start from has them.
    They are padded as in the folder's last sitting.

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


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that a training needs."""

    config: TranslateConfig
    source: Subwords
    target: Subwords
    store: Store
    identity: dict[str, Any]


def prepare(
    config: TranslateConfig,
    texts: Texts,
    folder: RunFolder,
    start: Translator | None,
    as_json: dict[str, Any],
) -> Prepared:
    """Cleans and encodes the training text, or finds what an earlier sitting made of it."""
    clean = Clean(texts.train, config.limits, [*texts.valid, *texts.test])
    source, target = _vocabulary(config, folder, clean, start)
    config = resolve(config, source, target, folder)
    lengths = config.source_length, config.target_length
    place = folder.path / "tokens"
    was_there = place.exists()
    store, why = fetch_store(place, clean, source, target, lengths, texts.sha256)
    if why and was_there:
        print(f"{why}; written anew", file=sys.stderr)
    cleaned = store.facts["cleaned"]
    print(f"training text: {cleaned['pairs']:,} pairs, {cleaned['kept']:,} kept", flush=True)
    settings = Settings(*lengths, config.beam, config.alpha, config.penalty)
    identity = {name: value for name, value in as_json.items() if name not in MAY_DIFFER} | {
        "model": plain(config.model),
        "settings": plain(settings),
        "vocabulary_sha256": {"source": source.sha256, "target": target.sha256},
        "tokens_sha256": store.sha256,
    }
    return Prepared(config, source, target, store, json.loads(json.dumps(identity)))


def valid_examples(prepared: Prepared, texts: Texts) -> list[dict[str, np.ndarray]]:
    """The validation pairs that have a part in the loss: those that a packed row can hold."""
    config = prepared.config
    examples = [
        {"source": np.array(source, np.int32), "target": np.array(target, np.int32)}
        for source, target in zip(
            prepared.source.encode_all(source for source, _ in texts.valid),
            prepared.target.encode_all(target for _, target in texts.valid),
            strict=True,
        )
        if len(source) <= config.source_length and len(target) <= config.target_length
    ]
    if not examples:
        raise CorpusError("no validation pair is short enough for --source-length, --target-length")
    return examples


def learn(
    prepared: Prepared,
    texts: Texts,
    start: Translator | None,
    folder: RunFolder,
    layout: Layout,
    processes: Processes,
) -> tuple[Translator, dict[str, Any]]:
    """Trains (or goes on training); the translator with the weights that `weights` names, and what
    there is to say of the run.

    Raises SystemExit after SIGINT or SIGTERM, with everything saved.
    """
    config = prepared.config
    check_same_run(processes, prepared.identity)
    plan = plan_rows(
        prepared.store, source_length=config.source_length, target_length=config.target_length,
        seed=config.seed,
    )  # fmt: skip
    batches = stored_batches(prepared.store, plan, rows=config.rows, own=layout.own_rows)
    settings = Settings(**prepared.identity["settings"])
    model = make_model(config.model, config.functions)
    untrained = Translator(model, {}, prepared.source, prepared.target, settings)
    bos = prepared.target.bos
    valid_loss = make_valid_loss(config, valid_examples(prepared, texts), bos, layout)
    params, facts = train_model(
        config, bos, batches, valid_loss, make_evaluate(texts, untrained, config.evaluated),
        prepared.identity, folder, layout, processes,
        initial=None if start is None else fit_vocabulary(start.params, config.model),
    )  # fmt: skip
    told = "of the last step"
    if processes.is_first:
        params, told = chosen_weights(config, folder, params)
    return dataclasses.replace(untrained, params=params), facts | {"weights": told}


def chosen_weights(
    config: TranslateConfig, folder: RunFolder, last: chex.ArrayTree
) -> tuple[chex.ArrayTree, str]:
    """The parameters that `weights` names, and what they are in words."""
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


def finish(
    prepared: Prepared, texts: Texts, translator: Translator, about: dict[str, Any],
    folder: RunFolder, as_json: dict[str, Any],
) -> None:  # fmt: skip
    """Translates and scores validation and test, and writes all that a finished run holds."""
    config = prepared.config
    print(f"translating {len(texts.test):,} test sentences, beam {config.beam} …", flush=True)
    translations, measured = {}, {}
    for part in ("test", "valid"):
        sources, references = zip(*getattr(texts, part), strict=True)
        if part == "valid" and texts.valid is texts.test:
            translations[part], measured[part] = translations["test"], measured["test"]
            continue
        translations[part] = translated(translator, sources)
        measured[part] = scores(translations[part], list(references))
    results = results_of(config, prepared.store, prepared.target.size, about, measured, texts)
    write_final(folder, translator.params, results["steps"], prepared.identity)
    report(as_json, folder, results, texts.test, translations["test"])
    write_params(folder, config.model, translator.params, results["steps"])
    # Last, so that a folder with results is a folder with everything.
    write_json(folder.path / "results.json", results)


def begun_from(config: TranslateConfig, start: Translator) -> TranslateConfig:
    """The config with the model of the run to start from.

    Raises UserError where flags ask for another model or vocabulary, or the lengths for more than
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


def is_finished(config: TranslateConfig, results: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether the results, made with the config `before`, are all that this command could make."""
    as_far = results.get("steps") == config.steps or (
        # Its patience ended it, and would again.
        results.get("asked_steps") == config.steps and before.get("patience") == config.patience
    )
    return as_far and before.get("weights") == config.weights


@contextlib.contextmanager
def _withdrawn_unless_begun(folder: RunFolder) -> Iterator[None]:
    """Where text or flags are refused before the first step, takes back what was made of them.

    Else the folder would refuse the same command with the mistake mended.
    """
    try:
        yield
    except UserError:
        begun = ("resumed_from.json", "results.json", "checkpoints", "final")
        if not any((folder.path / name).exists() for name in begun):
            for name in ("vocabulary", "vocabulary.partial", "tokens"):
                shutil.rmtree(folder.path / name, ignore_errors=True)
            (folder.path / "config.json").unlink(missing_ok=True)
        raise


def run(config: TranslateConfig) -> None:
    """The whole job: text, vocabulary, training, translation of the test, report."""
    with distributed_session(config) as processes:
        check_folder(RunFolder(config.run), config.functions)
        functions_of = identity_of(config.functions)  # a wrong file before the text is read
        texts = read(config)
        start = None
        if config.from_run is not None:
            start = load(config.from_run, functions=config.functions)
            config = begun_from(config, start)
        model = decide_compute_dtype(config.model, RunFolder(config.run))
        config = dataclasses.replace(config, model=model)
        make_model(model, config.functions)  # so that what does not fit is told at once
        model = divisible(model, config.mesh)
        layout = Layout(config.mesh, model, config.rows, config.accumulation)
        as_json = plain(config) | {"task": "translate", "corpora": texts.sha256} | functions_of
        if start is not None:
            as_json["start_sha256"] = state_sha256(without_moments(start.params, 1), None)
        check_same_run(processes, as_json)
        if processes.is_first:
            lead(config, texts, start, as_json, layout, processes)
        elif processes.from_first(slow=True):  # the vocabulary and the tokens are there
            prepared = prepare(config, texts, RunFolder(config.run), start, as_json)
            learn(prepared, texts, start, RunFolder(config.run), layout, processes)


def lead(
    config: TranslateConfig,
    texts: Texts,
    start: Translator | None,
    as_json: dict[str, Any],
    layout: Layout,
    processes: Processes,
) -> None:
    """What one process does for all: it holds the folder, makes the vocabulary, and reports."""
    folder = RunFolder(config.run)
    with folder.claim(as_json, MAY_DIFFER, rewrite=False), _withdrawn_unless_begun(folder):
        done = folder.read("results.json")
        if done and is_finished(config, done, folder.read("config.json")):
            processes.from_first(False, slow=True)
            flag = "steps" if done["steps"] == config.steps else "patience"
            print(f"{config.run} is finished ({done['steps']} steps); a larger --{flag} extends it")
            return
        prepared = prepare(config, texts, folder, start, as_json)
        as_json |= plain(prepared.config)
        check_newest(folder, config.steps, prepared.identity)
        write_json(folder.path / "config.json", as_json)
        keep_copy(folder.path, config.functions)
        if done:
            folder.set_aside(done.get("steps", 0))
        print(
            f"{len(prepared.store):,} training pairs, {len(texts.valid):,} validation, "
            f"{len(texts.test):,} test, {prepared.target.size:,} pieces, "
            f"{parameter_count(prepared.config):,} parameters", flush=True,
        )  # fmt: skip
        processes.from_first(True, slow=True)
        translator, about = learn(prepared, texts, start, folder, layout, processes)
        finish(prepared, texts, translator, about | {"asked_steps": config.steps}, folder, as_json)
