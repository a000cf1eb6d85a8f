import json
from dataclasses import asdict

import numpy as np
import pytest

from experiments.bench import cost
from experiments.bench.cost import CHECK, FACTORS, CostConfig, Point, fit, memory_terms, time_terms
from experiments.plan.flops import forward_flops

PRICES = [2e-11, 3e-11, 1e-10, 5e-10, 1e-3]  # of the terms of time, in their order


def by_law(point, terms, prices):
    return point.tokens * sum(p * t for p, t in zip(prices, terms(point).values(), strict=True))


def test_each_factor_is_varied_alone():
    points = cost.points()
    assert len(points) == len(set(points)) and points[-1] == CHECK
    for field, values in FACTORS.values():
        for value in values:
            others = asdict(Point()) | {field: value}
            assert Point(**others) in points
    assert CHECK not in points[:-1]


def test_the_terms_of_products_are_all_of_a_steps_flops():
    point = Point(width=64, depth=3, length=24, rows=5)
    terms = time_terms(point)
    flops = terms["FLOPs of products with parameters"] + terms["FLOPs of attention"]
    assert flops * point.tokens == 3 * 5 * forward_flops(point.config, 24, 24)
    # Logits and weighted sum, forward and twice backward: 3 attentions in each pair of layers.
    assert terms["FLOPs of attention"] * point.tokens == 3 * 5 * 4 * (3 * 3) * 24**2 * 64


@pytest.mark.parametrize(
    ("terms", "prices"), [(time_terms, PRICES), (memory_terms, [16, 40, 8, 9])]
)
def test_a_law_that_holds_is_found(terms, prices):
    points = cost.points()
    law = fit([terms(p) for p in points], [by_law(p, terms, prices) / p.tokens for p in points])
    np.testing.assert_allclose(list(law.prices.values()), prices, rtol=1e-3)
    assert np.abs(law.errors).max() < 1e-5


def test_no_price_is_negative():
    law = fit([{"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0}], [1.0, 0.5])
    assert law.prices["b"] == 0 and law.prices["a"] > 0


def test_an_exponent_is_the_slope_at_the_end():
    assert cost.exponent((1, 2, 4), (5, 6, 12)) == pytest.approx(1)
    assert cost.exponent((16, 64), (8, 8)) == 0


def fake_measure(point, least_seconds):
    return {"seconds": by_law(point, time_terms, PRICES),
            "bytes": by_law(point, memory_terms, [16, 40, 8, 9])}  # fmt: skip


def test_a_run_gives_table_numbers_and_picture_and_goes_on(tmp_path, monkeypatch, capsys):
    calls = []

    def measure(point, least_seconds):
        calls.append(point)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return fake_measure(point, least_seconds)

    monkeypatch.setattr(cost, "measure", measure)
    config = CostConfig(run=tmp_path / "cost")
    with pytest.raises(KeyboardInterrupt):
        cost.run(config)
    cost.run(config)
    assert len(calls) == len(cost.points()) + 1  # the one that was cut off twice, the others once
    about = json.loads((tmp_path / "cost" / "cost.json").read_text())
    assert abs(about["seconds"]["check_error"]) < 1e-4
    assert about["curves"]["length"]["values"] == list(FACTORS["length"][1])
    assert len(about["points"]) == len(cost.points())
    shown = capsys.readouterr().out
    assert "FLOPs of attention" in shown and "cost.svg" in shown
    svg = (tmp_path / "cost" / "cost.svg").read_text()
    assert svg.startswith("<svg xmlns") and "More depth" in svg


def test_a_step_is_measured_by_clock_and_compiler():
    point = Point(width=32, depth=1, length=4, rows=2)
    measured = cost.measure(point, 0.01)
    assert 0 < measured["seconds"] < 10
    # Parameters and the two moments at the least, in f32.
    assert measured["bytes"] > 12 * point.config.parameter_count()


def test_a_time_that_is_none_is_refused():
    with pytest.raises(ValueError, match="seconds=0"):
        CostConfig(seconds=0)
