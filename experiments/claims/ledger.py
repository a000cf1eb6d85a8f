"""The claims command: measures and judges the eleven questions, and writes the ledger."""

import dataclasses
import hashlib
import json
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Literal

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
from experiments.progress import ProgressBar

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
"""What each takes in the default preset on two cores, for the remaining time alone."""


class ClaimsError(UserError):
    """The ledger cannot be written as asked; the message says why."""


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
    beside = ("data/pronunciations", "data/packing", "data/vocabulary", "reporting/style")
    shared += [here.parent / f"{name}.py" for name in beside]
    core = sorted((here.parent.parent / "tfm").rglob("*.py"))
    digest = hashlib.sha256()
    for file in (own, *shared, *core):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class _Measuring:
    """The progress bar of the ledger, in the expected seconds of its claims."""

    def __init__(self, bar: ProgressBar, count: int) -> None:
        self._bar, self._count, self._number, self._done = bar, count, 0, 0.0
        self._started = time.monotonic()

    def begin(self, claim: Claim) -> None:
        self._number += 1
        self._name = f"claim {self._number}/{self._count}: {claim.id}"
        self._expected, self._claim_started = _SECONDS[claim.id], time.monotonic()
        self._show("measuring")

    def report(self, share: float, status: str) -> None:
        """Called by a training; `share` is of that training alone."""
        if self._done:  # the finished claims give the speed of this machine
            pace = self._done / (self._claim_started - self._started)
            done = (time.monotonic() - self._claim_started) * pace
            self._bar.reached(self._done + min(done, 0.95 * self._expected))
        self._show(f"training {share:.0%}  {status}")

    def end(self, claim: Claim, record: dict[str, Any]) -> None:
        self._done += self._expected
        self._bar.reached(self._done)
        self._bar.say(f"{claim.id}  {record['seconds']:.0f} s")
        for subclaim in record["subclaims"]:
            line = f"{subclaim['verdict']}: {subclaim['statement']}"
            self._bar.say(textwrap.fill(line, 80, initial_indent="  ", subsequent_indent="    "))

    def _show(self, status: str) -> None:
        self._bar.now(self._name)
        self._bar.update(status)


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
    """The finished records by id; ClaimsError for a file that is not a ledger."""
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
    """Measures the chosen claims without a valid record; rewrites the ledger after each."""
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
    stale = [claim for claim in chosen if _stale(claim, records)]
    expected = sum(_SECONDS[claim.id] for claim in stale)
    with (
        folder.claim(settings, ()),
        ProgressBar("claims", expected, counted=False, first_counts=True) as bar,
    ):
        measuring = _Measuring(bar, len(stale))
        budget = dataclasses.replace(
            PRESETS[config.preset], first_seed=config.seed, report=measuring.report
        )
        for claim in chosen:
            if not (why := _stale(claim, records)):
                bar.say(f"{claim.id}  kept, measured before")
                continue
            if claim.id in records:
                bar.say(f"{claim.id}  {why}")
            measuring.begin(claim)
            records[claim.id] = measure(claim, budget, folder)
            in_order = [records[name] for name in CLAIMS if name in records]
            write_json(file, in_order)
            write_report(folder.report, in_order, settings)
            measuring.end(claim, records[claim.id])
    print(f"{len(records)} of {len(CLAIMS)} claims measured: {folder.report}")


def _stale(claim: Claim, records: dict[str, dict[str, Any]]) -> str:
    """The reason to measure a claim; '' where its record is still valid."""
    if claim.id not in records:
        return "not measured yet"
    changed = records[claim.id]["code"] != code_of(claim)
    return "measured again: its code has changed since" if changed else ""
