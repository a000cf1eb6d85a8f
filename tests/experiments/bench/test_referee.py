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
from experiments.bench.referee import BenchConfig, BenchError, disagreement, record, run
from experiments.bench.workloads import WORKLOADS, training_flops

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


def test_a_record_has_the_median_of_the_pairs_ratios(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.1")  # installed or not
    pairs = [
        {"ours": side(ours, peak_flops=1e12), "peer": side(peer), "disagreement": 1e-7}
        for ours, peer in ((1.0, 3.0), (2.0, 4.0), (4.0, 4.0))
    ]
    row = record(WORKLOADS["T1"], "torch eager", pairs)
    assert (row["ratio"], row["low"], row["high"], row["pairs"]) == (2.0, 1.0, 3.0, 3)
    assert (row["our_seconds"], row["peer_seconds"]) == (2.0, 4.0)
    assert row["share_of_peak"] == training_flops(WORKLOADS["T1"]) / 2e12
    assert (row["id"], row["goal"]) == ("T1", 2.2)
    row = record(WORKLOADS["A1-64-both"], PEER, pairs)
    assert row["share_of_peak"] is None and row["peer"].startswith(f"{PEER} (flax 0.1)")


def test_disagreement_is_relative_to_the_largest_value():
    assert disagreement(np.array([1.0, -4.0]), np.array([1.0, -4.4])) == pytest.approx(0.1)
    assert not disagreement(np.array([1.0]), np.array([np.nan])) <= 1e-4


class Workers:
    """In the place of the processes: ours takes 1 second, the peer 2; who was called is kept."""

    def __init__(self, apart=0.0, dies_at=None):
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
    monkeypatch.setattr(referee, "installed", lambda name: name == PEER)
    workers = Workers(dies_at=7)  # two checks, two pairs, and one process of the third
    monkeypatch.setattr(referee, "_call", workers)
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
    monkeypatch.setattr(referee, "installed", lambda name: name == PEER)
    monkeypatch.setattr(referee, "_call", Workers(apart=1e-3))
    with pytest.raises(BenchError, match="nothing was timed"):
        run(BenchConfig(run=tmp_path, only="A1-64-forward", pairs=1))
    assert f"A1-64-forward: {PEER} differs from ours by 1.0e-03, above 0.0001" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_worker_warms_up_and_counts_enough_runs(monkeypatch):
    monkeypatch.setattr(worker, "LEAST_SECONDS", 0.0)
    calls = []
    contender = Contender(lambda: calls.append(1), lambda: np.zeros(1))
    result = worker.measure(PEER, WORKLOADS["A1-64-forward"], contender)
    assert len(calls) == worker.WARM_UP + worker.LEAST_RUNS
    assert len(result["all_seconds"]) == worker.LEAST_RUNS and "peak_flops" not in result
    assert result["peak_bytes"] > 1e7


def test_a_stream_is_timed_by_its_real_tokens(monkeypatch):
    monkeypatch.setattr(worker, "STREAM_SECONDS", 0.0)
    monkeypatch.setattr(worker, "peak_flops", lambda dtype: 1e12)
    clock = iter(range(100))  # every look at the clock is a second later
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(clock))
    contender = Contender(lambda: 500, lambda: np.zeros(1))
    result = worker.measure(PEER, WORKLOADS["T3"], contender)
    assert result["seconds"] == 2.0  # 3 seconds for 1,500 tokens


def test_the_picture_names_every_row():
    pairs = [{"ours": side(1.0), "peer": side(0.5), "disagreement": 0.0}]
    svg = bars([record(WORKLOADS[f"A1-64-{n}"], PEER, pairs) for n in ("forward", "both")])
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
