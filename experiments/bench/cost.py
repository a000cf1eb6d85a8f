"""The cost command: a law for time and memory of a step by width, depth, length and batch."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

from experiments.bench.drawing import laws
from experiments.bench.kept import Kept
from experiments.checkpoints.run_folder import RunFolder, plain, write_json, write_text
from experiments.plan.flops import attention_flops, forward_flops
from experiments.progress import ProgressBar
from experiments.reporting.tables import table
from tfm import Transformer, TransformerConfig, init_state, make_optimizer, make_train_step

VOCABULARY = 1000
FACTORS = {
    "width": ("width", (64, 128, 256, 512)),
    "depth": ("depth", (1, 2, 4, 8)),
    "length": ("length", (16, 32, 64, 128, 256)),
    "batch": ("rows", (4, 16, 64, 256)),
}
"""What is varied alone from `Point()` on: the field, and its values."""


@dataclasses.dataclass(frozen=True)
class CostConfig:
    """Measure how time and memory of a training step grow, and fit the law.

    Width, depth, length and batch are varied one at a time. Measured points are kept: interrupted,
    the same command goes on with the next one. Nothing else should run beside.
    """

    run: Path = Path("runs/cost")
    """Folder of points.jsonl, cost.json and cost.svg."""
    seconds: float = 1.0
    """For how long the steps of each point are timed, at least."""

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds} must be positive")


@dataclasses.dataclass(frozen=True)
class Point:
    """A step to measure: d_model (d_ff = 4 d_model, heads of 32 features), layers of encoder and of
    decoder each, tokens of each source and target, and rows."""

    width: int = 128
    depth: int = 2
    length: int = 32
    rows: int = 16

    @property
    def config(self) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=VOCABULARY, d_model=self.width, d_ff=4 * self.width,
            num_heads=self.width // 32, num_encoder_layers=self.depth,
            num_decoder_layers=self.depth,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens of a step, source and target; there is no padding."""
        return 2 * self.rows * self.length

    @property
    def features(self) -> int:
        """Between the sub-layers: 2 of each layer of the encoder, 3 of the decoder."""
        return 5 * self.depth * self.width


CHECK = Point(width=256, depth=3, length=96, rows=8)
"""Not fitted: what the law says of it shows whether it is one."""


def points() -> list[Point]:
    """All steps to measure, each once; `CHECK` last."""
    varied = [
        dataclasses.replace(Point(), **{field: value})
        for field, values in FACTORS.values()
        for value in values
    ]
    return [*dict.fromkeys(varied), CHECK]


def time_terms(point: Point) -> dict[str, float]:
    """The terms of the law for seconds per token; each gets a fitted price."""
    c, length, tokens = point.config, point.length, point.tokens
    each = 3 * point.rows / tokens  # the backward pass has two products for each of the forward
    attention = each * attention_flops(c, length, length)
    every = each * forward_flops(c, length, length)
    return {
        "FLOPs of products with parameters": every - attention,
        "FLOPs of attention": attention,
        "features between sub-layers": point.features,
        "parameters, of a step": c.parameter_count() / tokens,
        "a step": 1 / tokens,
    }


def memory_terms(point: Point) -> dict[str, float]:
    """The terms of the law for bytes per token."""
    c = point.config
    return {
        "parameters, of a step": c.parameter_count() / point.tokens,
        "features between sub-layers": point.features,
        "attention weights": 3 * point.depth * c.num_heads * point.length / 2,
        "logits": c.vocab_size / 2,
    }


class Law(NamedTuple):
    """value ≈ Σ price · term"""

    prices: dict[str, float]
    errors: list[float]
    """Of each fitted point: predicted over measured, less 1."""

    def __call__(self, terms: dict[str, float]) -> float:
        return sum(self.prices[name] * value for name, value in terms.items())


def fit(terms: list[dict[str, float]], values: list[float]) -> Law:
    """Fits non-negative prices by least squares of the relative errors."""
    rows = np.array([list(t.values()) for t in terms]) / np.array(values)[:, None]
    sizes = rows.max(0)  # terms are of very different sizes
    prices, _ = nnls(rows / sizes, np.ones(len(rows)))
    prices = prices / sizes
    return Law(dict(zip(terms[0], prices.tolist(), strict=True)), (rows @ prices - 1).tolist())


def measure(point: Point, least_seconds: float) -> dict[str, float]:
    """The median seconds of a step, and its bytes according to the compiler."""
    model, optimizer = Transformer(point.config), make_optimizer(lambda step: 1e-4, 1.0)
    ids = jax.random.randint(jax.random.key(0), (point.rows, point.length), 3, VOCABULARY)
    ones, positions = jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(point.length), ids.shape)
    batch = {}
    for side in ("source", "target"):
        batch |= {side: ids, f"{side}_segment_ids": ones, f"{side}_positions": positions}
    state = init_state(model, optimizer, jax.random.PRNGKey(0))
    step = jax.jit(make_train_step(model, optimizer, bos=1), donate_argnums=0)
    compiled = step.lower(state, batch).compile()
    used = compiled.memory_analysis()
    times: list[float] = []
    while len(times) < 5 or sum(times[2:]) < least_seconds:
        begin = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - begin)
    return {
        "seconds": statistics.median(times[2:]),
        "bytes": used.argument_size_in_bytes + used.temp_size_in_bytes,
    }


Measured = dict[Point, dict[str, float]]


def summary(measured: Measured) -> dict[str, Any]:
    """The laws of time and memory, their fit, their prediction of `CHECK`, and the curves."""
    fitted = [p for p in measured if p != CHECK]
    about: dict[str, Any] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    for factor, (_, values) in FACTORS.items():
        curves[factor] = {"values": list(values)}
    for key, terms in (("seconds", time_terms), ("bytes", memory_terms)):
        law = fit([terms(p) for p in fitted], [measured[p][key] / p.tokens for p in fitted])
        about[key] = {
            "prices": law.prices,
            "typical_error": float(np.median(np.abs(law.errors))),
            "largest_error": float(np.abs(law.errors).max()),
            "check_error": law(terms(CHECK)) * CHECK.tokens / measured[CHECK][key] - 1,
            "exponents": {},
        }
        for factor, (field, values) in FACTORS.items():
            line = [dataclasses.replace(Point(), **{field: v}) for v in values]
            curves[factor][key] = [measured[p][key] / p.tokens for p in line]
            curves[factor][f"{key}_law"] = [law(terms(p)) for p in line]
            about[key]["exponents"][factor] = exponent(values, curves[factor][key])
    return about | {"curves": curves}


def exponent(factor: Sequence[float], cost: Sequence[float]) -> float:
    """The slope of log(cost per token) against log(factor) between the two largest factors:
    0 is a constant cost, 1 a proportional one."""
    return float(np.log(cost[-1] / cost[-2]) / np.log(factor[-1] / factor[-2]))


def prices(about: dict[str, Any]) -> Table:
    """A table of the prices."""
    shown = table("What a real token costs in a training step", ["of"], ["time", "memory"])
    for name in dict.fromkeys([*about["seconds"]["prices"], *about["bytes"]["prices"]]):
        seconds, size = (about[key]["prices"].get(name) for key in ("seconds", "bytes"))
        shown.add_row(
            name,
            "" if seconds is None else f"{seconds * 1e9:.3g} ns",
            "" if size is None else f"{size:.3g} B",
        )
    for name, what in (("typical", "typical error"), ("largest", "largest error"),
                       ("check", "error at the point not fitted")):  # fmt: skip
        shown.add_row(what, *(f"{about[key][f'{name}_error']:.0%}" for key in ("seconds", "bytes")))
    for factor in FACTORS:
        values = (f"^{about[key]['exponents'][factor]:.2f}" for key in ("seconds", "bytes"))
        shown.add_row(f"growth with {factor} at its end", *values)
    return shown


def run(config: CostConfig) -> None:
    """Measures the missing points, fits the laws, and draws them."""
    folder = RunFolder(config.run)
    with folder.claim(plain(config), {"run"}):
        kept = Kept(config.run / "points.jsonl")
        missing = [point for point in points() if not kept.of(dataclasses.asdict(point))]
        known = len(points()) - len(missing)
        with ProgressBar("timing steps", len(points()), known, first_counts=True) as bar:
            for point in missing:
                kept.add(dataclasses.asdict(point), measure(point, config.seconds))
                bar.advance()
        measured = {point: kept.of(dataclasses.asdict(point))[-1] for point in points()}
        about = summary(measured)
        listed = [dataclasses.asdict(p) | m for p, m in measured.items()]
        write_json(config.run / "cost.json", about | {"points": listed})
        write_text(config.run / "cost.svg", laws(about["curves"]))
    Console().print(prices(about))
    print(config.run / "cost.json", config.run / "cost.svg", sep=", ")
