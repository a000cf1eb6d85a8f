"""The referee: ours and a peer in turn, in fresh processes; ratios, a table and a picture."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.bench.contenders import OURS, installed, version
from experiments.bench.drawing import bars
from experiments.bench.kept import Kept
from experiments.bench.workloads import WORKLOADS, Training, Workload, training_flops
from experiments.errors import UserError
from experiments.run_folder import RunFolder, plain, write_json, write_text

AGREE = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 2e-2}
"""How far a peer's loss or outputs may be from ours, by dtype, before it is no peer."""
_KEPT = ("seconds", "first_seconds", "peak_bytes", "peak_flops")


class BenchError(UserError):
    """Why something cannot be timed as asked."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Time this library beside the peers that are installed (requirements-bench.txt).

    Each pair is one process of ours and one of the peer's, one after the other. Finished pairs are
    kept: interrupted, the same command goes on with the next one. Nothing else should run beside.

    With --device, what an accelerator does with this library is measured in the place of that; its
    flags: bench --device --help.
    """

    run: Path = Path("runs/bench")
    """Folder of the results: bench.json, bench.svg, pairs.jsonl."""
    only: str = ""
    """Time these alone: ids or their beginnings with commas between (T1,A1-64); '' means all."""
    pairs: int = 5
    """Pairs of each workload and peer; the ratio is the median of theirs."""

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs={self.pairs} must be at least 1")

    def chosen(self) -> list[Workload]:
        """The workloads to time; BenchError lists the known ones where one is unknown."""
        wanted = [name.strip() for name in self.only.split(",") if name.strip()] or [""]
        for name in wanted:
            if not any(_begins(known, name) for known in WORKLOADS):
                raise BenchError(f"no workload {name!r}; there are {', '.join(WORKLOADS)}")
        return [w for w in WORKLOADS.values() if any(_begins(w.id, name) for name in wanted)]


def _begins(known: str, name: str) -> bool:
    return not name or f"{known}-".startswith(f"{name}-")


def _call(work: Workload, name: str, weights: Path, *more: str) -> str:
    """What a worker prints; BenchError with its last line where it fails."""
    command = [sys.executable, "-m", "experiments.bench.worker", work.id, name, str(weights), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchError(f"{work.id}, {name}: exit code {done.returncode}: {why}")
    return done.stdout


def _check(work: Workload, name: str, weights: Path, folder: Path) -> np.ndarray:
    file = folder / "check.npy"
    _call(work, name, weights, "--check", str(file))
    return np.load(file)


def disagreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest of our values."""
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def record(work: Workload, peer: str, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: medians of seconds, the median ratio of pairs with its least and largest."""
    ratios = [p["peer"]["seconds"] / p["ours"]["seconds"] for p in pairs]

    def median(side: str, key: str) -> float:
        return statistics.median(p[side][key] for p in pairs)

    row: dict[str, Any] = {
        "id": work.id, "what": work.what, "peer": version(peer), "goal": work.peers[peer],
        "our_seconds": median("ours", "seconds"), "peer_seconds": median("peer", "seconds"),
        "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
        "pairs": len(pairs), "share_of_peak": None,
    }  # fmt: skip
    for key in ("first_seconds", "peak_bytes"):
        row |= {f"our_{key}": median("ours", key), f"peer_{key}": median("peer", key)}
    row["disagreement"] = pairs[0]["disagreement"]
    if isinstance(work, Training):
        flops = training_flops(work)
        shares = [flops / p["ours"]["seconds"] / p["ours"]["peak_flops"] for p in pairs]
        row |= {"share_of_peak": statistics.median(shares), "flops": flops}
    return row


def table(records: list[dict[str, Any]]) -> Table:
    """The records for a person to read."""
    shown = Table(title="Seconds of one run; a ratio above 1: tfm is faster")
    columns = ("id", "peer", "tfm", "peer's", "ratio", "range", "goal", "of peak", "first", "GB")
    for name in columns:
        shown.add_column(name, justify="left" if name in ("id", "peer") else "right", no_wrap=True)
    for r in records:
        share = "" if r["share_of_peak"] is None else f"{r['share_of_peak']:.0%}"
        memory = (f"{r[f'{side}_peak_bytes'] / 1e9:.1f}" for side in ("our", "peer"))
        first = (f"{r[f'{side}_first_seconds']:.2g}" for side in ("our", "peer"))
        shown.add_row(
            r["id"], _short(r["peer"]), f"{r['our_seconds']:.3g}", f"{r['peer_seconds']:.3g}",
            f"{r['ratio']:.2f}", f"{r['low']:.2f}–{r['high']:.2f}", f"{r['goal']:g}", share,
            " / ".join(first), " / ".join(memory),
        )  # fmt: skip
    return shown


def _short(peer: str) -> str:
    """The peer without its version."""
    return peer.split(" (")[0]


def _time_pairs(
    work: Workload, peer: str, kept: Kept, wanted: int, console: Console
) -> list[dict[str, Any]]:
    """The pairs of one row, those that are missing timed now."""
    key = {"id": work.id, "peer_version": version(peer)}
    done = kept.of(key)[:wanted]
    if len(done) == wanted:
        return done
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "weights.safetensors"
        apart = disagreement(
            _check(work, OURS, weights, folder), _check(work, peer, weights, folder)
        )
        bound = AGREE[work.dtype]
        if not apart <= bound:
            raise BenchError(f"{work.id}: {peer} differs from ours by {apart:.1e}, above {bound:g}")
        while len(done) < wanted:
            sides = {}
            for side, contender in (("ours", OURS), ("peer", peer)):
                result = json.loads(_call(work, contender, weights).splitlines()[-1])
                sides[side] = {key: result[key] for key in _KEPT if key in result}
            pair = sides | {"disagreement": apart}
            kept.add(key, pair)
            done.append(pair)
            ours, theirs = (sides[side]["seconds"] for side in ("ours", "peer"))
            console.print(
                f"{work.id}  {peer}  pair {len(done)}/{wanted}: {ours:.4g} s and {theirs:.4g} s, "
                f"ratio {theirs / ours:.2f}"
            )
    return done


def run(config: BenchConfig) -> None:
    """The whole benchmark; a peer that fails or is not installed is named, and the others go on."""
    chosen, console = config.chosen(), Console(stderr=True, highlight=False)
    folder = RunFolder(config.run)
    with folder.claim(plain(config), {"run", "only", "pairs"}):
        kept, records = Kept(config.run / "pairs.jsonl"), []
        rows = [(work, peer) for work in chosen for peer in work.peers]
        missing = sorted({peer for _, peer in rows if not installed(peer)})
        if missing:
            console.print(f"not installed, left out: {', '.join(missing)}")
        for work, peer in rows:
            if peer in missing:
                continue
            try:
                done = _time_pairs(work, peer, kept, config.pairs, console)
            except BenchError as error:
                console.print(f"left out: {error}")
                continue
            records.append(record(work, peer, done))
            write_json(config.run / "bench.json", records)
        if not records:
            raise BenchError("nothing was timed: no peer is installed (requirements-bench.txt)")
        write_text(config.run / "bench.svg", bars(records))
    Console(width=max(Console().width, 110)).print(table(records))
    print("first: seconds of the first run, compilation in it; GB: the process's peak memory")
    print("; ".join(sorted({r["peer"] for r in records})), f"{os.cpu_count()} cores", sep="; ")
    print(config.run / "bench.json", config.run / "bench.svg", sep=", ")
