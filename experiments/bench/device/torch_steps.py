"""Training steps of PyTorch's own layers beside ours: bf16 by autocast, SDPA, fused Adam.

The model is `torch_peer.Transformer`, with random parameters of its own, and the work that of
`steps`: the same rows to begin with, halved where they do not fit. It runs eagerly, and compiled;
`compile_seconds` are those of the first run, since PyTorch compiles within it.
"""

import importlib.util
import time
from functools import partial
from typing import Any

from experiments.bench.device.inputs import full_batch
from experiments.bench.device.session import Row, Session, halving
from experiments.bench.device.steps import bfloat16, fitting_rows, rates
from experiments.bench.workloads import Training
from tfm import TransformerConfig

FOR_ROW = {"eager": 6.0, "compile": 25.0}
"""Seconds that a row takes at least, compilation among them."""


def measure(session: Session, config: TransformerConfig, mode: str, where: str, rows: int) -> Row:
    import torch

    from experiments.bench.device.torch_side import timed
    from experiments.bench.torch_peer import Transformer, fused_adam, smoothed_loss

    torch.manual_seed(0)
    length = session.sizes.length
    model = Transformer(config, length).to(where)
    adam = fused_adam(model)
    forward = torch.compile(model) if mode == "compile" else model
    sides = full_batch(config, rows, length)
    source, target = (torch.tensor(sides[s]).long().to(where) for s in ("source", "target"))

    def run() -> Any:
        adam.zero_grad(set_to_none=True)
        with torch.autocast(where, torch.bfloat16):
            logits = forward(source, torch.roll(target, 1, -1))
        smoothed_loss(logits, target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()

    if where == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    run()
    first = time.perf_counter() - begin
    seconds = timed(session, run)
    made = {"rows": rows} | seconds | {"compile_seconds": first}
    made |= rates(session, Training("", config, rows, length, {}), seconds["seconds"])
    return made | ({"peak_bytes": torch.cuda.max_memory_allocated()} if where == "cuda" else {})


def _rows(session: Session, config: TransformerConfig, where: str) -> int:
    import torch

    sizes = session.sizes
    if where == "cpu":
        return sizes.most_rows
    memory = torch.cuda.get_device_properties(0).total_memory * 0.9
    needy = bfloat16(config, implementation="formula")
    return fitting_rows(needy, sizes.length, sizes.most_rows, memory)


def run(session: Session) -> None:
    if importlib.util.find_spec("torch") is None:
        return session.skip("torch", "torch is not installed")
    from experiments.bench.device.torch_side import device

    where = device(session)
    if where is None:
        return None
    for mode, needed in FOR_ROW.items():
        for name, config in session.sizes.models:
            variant, rows = bfloat16(config), _rows(session, config, where)
            work = partial(halving, rows, partial(measure, session, variant, mode, where))
            session.row(f"{name} torch {mode}", work, needs=0 if session.tiny else needed)
    return None
