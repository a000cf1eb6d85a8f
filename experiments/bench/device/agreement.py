"""Whether the accelerator computes what the CPU computes: both in this process.

In f32 the CPU's side is the formula, without kernels; both have the layers as one loop, which
compiles in a fraction of the time. Errors are relative: ‖x − y‖ / ‖y‖ over all that is compared, y
of the CPU.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.device import accelerator
from experiments.bench.device.inputs import BOS, full_batch, packed_batch
from experiments.bench.device.session import Row, Session
from experiments.bench.referee import AGREE
from tfm import (
    Transformer,
    TransformerConfig,
    beam_search,
    greedy,
    shift_right,
    start_decoding,
)
from tfm.attention import scaled_dot_product_attention
from tfm.kernels.attention import fits_cudnn
from tfm.kernels.implementation import Implementation
from tfm.training import init_params, summed_loss

Devices = tuple[jax.Device, jax.Device]
"""The accelerator and the CPU; on a machine without one both are the CPU."""

TIE = 1e-3
"""Nats, and relative scores, within which two searches may choose differently."""


def relative_error(result: Any, reference: Any) -> float:
    """‖x − y‖ / ‖y‖ over all arrays of two trees, in float64; NaN where one has a NaN."""
    pairs = list(zip(jax.tree.leaves(result), jax.tree.leaves(reference), strict=True))
    x, y = (np.concatenate([np.float64(p[i]).ravel() for p in pairs]) for i in (0, 1))
    apart = np.linalg.norm(x - y)
    return float(apart / np.linalg.norm(y)) if apart else 0.0  # of zeros alone too


def judged(error: float, bound: float, **more: Any) -> Row:
    """A row of an error beside its bound; NaN never passes."""
    return {"error": error, "bound": bound, "passed": bool(error <= bound)} | more


def on_both(devices: Sequence[jax.Device], functions: Sequence[Callable], *arguments: Any) -> list:
    """Runs each device's function on the same arguments; the results are on the host."""

    def compiled(device: jax.Device, function: Callable) -> Any:
        placed = jax.device_put(arguments, device)
        with jax.default_device(device):  # each in the form that is for its device
            return jax.jit(function).lower(*placed).compile(), placed

    with ThreadPoolExecutor() as pool:  # the two compilers do not wait for each other
        programs = list(pool.map(compiled, devices, functions))
    return [jax.device_get(program(*placed)) for program, placed in programs]


def sides(config: TransformerConfig) -> tuple[Transformer, Transformer]:
    """The model for the accelerator, and the reference model for the CPU."""
    own = dataclasses.replace(config, scan_layers=True)
    # In bf16 the kernels round what the formula's own derivative does not.
    exact = config.compute_dtype == "float32"
    reference = dataclasses.replace(own, implementation="formula" if exact else "auto")
    return Transformer(own), Transformer(reference)


def log_probs(model: Transformer, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """ln P of each target token [R, T]; 0 where there is padding."""
    context = {k: v for k, v in batch.items() if k not in ("source", "target")}
    inputs = shift_right(batch["target"], BOS, batch["target_positions"])
    logits = model.apply({"params": params}, batch["source"], inputs, **context)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["target"][..., None], -1)
    return jnp.where(batch["target_segment_ids"] != 0, chosen[..., 0], 0)


def compared(result: Any, reference: Any) -> Row:
    """The relative error over all arrays; the array with the largest of its own, by name; and how
    many are not finite on each side."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(result)]
    errors = jax.tree.leaves(jax.tree.map(relative_error, result, reference))
    worst = np.argmax(np.nan_to_num(errors, nan=np.inf))
    broken = [
        sum(not np.isfinite(x).all() for x in jax.tree.leaves(side)) for side in (result, reference)
    ]
    made: Row = {"error": relative_error(result, reference), "worst_array": errors[worst]}
    made |= {"worst_array_name": names[worst]}
    return made | ({"arrays_not_finite": broken} if any(broken) else {})


def training(session: Session, devices: Devices, params: Any) -> None:
    """Log-probabilities and gradients of a packed batch, in bf16 and in f32.

    Two correct gradients in bf16 differ from each other as much as from the one in f32. So the
    accelerator's is compared with f32, and its error may be 1.5 times the CPU's error in bf16.
    """
    sizes, (accelerator_, cpu) = session.sizes, devices
    batch = packed_batch(sizes.agreeing, sizes.agreeing_rows, sizes.agreeing_length)
    dtypes = ("bfloat16", "float32")
    models = {d: sides(dataclasses.replace(sizes.agreeing, compute_dtype=d)) for d in dtypes}
    expected: dict[str, tuple] = {}

    def both(model: Transformer, params: Any, batch: dict) -> tuple:
        gradients = jax.grad(lambda p: summed_loss(model, p, batch, BOS, 0.1)[0])(params)
        return log_probs(model, params, batch), gradients

    def of_the_cpu() -> Row:
        functions = [partial(both, models[dtype][1]) for dtype in dtypes]
        expected.update(zip(dtypes, on_both((cpu, cpu), functions, params, batch), strict=True))
        return {"error": relative_error(expected["bfloat16"][1], expected["float32"][1])}

    in_bfloat16 = session.row("gradients of the CPU, bfloat16 against float32", of_the_cpu)
    for dtype in dtypes if expected else ():
        bound = 1.5 * in_bfloat16["error"] if dtype == "bfloat16" else AGREE[dtype]
        result: list[tuple] = []

        def of_log_probs(dtype: str = dtype, result: list = result) -> Row:
            result += on_both([accelerator_], [partial(both, models[dtype][0])], params, batch)
            return judged(relative_error(result[0][0], expected[dtype][0]), AGREE[dtype])

        def of_gradients(bound: float = bound, result: list = result) -> Row:
            made = compared(result[0][1], expected["float32"][1])
            return judged(made.pop("error"), bound, **made)

        session.row(f"log-probabilities, packed rows, {dtype}", of_log_probs)
        if result:
            session.row(f"gradients, packed rows, {dtype}, against float32", of_gradients)


def odd_lengths(session: Session, devices: Devices) -> Row:
    """Log-probabilities at an odd length, of one layer each: no cuDNN there, by `fits_cudnn`."""
    sizes, length = session.sizes, session.sizes.agreeing_length - 3
    query = jax.ShapeDtypeStruct((1, 1, length, 64), jnp.bfloat16)
    if fits_cudnn(query, query, query, jnp.bfloat16):
        raise AssertionError(f"fits_cudnn takes an odd length, {length}")
    config = dataclasses.replace(
        sizes.agreeing, compute_dtype="bfloat16", num_encoder_layers=1, num_decoder_layers=1
    )
    models = sides(config)
    params = init_params(models[0], jax.random.key(1))
    batch = full_batch(config, sizes.agreeing_rows, length)
    functions = tuple(partial(log_probs, m) for m in models)
    result = on_both(devices, functions, params, batch)
    return judged(relative_error(*result), AGREE["bfloat16"])


def searched(model: Transformer, beam: int, length: int, params: Any, source: jax.Array) -> tuple:
    """The best hypothesis [R, T] of each source and its score; none ends before `length`."""
    step, cache = start_decoding(model, params, source, beam, length)
    search, never = greedy if beam == 1 else beam_search, model.config.vocab_size
    result = search(step, cache, bos=BOS, eos=never, max_length=length)
    return result.tokens[:, 0], result.log_probs[:, 0]


def gaps(
    tokens: np.ndarray, expected: np.ndarray, own: np.ndarray, other: np.ndarray, greedily: bool
) -> list[float]:
    """How far apart the two choices are, for each row whose tokens differ; all arrays are [R, T].

    own, other: log-probabilities of both choices, by one model. Greedily: |ln p − ln p'| of the
    first tokens that differ, since all tokens before are equal. Else relative, over the row:
    |Σ ln p − Σ ln p'| / |Σ ln p'|.
    """
    distances = []
    for row in np.flatnonzero((tokens != expected).any(-1)):
        first = np.argmax(tokens[row] != expected[row])
        own_sum, other_sum = own[row].sum(), other[row].sum()
        tokens_apart = abs(own[row, first] - other[row, first])
        distances.append(tokens_apart if greedily else abs((own_sum - other_sum) / other_sum))
    return [float(gap) for gap in distances]


def decoding(session: Session, devices: Devices, params: Any, beam: int) -> Row:
    """Compares the tokens of both, which may differ in ties only, and the scores.

    Where tokens differ, the CPU scores both hypotheses: within `TIE` all `gaps` are ties.
    """
    sizes = session.sizes
    models, length = sides(sizes.agreeing), sizes.agreeing_length
    source = full_batch(sizes.agreeing, sizes.agreeing_rows, length)["source"]
    functions = tuple(partial(searched, m, beam, length) for m in models)
    (tokens, claimed), (expected, _) = on_both(devices, functions, params, source)
    batch = full_batch(sizes.agreeing, sizes.agreeing_rows, length)  # none of it is padding
    score = jax.jit(partial(log_probs, models[1]))
    totals = []
    for target in (tokens, expected):
        placed = jax.device_put((params, batch | {"target": target}), devices[1])
        totals.append(np.asarray(score(*placed)))
    apart = gaps(tokens, expected, *totals, greedily=beam == 1)
    error = relative_error(claimed, totals[0].sum(-1))
    scores = {"score_difference": float((totals[0] - totals[1]).sum())} if apart else {}
    made = judged(error, AGREE["float32"], different=len(apart), hypotheses=len(tokens))
    return made | scores | {"passed": made["passed"] and max(apart, default=0.0) <= TIE}


def attention(session: Session, devices: Devices, implementation: Implementation) -> Row:
    """Output and gradients against the formula in f32 on the CPU, under a random mask and with
    padding behind; a query that may attend to nothing gives exact zeros, and finite gradients."""
    sizes, rng = session.sizes, np.random.default_rng(2)
    length = sizes.attention_lengths[0] * 3 // 8  # 192: see `canaries.masked_attention`
    shape = (4, sizes.heads, length, sizes.features)
    query, key, value, weights = (rng.standard_normal(shape, np.float32) for _ in range(4))
    mask = rng.random((4, 1, length, length)) < 0.7
    padding = np.arange(length) >= length * 3 // 4
    empty = padding | (np.arange(length) == 1)
    mask[:, :, empty] = mask[..., padding] = False

    def both(dtype: Any, way: Implementation, q, k, v, mask, weights) -> tuple:
        def attend(q, k, v):
            return scaled_dot_product_attention(
                q, k, v, mask, compute_dtype=dtype, implementation=way
            )

        gradients = jax.grad(lambda *x: (attend(*x) * weights).sum(), argnums=(0, 1, 2))
        return attend(q, k, v), gradients(q, k, v)

    functions = (partial(both, jnp.bfloat16, implementation), partial(both, None, "formula"))
    result, expected = on_both(devices, functions, query, key, value, mask, weights)
    errors = [relative_error(x, y) for x, y in zip(result, expected, strict=True)]
    made = judged(max(errors), AGREE["bfloat16"], forward_error=errors[0], gradient_error=errors[1])
    if np.any(result[0][:, :, empty]):
        made |= {"passed": False, "flag": "a query that may attend to nothing does not give zeros"}
    if not all(np.isfinite(g).all() for g in result[1]):
        made |= {"passed": False, "flag": "gradients are not finite"}
    return made


def run(session: Session) -> None:
    """The cheap checks first, since compiling the model takes most of the time."""
    devices = accelerator.first(), jax.local_devices(backend="cpu")[0]
    for implementation in ("formula", "chunked", "cudnn"):
        name = f"attention {implementation} against the formula in f32, empty row"
        if implementation == "cudnn" and (missing := accelerator.why_no_cudnn()):
            session.skip(name, missing)
            continue
        session.row(name, partial(attention, session, devices, implementation))
    params = jax.jit(partial(init_params, Transformer(session.sizes.agreeing)))(jax.random.key(0))
    training(session, devices, params)
    for beam in (1, 4):
        name = "greedy" if beam == 1 else f"beam {beam}"
        session.row(f"{name}, float32", partial(decoding, session, devices, params, beam))
    session.row("log-probabilities, odd lengths, bfloat16", partial(odd_lengths, session, devices))
