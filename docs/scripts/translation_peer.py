"""`torch.nn.Transformer` trained on the data of a finished translation run, for the same time.

    python -m docs.scripts.translation_peer --run RUN --minutes 30 \\
        --valid SOURCE TARGET --test SOURCE TARGET --out FOLDER

The same pairs, sizes, places of dropout, smoothing, optimizer, slots a batch, and learning rate by
the share of the training that is over; torch's layers (which end in a normalisation, and have
biases in the attention), initialisation and kernels, in f32 or under bf16 autocast, whichever is
faster. The best weights are imported, and our own beam search translates with them: the training
alone differs. It cannot be resumed, and needs requirements-bench.txt.

The clock runs for the peer's batches and updates alone. The `train_seconds` of a run are all that
passed from its first step to its last: its compilation, evaluations and checkpoints are in them.
With as many minutes the peer is thus given more of training.
"""

import argparse
import dataclasses
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional

from docs.scripts.torch_translation import (
    Learner,
    Peer,
    endless,
    make_valid_loss,
    padded,
    steps_per_second,
    train,
)
from experiments.checkpoints.run_folder import RunFolder, named, write_json
from experiments.data.text import Files, Pair
from experiments.data.token_store import open_store
from experiments.errors import UserError, told_in_one_line
from experiments.inference.predictor import Predictor
from experiments.inference.saved import load, write
from experiments.interop.links import tree
from experiments.interop.torch_names import TorchOptions
from experiments.interop.torch_transformer import read_model
from experiments.run import use_huge_pages
from experiments.training.config import TrainingConfig
from experiments.translate.scores import scores
from tfm.model import Transformer

TIMED = 11  # batches that decide on the mode
CHECKED = 8  # pairs on which the imported model and torch's must agree
APART = 1e-4

NEEDED = {"source_vocab_size": None, "norm_placement": "post", "activation": "relu",
          "positions": "sinusoidal", "sinusoid_layout": "interleaved", "first_position": 0,
          "scale_embeddings": True, "tied_output": True, "output_bias": False}  # fmt: skip


class PeerError(UserError):
    """Why a run has no such peer."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, and the text that it was validated and tested on."""

    path: Path
    config: TrainingConfig
    results: dict[str, Any]
    translator: Predictor
    valid: list[Pair]
    test: list[Pair]

    @property
    def slots(self) -> tuple[int, int]:
        """Those of a batch: of sources, of targets."""
        c = self.config
        return c.rows * c.source_length, c.rows * c.target_length

    def encoded(self) -> list[tuple[list[int], list[int]]]:
        """The validation pairs that a row of the run can hold: its own loss is of these."""
        sources, targets = zip(*self.valid, strict=True)
        pairs = zip(
            self.translator.source.encode_all(sources), self.translator.target.encode_all(targets),
            strict=True,
        )  # fmt: skip
        c = self.config
        return [(s, t) for s, t in pairs if len(s) <= c.source_length and len(t) <= c.target_length]


def read(path: Path, texts: dict[str, list[Path]]) -> Run:
    """Raises PeerError: the run is not finished, has an option that the peer has not, or was
    validated or tested on other text."""
    translator = load(path)
    folder = RunFolder(path)
    raw, results = folder.read("config.json") or {}, folder.read("results.json")
    if results is None or "rows" not in raw:
        raise PeerError(f"{path}: not a finished training: it has no results.json")
    model = translator.model.config
    found = raw | dataclasses.asdict(model)
    for name, value in (NEEDED | {"smoothed_over": "all"}).items():
        if found[name] != value:
            raise PeerError(f"{path}: {name}={found[name]!r}, and the peer is of {value!r} alone")
    pairs = {}
    for part, paths in texts.items():
        corpus = Files(tuple(paths))
        if corpus.identity() != raw["corpora"].get(part):
            raise PeerError(f"--{part} {' '.join(map(str, paths))}: not the {part} text of {path}")
        pairs[part] = list(corpus)
    fields = {f.name: raw[f.name] for f in dataclasses.fields(TrainingConfig)}
    config = TrainingConfig(**fields | {"model": model, "run": path})
    return Run(path, config, results, translator, **pairs)


def train_peer(run: Run, minutes: float, evaluate_minutes: float, best: Path) -> dict[str, Any]:
    """Trains in the faster mode, leaves the best weights in `best`, and says what happened."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.mha.set_fastpath_enabled(False)  # of evaluations: it warns of nested tensors
    torch.manual_seed(run.config.seed)
    config, bos = run.config, run.translator.target.bos
    model = Peer(config.model, max(config.source_length, config.target_length))
    batches = endless(open_store(run.path / "tokens"), run.slots, config.seed)
    valid_loss = make_valid_loss(run.encoded(), run.slots, bos)
    speeds = steps_per_second(model, config, bos, list(itertools.islice(batches, TIMED)))
    mode = max(speeds, key=lambda name: speeds[name])
    print(f"steps per second: {speeds}: {mode} is taken", flush=True)
    learner = Learner(model, config, bos, mode)
    facts = train(learner, batches, valid_loss, 60 * minutes, 60 * evaluate_minutes, best)
    parameters = sum(p.numel() for p in model.parameters())
    return {"mode": mode, "steps_per_second": speeds, "parameters": parameters} | facts


def imported(best: Path, run: Run) -> tuple[Predictor, float]:
    """The run's translator with the weights in `best`, and the largest difference of its
    log-probabilities from torch's on a few pairs; PeerError where that is more than rounding."""
    c, bos = run.config.model, run.translator.target.bos
    options = TorchOptions(
        num_heads=c.num_heads, layer_norm_epsilon=c.layer_norm_epsilon,
        sinusoid_layout="interleaved",
    )  # fmt: skip
    found = read_model(best, options)
    params = tree(found.arrays)
    model = Peer(c, max(run.config.source_length, run.config.target_length))
    model.load_state_dict(load_file(best))
    pairs = run.encoded()[:CHECKED]
    source, target = padded(tuple(zip(*pairs, strict=True)), np.arange(len(pairs)))
    target_input = functional.pad(target[:, :-1], (1, 0), value=bos)
    with torch.no_grad():
        theirs = model.eval()(source, target_input).log_softmax(-1).numpy()
    arrays = (np.asarray(ids, np.int32) for ids in (source, target_input))
    logits = Transformer(found.config).apply({"params": params}, *arrays)
    differences = np.abs(np.asarray(jax.nn.log_softmax(logits)) - theirs)
    apart = float(differences[np.asarray(target) != 0].max())
    if not apart <= APART:
        raise PeerError(f"log-probabilities of the imported model are {apart:.2g} off torch's")
    # Searched in the type that the run's own model was.
    config = dataclasses.replace(found.config, compute_dtype=c.compute_dtype)
    return dataclasses.replace(run.translator, model=Transformer(config), params=params), apart


def compare(run: Run, minutes: float | None, evaluate_minutes: float, out: Path) -> None:
    """Trains the peer and tests it: `out` becomes a run folder of it, for `predict`, with its
    weights, `peer.safetensors`, and `results.json`."""
    with named(out):
        out.mkdir(parents=True)
    minutes = run.results["train_seconds"] / 60 if minutes is None else minutes
    best = out / "peer.safetensors"
    facts = train_peer(run, minutes, evaluate_minutes, best)
    translator, apart = imported(best, run)
    write(out, translator, {"peer_of": str(run.path), "library": f"torch {torch.__version__}"})
    sources, references = zip(*run.test, strict=True)
    print(f"translating {len(sources):,} test sentences …", flush=True)
    measures = scores(translator(sources, long="split"), list(references))
    results = {f"test_{name}": measure.score for name, measure in measures.items()} | {
        "scores": {"test": {name: measure.to_json() for name, measure in measures.items()}},
        "peer": f"torch.nn.Transformer (torch {torch.__version__})",
        "asked_minutes": minutes,
        **facts,
        "import_disagreement": apart,
        "beam": run.translator.settings.beam,
        "alpha": run.translator.settings.alpha,
        "run": {
            name: run.results[name] for name in
            ("test_bleu", "test_chrf", "steps", "train_seconds", "parameters")
        },
    }  # fmt: skip
    write_json(out / "results.json", results)
    for name, measure in measures.items():
        print(f"{name} {measure}; the run's {run.results[f'test_{name}']:.2f}")


def main(flags: list[str]) -> None:
    """Parses the flags; what a user can mend is told in one line, with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished translate")
    parser.add_argument("--valid", type=Path, nargs="+", required=True, help="the run's --valid")
    parser.add_argument("--test", type=Path, nargs="+", required=True, help="the run's --test")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--minutes", type=float, help="of training; not given: as many as the run took in all"
    )
    parser.add_argument("--evaluate-minutes", type=float, default=2.0, help="of training between")
    given = parser.parse_args(flags)
    for name in ("minutes", "evaluate_minutes"):
        value = getattr(given, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {value} must be positive and finite")
    try:
        run = read(given.run, {"valid": given.valid, "test": given.test})
        compare(run, given.minutes, given.evaluate_minutes, given.out)
    except told_in_one_line() as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    use_huge_pages()  # as the run had them
    main(sys.argv[1:])
