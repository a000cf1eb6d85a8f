"""The bench command: times this library and its peers in turn, in fresh processes."""

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
from scipy.special import stdtrit

from experiments.bench.contenders import OURS, installed, version
from experiments.bench.drawing import bars
from experiments.bench.kept import Kept
from experiments.bench.limits import Limits
from experiments.bench.workloads import WORKLOADS, Workload
from experiments.checkpoints.run_folder import RunFolder, plain, write_json, write_text
from experiments.errors import UserError, install
from experiments.progress import ProgressBar
from experiments.reporting.tables import table

AGREE = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 2e-2}
"""How far a peer's loss or outputs may be from ours, by dtype, before it is no peer."""
SHORT, WIDE = 0.01, 0.03
"""Seconds below which a row is repeated until its interval is within ±3 %."""
_KEPT = ("seconds", "first_seconds", "peak_bytes")


class BenchError(UserError):
    """Something cannot be timed as asked; the message says why."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Time this library beside the peers that are installed (pip install "tfm[bench]").

    Each pair is one process of ours and one of the peer's, in turn; those of the first pair
    compile, and the others read what they compiled. Rows of less than 10 ms get more pairs, up to
    three times as many, until their interval is within ±3 %. Finished pairs are kept: interrupted,
    the same command goes on with the next one. Nothing else should run beside.

    With --device, what an accelerator does with this library is measured in the place of that; its
    flags: bench --device --help.
    """

    run: Path = Path("runs/bench")
    """Folder of the results: bench.json, bench.svg, pairs.jsonl."""
    only: str = ""
    """Time these alone: ids or their beginnings with commas between (T1,A1-64); '' means all."""
    pairs: int = 5
    """Pairs of each workload and peer, at least; the ratio is the median of theirs."""

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
    """Runs a worker and returns what it prints; BenchError with its last line where it fails."""
    command = [sys.executable, "-m", "experiments.bench.worker", work.id, name, str(weights), *more]
    # A check may compile what is timed, whose first run has to.
    environment = os.environ | compiled_in(weights.parent / ("check" if more else "timed"))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchError(f"{work.id}, {name}: exit code {done.returncode}: {why}")
    return done.stdout


def compiled_in(folder: Path) -> dict[str, str]:
    """The compilation cache of JAX and PyTorch: a contender's first process fills it and its later
    ones read it. It does not outlast the call."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }


def _check(work: Workload, name: str, weights: Path, folder: Path) -> np.ndarray:
    file = folder / "check.npy"
    _call(work, name, weights, "--check", str(file))
    return np.load(file)


def disagreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest of our values."""
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def interval(ratios: list[float]) -> tuple[float, float]:
    """The 95 % interval of the ratios' geometric mean, by Student's t; of one, itself."""
    logs = np.log(ratios)
    if len(logs) < 2:
        return ratios[0], ratios[0]
    half = stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / len(logs) ** 0.5
    return tuple(np.exp([logs.mean() - half, logs.mean() + half]).tolist())


def _ratios(pairs: list[dict[str, Any]]) -> list[float]:
    return [p["peer"]["seconds"] / p["ours"]["seconds"] for p in pairs]


def wants_more(pairs: list[dict[str, Any]], wanted: int) -> bool:
    """Whether a row needs more pairs: up to `wanted`, or three times as many where its runs are
    short and its interval is wide."""
    if len(pairs) < wanted:
        return True
    low, high = interval(_ratios(pairs))
    short = min(p[side]["seconds"] for p in pairs for side in ("ours", "peer")) < SHORT
    known = len(pairs) > 1 and high < low * (1 + WIDE) ** 2
    return short and not known and len(pairs) < 3 * wanted


def record(
    work: Workload, peer: str, pairs: list[dict[str, Any]], limits: Limits
) -> dict[str, Any]:
    """One row: medians of seconds and of the pairs' ratios, with a 95 % interval; the ratio at the
    machine's limits, and the reached share of them."""
    ratios = _ratios(pairs)
    low, high = interval(ratios)

    def median(side: str, key: str) -> float:
        return statistics.median(p[side][key] for p in pairs)

    least = limits.seconds(work)
    row: dict[str, Any] = {
        "id": work.id, "what": work.what, "peer": version(peer), "goal": work.peers[peer],
        "our_seconds": median("ours", "seconds"), "peer_seconds": median("peer", "seconds"),
        "ratio": statistics.median(ratios), "low": low, "high": high, "pairs": len(pairs),
        "least_seconds": least, "limit": median("peer", "seconds") / least,
        "share": least / median("ours", "seconds"),
    }  # fmt: skip
    for name, side in (("our", "ours"), ("peer", "peer")):
        # Of the first pair alone, whose processes had to compile.
        row[f"{name}_first_seconds"] = pairs[0][side]["first_seconds"]
        row[f"{name}_peak_bytes"] = median(side, "peak_bytes")
    row["disagreement"] = pairs[0]["disagreement"]
    return row


def tables(records: list[dict[str, Any]]) -> list[Table]:
    """Tables of the records: the ratios, then the other measurements."""
    names = ("id", "peer")
    speed = table(
        "Seconds of one run; a ratio above 1: tfm is faster",
        names,
        ("tfm", "peer's", "ratio", "95 %", "goal"),
    )
    beside = table(
        "How near the machine's limits, and at what cost",
        names,
        ("limit", "share", "first, s", "peak, GB"),
    )
    for r in records:
        memory = (f"{r[f'{side}_peak_bytes'] / 1e9:.1f}" for side in ("our", "peer"))
        first = (f"{r[f'{side}_first_seconds']:.3g}" for side in ("our", "peer"))
        row = r["id"], _short(r["peer"])
        speed.add_row(
            *row, f"{r['our_seconds']:.3g}", f"{r['peer_seconds']:.3g}", f"{r['ratio']:.2f}",
            f"{r['low']:.2f}–{r['high']:.2f}", f"{r['goal']:g}",
        )  # fmt: skip
        beside.add_row(
            *row, f"{r['limit']:.2g}", f"{r['share']:.0%}", " / ".join(first), " / ".join(memory)
        )
    return [speed, beside]


def _short(peer: str) -> str:
    """The peer without its version."""
    return peer.split(" (")[0]


def _timed(work: Workload, name: str, weights: Path) -> dict[str, Any]:
    result = json.loads(_call(work, name, weights).splitlines()[-1])
    return {key: result[key] for key in _KEPT}


def _agreeing(
    work: Workload, peers: list[str], weights: Path, folder: Path, bar: ProgressBar
) -> dict[str, float]:
    """The largest difference of each peer whose outputs agree with ours; reports the others."""
    ours, bound, agreeing = _check(work, OURS, weights, folder), AGREE[work.dtype], {}
    for peer in peers:
        try:
            apart = disagreement(ours, _check(work, peer, weights, folder))
            if not apart <= bound:
                raise BenchError(
                    f"{work.id}: {peer} differs from ours by {apart:.1e}, above {bound:g}"
                )
            agreeing[peer] = apart
        except BenchError as error:
            bar.say(f"left out: {error}")
    return agreeing


def _key(work: Workload, peer: str) -> dict[str, str]:
    return {"id": work.id, "peer_version": version(peer)}


def _pairs(work: Workload, peers: list[str], kept: Kept) -> dict[str, list[dict[str, Any]]]:
    """The finished pairs of each peer."""
    return {peer: kept.of(_key(work, peer)) for peer in peers}


def _time_rounds(
    work: Workload, peers: list[str], kept: Kept, wanted: int, bar: ProgressBar
) -> dict[str, list[dict[str, Any]]]:
    """The pairs of each peer, after timing the missing ones. In a round ours runs once, then each
    peer that needs another pair."""
    pairs = _pairs(work, peers, kept)
    missing = [peer for peer in peers if wants_more(pairs[peer], wanted)]
    if not missing:
        return pairs
    bar.update(work.id)
    with tempfile.TemporaryDirectory() as name:
        weights = Path(name) / "weights.safetensors"
        agreeing = _agreeing(work, missing, weights, Path(name), bar)
        while turn := [peer for peer in agreeing if wants_more(pairs[peer], wanted)]:
            ours = _timed(work, OURS, weights)
            for peer in turn:
                try:
                    theirs = _timed(work, peer, weights)
                except BenchError as error:
                    bar.say(f"left out: {error}")
                    del agreeing[peer]
                    continue
                pair = {"ours": ours, "peer": theirs, "disagreement": agreeing[peer]}
                kept.add(_key(work, peer), pair)
                pairs[peer].append(pair)
                bar.say(
                    f"{work.id}  {peer}  pair {len(pairs[peer])}/{wanted}: "
                    f"{ours['seconds']:.4g} s and {theirs['seconds']:.4g} s, "
                    f"ratio {theirs['seconds'] / ours['seconds']:.2f}"
                )
    return pairs


def _limits(kept: Kept) -> Limits:
    """The machine's limits, measured now unless they are in the file."""
    key = {"id": "limits"}
    if not kept.of(key):
        command = [sys.executable, "-m", "experiments.bench.limits"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        kept.add(key, json.loads(done.stdout.splitlines()[-1]))
    measured = kept.of(key)[-1]
    return Limits(measured["flops"], measured["bandwidth"])


def _time_all(config: BenchConfig, chosen: list[Workload]) -> list[dict[str, Any]]:
    """Times the chosen workloads; writes bench.json after each."""
    kept, records = Kept(config.run / "pairs.jsonl"), []
    peers = {work.id: [peer for peer in work.peers if installed(peer)] for work in chosen}
    missing = sorted({peer for work in chosen for peer in work.peers if not installed(peer)})
    to_time = [
        work.id
        for work in chosen
        if any(wants_more(p, config.pairs) for p in _pairs(work, peers[work.id], kept).values())
    ]
    done = len(chosen) - len(to_time)
    with ProgressBar("timing", len(chosen), done, first_counts=True) as bar:
        if missing:
            absent = f"not installed, left out: {', '.join(missing)}"
            bar.say(f"{absent}; {install('bench')}")
        for work in chosen:
            try:
                timed = _time_rounds(work, peers[work.id], kept, config.pairs, bar)
                limits = _limits(kept)
                records += [record(work, p, pairs, limits) for p, pairs in timed.items() if pairs]
                write_json(config.run / "bench.json", records)
            except BenchError as error:
                bar.say(f"left out: {error}")
            if work.id in to_time:
                bar.advance()
    return records


def run(config: BenchConfig) -> None:
    """The whole benchmark; a peer that fails or is not installed is named, and the others go on."""
    chosen, folder = config.chosen(), RunFolder(config.run)
    with folder.claim(plain(config), {"run", "only", "pairs"}):
        records = _time_all(config, chosen)
        if not records:
            raise BenchError(f"nothing was timed: no peer is installed: {install('bench')}")
        write_text(config.run / "bench.svg", bars(records))
    Console().print(*tables(records))
    print("limit: the ratio at this machine's peak or memory bandwidth")
    print("share: how much of that tfm has")
    print("first: the first run of tfm / of the peer, compilation in it")
    print("peak: memory of the process of tfm / of the peer")
    print("; ".join(sorted({r["peer"] for r in records})), f"{os.cpu_count()} cores", sep="; ")
    print(config.run / "bench.json", config.run / "bench.svg", sep=", ")
