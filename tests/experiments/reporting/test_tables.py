"""The tables of the commands in a terminal of 80 columns: every word whole, nothing cut."""

import pytest
from rich.console import Console

from docs.scripts import calls
from experiments.bench import cost, referee
from experiments.bench.device import table as device
from experiments.bench.workloads import WORKLOADS
from experiments.pronounce import report as pronounce
from experiments.reporting.report import Example
from experiments.translate import report as translate


@pytest.fixture(autouse=True, params=[80, 120])
def columns(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def check(told, columns, words):
    assert "…" not in told and max(map(len, told.splitlines())) <= columns
    assert not set(" ".join(words).split()) - set(told.split()), told


def test_the_bench(capsys, columns):
    numbers = {
        "our_seconds": 0.01234, "peer_seconds": 0.02345, "ratio": 10.234, "low": 10.12,
        "high": 10.34, "goal": 1.25, "limit": 12.3, "share": 0.45, "our_first_seconds": 12.3,
        "peer_first_seconds": 123.4, "our_peak_bytes": 12.3e9, "peer_peak_bytes": 11e9,
    }  # fmt: skip
    peers = {peer for work in WORKLOADS.values() for peer in work.peers}
    rows = [{"id": work, "peer": f"{peer} (1.2)"} | numbers for work in WORKLOADS for peer in peers]
    Console().print(*referee.tables(rows))
    told = capsys.readouterr().out
    cells = ["0.0123", "0.0234", "10.23", "10.12–10.34", "1.25", "12", "45%", "12.3 / 123"]
    check(told, columns, [*WORKLOADS, *peers, *cells, "12.3 / 11.0"])


def test_the_law_of_cost(capsys, columns):
    point = cost.Point()
    sides = {"seconds": cost.time_terms(point), "bytes": cost.memory_terms(point)}
    about = {
        key: {
            "prices": dict.fromkeys(terms, 1.5 if key == "bytes" else 1.5e-9),
            "typical_error": 0.05, "largest_error": 0.2, "check_error": -0.12,
            "exponents": dict.fromkeys(cost.FACTORS, 1.02),
        }
        for key, terms in sides.items()
    }  # fmt: skip
    Console().print(cost.prices(about))
    check(capsys.readouterr().out, columns, [*sides["seconds"], *sides["bytes"], "1.5 ns", "^1.02"])


def test_a_device_with_every_column_there_is(capsys, columns):
    values = {
        key: 39 if key in ("rows", "runs", "different", "sound") else 0.7 for key in device.COLUMNS
    }
    kernel = {"kernel": "gemm_" * 40, "seconds": 0.1, "calls": 3, "share_of_kernels": 0.4}
    row = {"name": "base, 8192 tokens [B, L]"} | values | {"passed": True, "kernels": [kernel]}
    parts = {"steps": {"fault": None, "rows": [row]}}
    machine = {"card": "NVIDIA"}
    device.show(Console(), {"tiny": False, "machine": machine, "parts": parts})
    told = capsys.readouterr().out
    cells = [written(values[key]) for key, (_, written) in device.COLUMNS.items()]
    check(told, columns, [*(heading for heading, _ in device.COLUMNS.values()), *cells])
    assert kernel["kernel"] in "".join(told.split())


def test_a_pronunciation_run(capsys, columns):
    long, other = "IH N T ER N AE SH AH N AH L AH Z EY SH AH N", "IH N T ER N AE SH AH N"
    shown = [
        Example("internationalization", "unseen", long, [long, other], -1.0),
        Example("transformerize", "invented", "T R AE N S F AO R M ER AY Z", [], -1.0),
    ]
    rates = {f"{part}_{rate}": 0.2125 for part in ("valid", "test") for rate in ("wer", "per")}
    results = {"seed": 0, "beam": 5, "valid_words": 1234, "test_words": 12345} | rates
    pronounce.show(results, shown)
    told = capsys.readouterr().out
    check(told, columns, ["unseen internationalization transformerize", long, "12,345 21.25%"])


def test_a_translation_run(capsys, columns):
    measure = {"score": 28.123, "half_width": 1.234, "signature": "nrefs:1|bs:1000|version:2.5.1"}
    scores = dict.fromkeys(("bleu", "chrf", "bleu_pretokenized"), measure)
    results = {
        "seed": 0, "beam": 4, "weights": "the average of the last 5 saves",
        "scores": {"valid": scores, "test": scores},
        "valid_sentences": 1000, "test_sentences": 2000,
    }  # fmt: skip
    translate.show(results, [("a [b] :smile:", "c")], ["[/d]"])
    told = capsys.readouterr().out
    check(told, columns, [results["weights"], "1,000 28.12 1.23", "a [b] :smile: [/d]"])


def test_the_single_calls(capsys, columns, monkeypatch):
    monkeypatch.setattr(calls, "measure", lambda call: (123.4, 2))
    monkeypatch.setattr(calls, "SIZES", calls.SIZES[:1])
    calls.main()
    told = capsys.readouterr().out
    check(told, columns, ["its gradient (x, W, b)", "123", "compiles", "torch"])
