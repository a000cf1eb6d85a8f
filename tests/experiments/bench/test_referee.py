import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.bench import kept, referee, worker
from experiments.bench.contenders import OURS, Contender
from experiments.bench.drawing import bars
from experiments.bench.limits import Limits, least_work, peak_flops, read_bandwidth
from experiments.bench.referee import (
    BenchConfig,
    BenchError,
    disagreement,
    interval,
    record,
    run,
    wants_more,
)
from experiments.bench.workloads import WORKLOADS
from experiments.plan.flops import decoding_flops, forward_flops, training_flops

PEER = "flax linen"  # always installed


def test_ids_are_chosen_by_their_beginnings():
    assert [work.id for work in BenchConfig(only="T4, A1-64").chosen()] == [
        "T4-f32", "T4-bf16", "A1-64-forward", "A1-64-both",
    ]  # fmt: skip
    assert len(BenchConfig().chosen()) == len(WORKLOADS)
    for wrong in ("T", "A1-6", "T1,nothing"):
        with pytest.raises(BenchError, match="no workload '.*'; there are T1, T2"):
            BenchConfig(only=wrong).chosen()
    with pytest.raises(ValueError, match="pairs=0 must be at least 1"):
        BenchConfig(pairs=0)


def side(seconds, **more):
    return {"seconds": seconds, "first_seconds": 10.0, "peak_bytes": 2e9} | more


def pairs_of(*seconds):
    return [
        {"ours": side(ours), "peer": side(peer), "disagreement": 1e-7} for ours, peer in seconds
    ]


LIMITS = Limits({"float32": 1e12, "bfloat16": 2e12, "int8": 4e12}, 1e11)


def test_a_record_has_the_median_of_the_pairs_ratios(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.1")  # installed or not
    pairs = pairs_of((1.0, 3.0), (2.0, 4.0), (4.0, 4.0))
    row = record(WORKLOADS["T1"], "torch eager", pairs, LIMITS)
    assert (row["ratio"], row["pairs"]) == (2.0, 3)
    assert (row["low"], row["high"]) == interval([3.0, 2.0, 1.0])
    assert (row["our_seconds"], row["peer_seconds"]) == (2.0, 4.0)
    assert (row["id"], row["goal"]) == ("T1", 2.2)
    row = record(WORKLOADS["A1-64-both"], PEER, pairs, LIMITS)
    assert row["peer"].startswith(f"{PEER} (flax 0.1)")


def test_the_interval_is_students_of_the_logarithms():
    # ln: 0, ln 2, ln 4; mean ln 2, deviation ln 2; t(0.975, 2) = 4.30265
    factor = 2 ** (4.30265273 / 3**0.5)
    assert interval([1.0, 2.0, 4.0]) == pytest.approx((2 / factor, 2 * factor))
    assert interval([1.7]) == (1.7, 1.7)


def test_short_rows_get_pairs_until_their_interval_is_narrow():
    def wanted(*seconds):
        return wants_more(pairs_of(*seconds), wanted=3)

    long, short = [(1.0, 1.0), (1.0, 2.0)], [(0.002, 0.002), (0.002, 0.004)]
    assert wanted() and wanted(*long) and wanted(*short)
    assert not wanted(*long, long[0])  # as wide, but long enough
    assert wanted(*short, short[0])
    assert not wanted(*[(0.002, 0.003)] * 3)
    assert wanted(*(4 * short)) and not wanted(*(4 * short), short[0])  # three times as many


def test_a_rows_limit_is_the_peak_or_the_bandwidth(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.1")
    work = WORKLOADS["T1"]
    least = work.rows * training_flops(work.config, work.length, work.length) / 1e12
    row = record(work, "torch eager", pairs_of((1.0, 2.0)), LIMITS)
    assert row["least_seconds"] == least == LIMITS.seconds(work)
    assert (row["limit"], row["share"]) == (2.0 / least, least)
    half = record(WORKLOADS["T2"], "torch eager", pairs_of((1.0, 2.0)), LIMITS)
    assert half["least_seconds"] == pytest.approx(least / 2)
    # One row a step is bound by reading 26 million weights at each of 64 steps.
    one = least_work(WORKLOADS["D1-b1"])
    assert one.bytes == 4 * 64 * (6 * (6 * 512**2 + 2 * 512 * 2048) + 512 * 8000)
    assert LIMITS.seconds(WORKLOADS["D1-b1"]) == one.bytes / 1e11
    assert least_work(WORKLOADS["D3"]).bytes == one.bytes / 4


def test_attention_needs_its_products_and_its_arrays():
    forward, both = (least_work(WORKLOADS[f"A1-64-{name}"]) for name in ("forward", "both"))
    assert forward == (4 * 32 * 8 * 64 * 64 * 64, 4 * 4 * 32 * 8 * 64 * 64)
    assert both == (3 * forward.flops, 2 * forward.bytes)


def test_decoding_needs_its_rows_hypotheses_and_steps():
    work, stopping = WORKLOADS["D2"], WORKLOADS["D2-stopping"]
    flops = decoding_flops(work.config, work.source, work.target, work.beam)
    assert least_work(work).flops == work.rows * flops
    encoder = work.rows * forward_flops(work.config, work.source, 0)
    parts = [least_work(each).flops - encoder for each in (stopping, work)]
    assert 0.6 < parts[0] / parts[1] < 5 / 8


def test_the_machine_is_measured():
    assert peak_flops("float32", n=64) > 1e7 and peak_flops("int8", n=64) > 1e7
    assert read_bandwidth(megabytes=1) > 1e7


def test_disagreement_is_relative_to_the_largest_value():
    assert disagreement(np.array([1.0, -4.0]), np.array([1.0, -4.4])) == pytest.approx(0.1)
    assert not disagreement(np.array([1.0]), np.array([np.nan])) <= 1e-4


def test_only_the_first_pair_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.1")
    first, *later = pairs_of((1.0, 2.0), (1.0, 2.0), (1.0, 2.0))
    for pair in later:
        pair["ours"]["first_seconds"] = pair["peer"]["first_seconds"] = 1.0
    row = record(WORKLOADS["A1-64-forward"], PEER, [first, *later], LIMITS)
    assert (row["our_first_seconds"], row["peer_first_seconds"]) == (10.0, 10.0)

    seen = []

    def process(command, env, **options):
        seen.append({k: v for k, v in env.items() if v.startswith(str(tmp_path))})
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(referee.subprocess, "run", process)
    for name, *more in ((OURS, "--check", "file"), (OURS,), (PEER,)):
        referee._call(WORKLOADS["T1"], name, tmp_path / "weights.safetensors", *more)
    check, *timed = (
        {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / folder / "jax"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / folder / "inductor"),
        }
        for folder in ("check", "timed", "timed")
    )
    assert seen == [check, *timed]


class Workers:
    """In the place of the processes: ours takes 1 second, the peer 2; who was called is kept."""

    def __init__(self, monkeypatch, apart=0.0, dies_at=None):
        monkeypatch.setattr(referee, "installed", lambda name: name == PEER)
        monkeypatch.setattr(referee, "_call", self)
        monkeypatch.setattr(referee, "_limits", lambda kept: LIMITS)
        self.calls, self.apart, self.dies_at = [], apart, dies_at

    def __call__(self, work, name, weights, *more):
        self.calls.append((work.id, name, *more[:1]))
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        if more:
            np.save(more[1], np.array([1.0 + (name != OURS) * self.apart]))
            return ""
        return "noise\n" + json.dumps(side(1.0 if name == OURS else 2.0, all_seconds=[1]))


def test_an_interrupted_run_goes_on_with_the_next_pair(tmp_path, monkeypatch, capsys):
    config = BenchConfig(run=tmp_path / "bench", only="A1-64-forward", pairs=3)
    # two checks, two pairs, and one process of the third
    workers = Workers(monkeypatch, dies_at=7)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    workers.dies_at = None
    run(config)
    timed = [call for call in workers.calls if len(call) == 2]
    assert timed[4:] == [("A1-64-forward", OURS)] + 1 * [
        ("A1-64-forward", OURS), ("A1-64-forward", PEER),
    ]  # fmt: skip
    count = len(workers.calls)
    run(config)  # all is there
    assert len(workers.calls) == count
    (row,) = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert (row["ratio"], row["pairs"], row["disagreement"]) == (2.0, 3, 0.0)
    said = capsys.readouterr()
    assert "not installed, left out: flax nnx, jax.nn, torch SDPA" in said.err
    assert "pair 3/3: 1 s and 2 s, ratio 2.00" in said.err and "A1-64-forward" in said.out
    monkeypatch.setattr(kept, "code_of", lambda: "other code")
    run(config)
    assert len(workers.calls) == count + 8  # nothing of the old code counts


def test_a_peer_that_computes_something_else_is_not_timed(tmp_path, monkeypatch, capsys):
    Workers(monkeypatch, apart=1e-3)
    with pytest.raises(BenchError, match="nothing was timed"):
        run(BenchConfig(run=tmp_path, only="A1-64-forward", pairs=1))
    assert f"A1-64-forward: {PEER} differs from ours by 1.0e-03, above 0.0001" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_worker_warms_up_and_counts_enough_runs(monkeypatch):
    monkeypatch.setattr(worker, "LEAST_SECONDS", 0.0)
    calls = []
    contender = Contender(lambda: calls.append(1), lambda: np.zeros(1))
    result = worker.measure(WORKLOADS["A1-64-forward"], contender)
    assert len(calls) == worker.WARM_UP + worker.LEAST_RUNS
    assert len(result["all_seconds"]) == worker.LEAST_RUNS
    assert result["peak_bytes"] > 1e7


def test_a_stream_is_timed_by_its_real_tokens(monkeypatch):
    monkeypatch.setattr(worker, "STREAM_SECONDS", 0.0)
    clock = iter(range(100))  # every look at the clock is a second later
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(clock))
    contender = Contender(lambda: 500, lambda: np.zeros(1))
    result = worker.measure(WORKLOADS["T3"], contender)
    assert result["seconds"] == 2.0  # 3 seconds for 1,500 tokens


def test_the_picture_names_every_row():
    rows = [
        record(WORKLOADS[f"A1-64-{n}"], PEER, pairs_of((1.0, 0.5)), LIMITS)
        for n in ("forward", "both")
    ]
    svg = bars(rows)
    assert (
        svg.startswith('<svg xmlns="http') and "A1-64-both" in svg and PEER in svg and "0.50" in svg
    )


@pytest.mark.slow
def test_the_command_times_the_peers_that_are_installed(tmp_path):
    command = [sys.executable, "-m", "experiments.run", "bench", "--run", str(tmp_path / "bench")]
    done = subprocess.run(
        [*command, "--only", "A1-64-both", "--pairs", "1"],
        cwd=Path(__file__).parents[3], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert {"flax linen", "flax nnx", "jax.nn"} <= {row["peer"].split(" (")[0] for row in rows}
    for row in rows:
        assert row["ratio"] > 0 and row["disagreement"] < 1e-4 and row["our_seconds"] > 0
    assert (tmp_path / "bench" / "bench.svg").read_text().startswith("<svg")
