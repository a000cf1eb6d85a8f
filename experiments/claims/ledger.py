"""The ledger of the eleven questions: measures, judges, keeps and shows."""

import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.checkpoints.run_folder import RunFolder, write_json, write_text
from experiments.claims import (
    attention,
    clipping,
    drawing,
    dropout,
    feedforward,
    heads,
    layernorm,
    multihead,
    output,
    positions,
    scaling,
    split,
)
from experiments.claims.evidence import Budget, Claim, judge
from experiments.claims.pages import publish, write_report
from experiments.errors import UserError

_MEMBERS = (scaling, heads, dropout, attention, multihead, positions, feedforward, split,
            layernorm, output, clipping)  # fmt: skip
CLAIMS: dict[str, Claim] = {member.CLAIM.id: member.CLAIM for member in _MEMBERS}
"""In the order of the questions."""

PRESETS = {
    "default": Budget(seeds=3, many=16, effort=1.0),
    "full": Budget(seeds=8, many=32, effort=4.0),
}

_SECONDS = {"scaling": 77, "heads": 110, "dropout": 79, "attention": 4, "multihead": 45,
            "positions": 73, "feedforward": 52, "split": 4, "layernorm": 116, "output": 31,
            "clipping": 65}  # fmt: skip
"""What each takes in the default preset on two cores, for the time left alone."""


class ClaimsError(UserError):
    """Why the ledger cannot be written as asked."""


@dataclasses.dataclass(frozen=True)
class ClaimsConfig:
    """Measure the source's eleven claims about the Transformer; verdicts, figures and a report.

    Finished claims are kept: interrupted, the same command goes on with the next one.
    """

    preset: Literal["default", "full"] = "default"
    """default: 3 seeds, minutes on two cores. full: 8 seeds and longer trainings, over an hour."""
    run: Path = Path("runs/claims")
    """Folder of the ledger: claims.json, report.html, figures/."""
    only: str = ""
    """Measure these alone, ids with commas between; '' means all eleven."""
    seed: int = 0
    """The first seed; the others follow it."""
    publish: Path | None = None
    """Measure nothing; write the ledger as claims.md, claims.zh.md and claims/ into this folder."""

    def chosen(self) -> list[Claim]:
        """The claims to measure; ClaimsError lists the known ones where one is unknown."""
        names = [name.strip() for name in self.only.split(",") if name.strip()] or list(CLAIMS)
        unknown = [name for name in names if name not in CLAIMS]
        if unknown:
            raise ClaimsError(f"no claim named {unknown[0]!r}; there are {', '.join(CLAIMS)}")
        return [claim for claim in CLAIMS.values() if claim.id in names]


def code_of(claim: Claim) -> str:
    """SHA-256 of all the code that a claim's record depends on."""
    here = Path(__file__).parent
    own = Path(str(sys.modules[claim.measure.__module__].__file__))
    shared = [here / f"{name}.py" for name in ("evidence", "study", "drawing")]
    beside = ("data/pronunciations", "data/packing", "data/vocabulary", "reporting/figures")
    shared += [here.parent / f"{name}.py" for name in beside]
    core = sorted((here.parent.parent / "tfm").rglob("*.py"))
    digest = hashlib.sha256()
    for file in (own, *shared, *core):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class _Progress:
    """The whole ledger as one bar on a terminal, a line now and then elsewhere."""

    SECONDS_BETWEEN_LINES = 30

    def __init__(self, claims: list[Claim]) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"),
            TextColumn("time left"), TimeRemainingColumn(compact=True),
            console=self._console, disable=not self._console.is_terminal,
            speed_estimate_period=3600,
        )  # fmt: skip
        self._total = sum(_SECONDS[c.id] for c in claims)
        self._task = self._bar.add_task("claims", total=self._total, status="")
        self._count, self._number, self._done, self._name = len(claims), 0, 0.0, ""
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, claim: Claim) -> None:
        self._number += 1
        self._name, self._claim_started = claim.id, time.monotonic()
        self.report(0.0, "measuring")

    def report(self, share: float, status: str) -> None:
        """Called by a training; `share` is of that training alone."""
        now = time.monotonic()
        pace = self._done / (now - self._started) if self._done else 1.0
        expected = _SECONDS[self._name]
        done = self._done + min((now - self._claim_started) * pace, 0.95 * expected)
        name = f"{self._number}/{self._count} {self._name}"
        self._bar.update(self._task, description=name, completed=done, status=status)
        if self._bar.disable and now - self._printed > self.SECONDS_BETWEEN_LINES:
            left = (self._total - done) * (now - self._started) / max(done, 1)
            line = f"{name}  {status}  training {share:.0%}  time left {left:.0f} s"
            print(line, file=sys.stderr)
            self._printed = now

    def end(self, claim: Claim, record: dict[str, Any]) -> None:
        self._done += _SECONDS[claim.id]
        self._bar.update(self._task, completed=self._done)
        self.say(f"{claim.id}  {record['seconds']:.0f} s")
        for subclaim in record["subclaims"]:
            self.say(f"  {subclaim['verdict']:<25}{subclaim['statement']}")

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def measure(claim: Claim, budget: Budget, folder: RunFolder) -> dict[str, Any]:
    """Measures and judges one claim, and writes its figure."""
    started = time.monotonic()
    estimates, figure = claim.measure(budget)
    subclaims = judge(claim.hypotheses, estimates)
    name = _figure_of(claim.id)
    (folder.path / "figures").mkdir(exist_ok=True)
    picture = drawing.evidence(figure, claim.id, claim.question.en, subclaims)
    write_text(folder.path / name, picture)
    return {
        "id": claim.id,
        "question": claim.question.en,
        "question_zh": claim.question.zh,
        "formula": claim.formula,
        "function": f"tfm.{claim.function.__name__}",
        "lesson": claim.lesson.en,
        "lesson_zh": claim.lesson.zh,
        "seconds": round(time.monotonic() - started, 1),
        "figure": name,
        "subclaims": subclaims,
        "code": code_of(claim),
    }


def _figure_of(name: str) -> str:
    return f"figures/{name}.svg"


def read_records(file: Path) -> dict[str, dict[str, Any]]:
    """The finished records by id; ClaimsError names a file that is no ledger."""
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
        for record in records:
            # The pages read the figure: a name from elsewhere must not lead elsewhere.
            if record["id"] not in CLAIMS or record["figure"] != _figure_of(record["id"]):
                raise ValueError(f"id {record['id']!r} with figure {record['figure']!r}")
        return {record["id"]: record for record in records}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ClaimsError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ClaimsError(f"{file}: not a ledger of claims ({error!r})") from None


def run(config: ClaimsConfig) -> None:
    """Measures what is chosen and not yet measured; rewrites the ledger after each claim."""
    chosen, folder = config.chosen(), RunFolder(config.run)
    file = folder.path / "claims.json"
    records = read_records(file)
    if config.publish is not None:
        measured_with = folder.read("config.json")
        if not (records and measured_with):
            raise ClaimsError(f"{config.run}: nothing measured yet to publish")
        publish(config.publish, records, folder.path, measured_with)
        return
    settings = {"preset": config.preset, "seed": config.seed}
    with (
        folder.claim(settings, ()),
        _Progress([c for c in chosen if _stale(c, records)]) as progress,
    ):
        budget = dataclasses.replace(
            PRESETS[config.preset], first_seed=config.seed, report=progress.report
        )
        for claim in chosen:
            if not (why := _stale(claim, records)):
                progress.say(f"{claim.id}  kept, measured before")
                continue
            if claim.id in records:
                progress.say(f"{claim.id}  {why}")
            progress.begin(claim)
            records[claim.id] = measure(claim, budget, folder)
            in_order = [records[name] for name in CLAIMS if name in records]
            write_json(file, in_order)
            write_report(folder.report, in_order, settings)
            progress.end(claim, records[claim.id])
    print(f"{len(records)} of {len(CLAIMS)} claims measured: {folder.report}")


def _stale(claim: Claim, records: dict[str, dict[str, Any]]) -> str:
    """Why a claim has to be measured; '' where its record stands."""
    if claim.id not in records:
        return "not measured yet"
    changed = records[claim.id]["code"] != code_of(claim)
    return "measured again: its code has changed since" if changed else ""
