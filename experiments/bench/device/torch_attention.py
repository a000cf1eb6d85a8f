"""PyTorch's scaled_dot_product_attention beside ours: the sizes of `attention`, in bf16."""

import importlib.util
from functools import partial
from typing import Any

from experiments.bench.device.attention import flops, shape_of, titles
from experiments.bench.device.session import Row, Session


def measure(session: Session, where: str, length: int, backward: bool) -> Row:
    import torch

    from experiments.bench.device.torch_side import timed

    shape = shape_of(session, length)
    *operands, weights = (
        torch.randn(shape, device=where, dtype=torch.bfloat16) for _ in range(4)
    )  # fmt: skip
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward() -> Any:
        with torch.no_grad():
            return attend(*operands)

    def both() -> Any:
        leaves = [x.detach().requires_grad_() for x in operands]
        return torch.autograd.grad(attend(*leaves), leaves, weights)

    seconds = timed(session, both if backward else forward)
    return seconds | session.share_of_peak(flops(shape, backward) / seconds["seconds"])


def run(session: Session) -> None:
    if importlib.util.find_spec("torch") is None:
        return session.skip("torch", "torch is not installed")
    from experiments.bench.device.torch_side import device

    where = device(session)
    for title, length, backward in titles(session) if where else []:
        work = partial(measure, session, where, length, backward)
        session.row(f"{title}, torch SDPA", work, needs=0 if session.tiny else 2)
    return None
