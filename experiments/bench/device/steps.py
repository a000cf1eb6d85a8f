"""Training steps in bf16: tokens a second, share of the peak, memory; and the longest kernels.

A step is forward, label-smoothed loss, backward, clipping and Adam, with dropout. The FLOPs are
those of `training_flops`, of products that the model needs: what `rematerialize` recomputes
counts as time and not as work. Every attention counts as L×L, masked or not.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.bench.device import accelerator
from experiments.bench.device.inputs import BOS, full_batch, random_params
from experiments.bench.device.profile import longest_kernels
from experiments.bench.device.session import Row, Session, halving
from experiments.bench.device.timing import (
    compile_timed,
    median_seconds,
    program_bytes,
)
from experiments.bench.workloads import Training
from experiments.plan.chips import CHIPS
from experiments.plan.flops import training_flops
from experiments.plan.speed import Assumed, most_rows
from experiments.plan.work import Work
from tfm import Transformer, TransformerConfig, make_optimizer, make_train_step
from tfm.parallel.mesh import MeshConfig
from tfm.training import TrainState

VARIANTS = {
    "plain": {},
    "formula": {"implementation": "formula"},
    "scan_layers": {"scan_layers": True},
    "rematerialize": {"rematerialize": "layers"},
    "cudnn": {"implementation": "cudnn"},
}
"""plain has `implementation="auto"`, cuDNN's attention on a GPU: `cudnn` of its row says so."""

FOR_ROW = 25.0
"""Seconds that a variant takes at least, most of them to compile: less left, it is not begun."""
_ROOM = 0.6
"""Of the device's memory, for the estimate of what fits: the compiler tries out programs too."""


def fitting_rows(config: TransformerConfig, length: int, most: int, memory: float) -> int:
    """The largest power of two of rows, up to `most`, that the planner expects to fit `memory`."""
    chip = CHIPS["H100"]._replace(memory=memory)
    work = Work(config, MeshConfig(data=1), 1, length, length)
    fits = most_rows(work, chip, Assumed(memory=_ROOM))
    return min(most, 1 << max(fits, 1).bit_length() - 1)


def bfloat16(config: TransformerConfig, **options: Any) -> TransformerConfig:
    return dataclasses.replace(config, compute_dtype="bfloat16", **options)


def chosen_rows(session: Session, config: TransformerConfig) -> int:
    """The rows to start with: those of the formula, which needs the most memory."""
    memory, sizes = accelerator.memory_bytes(), session.sizes
    if memory is None:
        return sizes.most_rows
    needy = bfloat16(config, implementation="formula")
    return fitting_rows(needy, sizes.length, sizes.most_rows, memory)


def rates(session: Session, work: Training, seconds: float) -> Row:
    """Tokens of source and target a second, and the share of the peak."""
    side = work.rows * work.length / seconds
    tokens = {"source_tokens_per_second": side, "target_tokens_per_second": side}
    flops = work.rows * training_flops(work.config, work.length, work.length)
    return tokens | session.share_of_peak(flops / seconds)


def fresh_state(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """Random parameters, and moments of zero."""
    params = random_params(model)
    zero, key = jnp.zeros((), jnp.int32), jax.random.PRNGKey(0)
    return TrainState(zero, params, jax.jit(optimizer.init)(params), key)


def measure(session: Session, config: TransformerConfig, profile: str | None, rows: int) -> Row:
    """Measures one variant at `rows`, and its longest kernels where `profile` names it."""
    model, optimizer = Transformer(config), make_optimizer(lambda step: 1e-4, 1.0)
    before = accelerator.peak_bytes()
    batch = jax.device_put(full_batch(config, rows, session.sizes.length))
    state = fresh_state(model, optimizer)
    step = make_train_step(model, optimizer, bos=BOS)
    program, compiling = compile_timed(step, state, batch, donate_argnums=0)

    def run() -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return state, metrics

    timed = median_seconds(run, session.sizes.least_runs)
    peak, needed = accelerator.peak_bytes(), program_bytes(program)
    work = Training("", config, rows, session.sizes.length, {})
    made = {"rows": rows} | timed | {"compile_seconds": compiling}
    made |= rates(session, work, timed["seconds"])
    # The process's peak is this step's only where it rose.
    made |= {"peak_bytes": peak} if peak is not None and peak > (before or 0) else {}
    text = program.as_text() or ""
    made |= {"program_bytes": needed, "cudnn": "__cudnn$fmha" in text}
    return made | (longest_kernels(session, profile, run, text) if profile else {})


def measure_fitting(
    session: Session, config: TransformerConfig, options: dict[str, Any], profile: str | None
) -> Row:
    """`measure` with as many rows as fit the device."""
    variant = bfloat16(config, **options)
    rows = chosen_rows(session, config)
    return halving(rows, partial(measure, session, variant, profile))


def run(session: Session) -> None:
    """Measures every plain model with its profile, then the variants."""
    fused, missing = set(), accelerator.why_no_cudnn()
    order = [("plain", *named) for named in session.sizes.models]
    order += [(v, *named) for named in session.sizes.models for v in VARIANTS if v != "plain"]
    for variant, name, config in order:
        title = f"{name} {variant}"
        if variant == "cudnn" and (missing or name in fused):
            session.skip(title, missing or "plain is the same program")
            continue
        profile = name.lower() if variant == "plain" else None
        work = partial(measure_fitting, session, config, VARIANTS[variant], profile)
        made = session.row(title, work, needs=0 if session.tiny else FOR_ROW)
        if variant == "plain" and made.get("cudnn"):
            fused.add(name)
