"""Turns measurements into verdicts: confidence intervals, and the one decision rule."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"
WITH_CAVEAT = "supported, with a caveat"
FEWEST_FOR_SHARES = 16
PIECES = 20  # a training advances in this many equal pieces


@dataclasses.dataclass(frozen=True)
class Text:
    """A sentence in both languages of the ledger's pages."""

    en: str
    zh: str


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A falsifiable statement with its decision rule, written before the run."""

    statement: Text
    effect: str
    """what is measured, with its unit; the larger, the better for the statement"""
    threshold: float = 0.0
    """δ, in the effect's unit"""
    bound: float | None = None
    """A formula that holds to rounding: the largest error that it may have. The effect is then
    bound − largest error."""
    caveat_of: str | None = None
    """The hypothesis that this one limits where it is supported."""
    timed: bool = False
    """Measured with a clock, so that a second run gives other numbers."""

    @property
    def rule(self) -> str:
        """The decision rule in words."""
        return (
            f"{self.effect}: supported where the 95 % interval lies above δ = {self.threshold:g}, "
            f"not supported where it lies below, else undecided"
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An effect, its 95 % interval, and the number of seeds behind it."""

    effect: float
    interval: tuple[float, float]
    seeds: int

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.effect, *self.interval))):
            raise ValueError(f"an effect that is not finite decides nothing: {self}")


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much work a run of the ledger may do."""

    seeds: int
    """of each trained effect"""
    many: int
    """seeds of the shares that survive"""
    effort: float
    """multiplies the steps of every training"""
    first_seed: int = 0
    report: Callable[[float, str], None] = lambda share, status: None
    """called with the share of a training that is done, and its status"""

    def steps(self, default: int) -> int:
        """The number of steps where the default preset takes `default`, a multiple of `PIECES`."""
        return PIECES * max(1, round(default * self.effort / PIECES))


@dataclasses.dataclass(frozen=True)
class Claim:
    """One question, and the measurement that decides it."""

    id: str
    question: Text
    formula: str
    function: Callable[..., Any]
    """the function in `tfm` that is the formula"""
    hypotheses: dict[str, Hypothesis]
    measure: Callable[[Budget], tuple[dict[str, Estimate], Figure]]
    """measures every hypothesis, and draws what was seen"""
    lesson: Text
    """what a teacher may say before looking at the figures"""

    def __post_init__(self) -> None:
        for name, hypothesis in self.hypotheses.items():
            if hypothesis.caveat_of not in (None, *self.hypotheses):
                raise ValueError(f"{self.id}: {name} is a caveat of nothing that is stated")


def paired_t(differences: Sequence[float]) -> Estimate:
    """The mean of paired differences, one a seed: d̄ ± t₀.₉₇₅(n−1) · s/√n."""
    d = np.asarray(differences, np.float64)
    if d.ndim != 1 or len(d) < 2:
        raise ValueError(f"paired differences of at least 2 seeds are needed, not {d.shape}")
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return Estimate(float(d.mean()), (float(d.mean() - half), float(d.mean() + half)), len(d))


def wilson(successes: int, trials: int) -> Estimate:
    """A share with Wilson's interval (Wilson 1927); at least 16 trials."""
    if trials < FEWEST_FOR_SHARES or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials}: a share needs at least {FEWEST_FOR_SHARES}")
    z, p, n = stats.norm.ppf(0.975), successes / trials, trials
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Estimate(p, (float(max(0, centre - half)), float(min(1, centre + half))), n)


def wilson_difference(first: int, second: int, trials: int) -> Estimate:
    """The difference of two shares of `trials` each, by Newcombe's interval.

    It combines Wilson's limits of both: d − √((p₁−l₁)² + (u₂−p₂)²) … d + √((u₁−p₁)² + (p₂−l₂)²)
    (Newcombe 1998, method 10).
    """
    (p1, l1, u1), (p2, l2, u2) = (
        (e.effect, *e.interval) for e in (wilson(first, trials), wilson(second, trials))
    )
    d = p1 - p2
    return Estimate(d, (d - math.hypot(p1 - l1, u2 - p2), d + math.hypot(u1 - p1, p2 - l2)), trials)


def exact(value: float, seeds: int = 1) -> Estimate:
    """An estimate without variance: the largest error of a formula, or a count."""
    return Estimate(float(value), (float(value), float(value)), seeds)


def verdict(interval: tuple[float, float], threshold: float) -> str:
    """Supported if the interval's lower end is above δ, not supported if its upper end is below δ,
    else undecided."""
    low, high = interval
    if low > threshold:
        return SUPPORTED
    return NOT_SUPPORTED if high < threshold else UNDECIDED


def judge(
    hypotheses: dict[str, Hypothesis], estimates: dict[str, Estimate]
) -> list[dict[str, Any]]:
    """The sub-claims of a record: each hypothesis with its estimate and verdict.

    Raises ValueError where the estimates are not those of the hypotheses.
    """
    if hypotheses.keys() != estimates.keys():
        raise ValueError(f"stated {sorted(hypotheses)}, but measured {sorted(estimates)}")
    judged = {name: _judge_alone(name, h, estimates[name]) for name, h in hypotheses.items()}
    for name, hypothesis in hypotheses.items():
        main = judged.get(hypothesis.caveat_of)
        if main and judged[name]["verdict"] == main["verdict"] == SUPPORTED:
            main["caveats"].append(name)
    for subclaim in judged.values():
        if subclaim["caveats"]:
            subclaim["verdict"] = WITH_CAVEAT
    return list(judged.values())


def _judge_alone(name: str, hypothesis: Hypothesis, estimate: Estimate) -> dict[str, Any]:
    effect, (low, high), error = estimate.effect, estimate.interval, {}
    if hypothesis.bound is not None:
        error = {"largest_error": effect, "bound": hypothesis.bound}
        effect, low, high = (hypothesis.bound - x for x in (effect, high, low))
    return {
        "id": name,
        "statement": hypothesis.statement.en,
        "statement_zh": hypothesis.statement.zh,
        "effect": effect,
        "interval": [low, high],
        "seeds": estimate.seeds,
        "rule": hypothesis.rule,
        "threshold": hypothesis.threshold,
        **error,
        "timed": hypothesis.timed,
        "caveat_of": hypothesis.caveat_of,
        "caveats": [],
        "verdict": verdict((low, high), hypothesis.threshold),
    }
