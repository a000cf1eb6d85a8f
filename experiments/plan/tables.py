"""The plan for a person to read: each number, and its formula beside it; 100 columns wide."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table

from experiments.plan.chips import Chip
from experiments.plan.memory import (
    CPU,
    GPU,
    TPU,
    Habits,
    activation_bytes,
    copied_bytes,
    decoder_layer,
    encoder_layer,
    loss_bytes,
    stages,
    temporary_bytes,
)
from experiments.plan.speed import Assumed, most_rows, needed_bytes, times
from experiments.plan.traffic import attention_share, collectives, products
from experiments.plan.work import (
    COUNTERS,
    Work,
    argument_bytes,
    batch_bytes,
    parameter_bytes,
    parameters,
)
from tfm.config import TransformerConfig
from tfm.parallel.mesh import MeshConfig

HABITS = (GPU, TPU, CPU)


class OnCPU(NamedTuple):
    """What XLA says of the step that it compiled for forced host devices."""

    arguments: int
    temporaries: int
    collectives: Counter[tuple[str, tuple[str, ...]]] | None
    """Bytes by kind and axes. None: they stand in a loop, and are not counted."""


def scaled(number: float, unit: str = "B") -> str:
    """1,234,567 -> '1.23 MB'."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def _table(title: str, *columns: str, formula: bool = True) -> Table:
    """A table as wide as the page; the first column, and a last one of formulas, are text."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                 pad_edge=False, padding=(0, 1, 0, 0), width=100, caption_justify="left",
                 caption_style="")  # fmt: skip
    for i, name in enumerate(columns):
        text = i == 0 or formula and i == len(columns) - 1
        made.add_column(
            name, justify="left" if text else "right", no_wrap=not text or i == 0,
            ratio=1 if formula and i == len(columns) - 1 else None,
        )  # fmt: skip
    return made


def about(work: Work, preset: str) -> Table:
    """The model, the mesh and the batch, with the letters that the formulas have for them."""
    c, mesh = work.model, work.mesh
    made = _table(f"A training of the {preset} model", "what", "number", "formula")
    whole = sum(p.elements(MeshConfig(1)) for p in parameters(c))
    padded = f"a multiple of {c.vocab_multiple}: {c.vocab_size:,} words, the rest padding"
    for row in (
        ("parameters P", f"{whole:,}",
         "N_e(4D² + 2DF + F + 5D) + N_d(8D² + 2DF + F + 7D) + V·D"
         if _is_plain(c) else "the shapes of all parameters"),
        ("vocabulary V", f"{work.vocabulary:,}",
         padded if work.vocabulary != c.vocab_size else ""),
        ("features D, F", f"{c.d_model}, {c.d_ff}", f"H = {c.num_heads} heads"),
        ("layers N_e, N_d", f"{c.num_encoder_layers}, {c.num_decoder_layers}",
         f"compute_dtype={c.compute_dtype}, implementation={c.implementation}, "
         f"rematerialize={c.rematerialize}"),
        ("devices", f"{work.devices}",
         f"data d = {mesh.sizes['data']}, fsdp f = {mesh.fsdp}, tensor t = {mesh.tensor}"),
        ("rows", f"{work.rows:,}",
         f"S = {work.source}, T = {work.target} positions; R = rows/(d·f·accumulation) = "
         f"{work.rows_at_once} at a time on a device"),
        ("target positions", f"{work.target_tokens:,}", "rows·T, a step, padding included"),
    ):  # fmt: skip
        made.add_row(*row)
    return made


def _is_plain(config: TransformerConfig) -> bool:
    """Whether its parameters are those of the paper's model."""
    return (
        config.source_vocab_size is None and config.tied_output and not config.output_bias
        and not config.projection_bias and not config.has_final_norm
        and config.positions == "sinusoidal"
    )  # fmt: skip


Row = tuple[str, Callable[[Habits], float], str]
"""What it is, its bytes by a compiler's habits, and its formula."""


def _state_rows(work: Work) -> list[Row]:
    return [
        ("parameters", lambda h: parameter_bytes(work), "4·P, the matrices of it over f·t or t"),
        ("moments", lambda h: 2 * parameter_bytes(work), "Adam's two: 2 · parameters"),
        ("step, counts, key", lambda h: COUNTERS, "3 int32, 2 uint32"),
        ("batch", lambda h: batch_bytes(work), "4·3·(S + T)·rows/(d·f): ids, segments, positions"),
    ]


def _held_rows(work: Work) -> list[Row]:
    anew, over = work.model.rematerialize == "layers", work.devices > 1
    gathered = "4·P/t, gathered over f"
    if work.mesh.fsdp == 1:
        gathered = "W^Q, W^K, W^V side by side: 4·3·D²/t an attention"
    kept = "embeddings, N_e encoder and N_d decoder layers"
    if anew:
        kept = "of each layer what goes into it, 4·n·D: its own once more in the backward pass"
    return [
        ("gradients", lambda h: sum(s.gradients for s in stages(work, h)),
         "as parameters, and a table a lookup; CPU: whole until divided over f"),
        ("kept activations", lambda h: activation_bytes(work, h), kept),
        ("  encoder layer", lambda h: encoder_layer(work, h),
         "4n(4D + 4D/t + 2F/t + 6) + draws 2nD + weights 4·R·H/t·S², n = R·S"),
        ("  decoder layer", lambda h: decoder_layer(work, h),
         "4n(6D + 6D/t + 2F/t + 9) + 8·R·S·D/t + draws 3nD + 4·R·H/t·T(T + S), n = R·T"),
        ("logits", lambda h: loss_bytes(work), "4·R·T·V/t twice, thrice where V is padded"),
        ("matrices at use", lambda h: sum(s.gathered for s in stages(work, h)), gathered),
        ("copies", lambda h: copied_bytes(work) if h.copies else 0,
         "XLA for the CPU copies both moments" + (", a table twice" if over else "")),
    ]  # fmt: skip


def _sum_rows(work: Work) -> list[Row]:
    return [
        ("arguments", lambda h: argument_bytes(work), "parameters, moments, counts, batch"),
        ("temporaries", lambda h: temporary_bytes(work, h),
         "most at once on the way back: activations before it, gradients behind it; copies"),
        ("sum", lambda h: needed_bytes(work, h), ""),
    ]  # fmt: skip


def memory(work: Work, on_cpu: OnCPU | None) -> Table:
    """Bytes of one device."""
    made = _table("Memory of one device", "what", "GPU", "TPU", "CPU", "formula")
    for rows in (_state_rows(work), _held_rows(work), _sum_rows(work)):
        for name, of, formula in rows:
            made.add_row(name, *(scaled(of(h)) for h in HABITS), formula)
        made.add_section()
    if on_cpu:
        for name, said, ours in (
            ("compiled, CPU: args", on_cpu.arguments, argument_bytes(work)),
            ("compiled, CPU: temps", on_cpu.temporaries, temporary_bytes(work, CPU)),
        ):
            beside = f"; by formula {ours:,}, {ours / said - 1:+.1%}"
            made.add_row(name, "", "", scaled(said), f"memory_analysis(): {said:,}"
                         + (", as by formula" if ours == said else beside))  # fmt: skip
    made.caption = (
        "Activations are f32 with bfloat16 too. Weights: cuDNN's attention (bf16) keeps none, nor "
        "a CPU's of\nlong sequences; its other keeps two copies. Draws: a byte an element dropped "
        "out, two on a CPU.\nGPU and TPU: not measured."
    )
    return made


def computing(work: Work) -> Table:
    """FLOPs of the matrix products of a step."""
    made = _table("Matrix products of a step, on all devices", "what", "FLOPs", "a target token",
                  "formula")  # fmt: skip
    found = products(work)

    def row(name: str, flops: float, formula: str) -> None:
        made.add_row(name, scaled(flops, ""), scaled(flops / work.target_tokens, ""), formula)

    row(
        "forward",
        found.forward,
        "a row: N_e·S(8D² + 4DF) + N_d(T(12D² + 4DF) + S·4D²) + T·2DV + attention, 4D a pair: "
        f"{attention_share(work):.1%}",
    )
    row("backward", found.backward, "2 · forward")
    if found.anew:
        row("anew", found.anew, "rematerialize=layers: forward without the logits")
    row("rows", found.rows, "gradients of γ, β, b₁, b₂: 16 a feature and position")
    row("sum", found.step, "")
    return made


def exchange(work: Work, on_cpu: OnCPU | None) -> Table:
    """The collectives of a step."""
    made = _table("Collectives of a step, on each device", "what", "kind", "axes", "result",
                  "sent", "formula of the result")  # fmt: skip
    found = collectives(work)
    for c in found:
        times_ = f", × {work.accumulation} micro-batches" if work.accumulation > 1 else ""
        made.add_row(c.what, c.kind, "×".join(c.axes), scaled(c.bytes), scaled(c.sent(work)),
                     c.formula + (times_ if c.overlaps else ""))  # fmt: skip
    if not found:
        made.add_row("none", "", "", "0 B", "0 B", "one device")
    made.caption = (
        "M: elements of the matrices. n_s, n_t: positions of a step on a device. Sent around a "
        "ring of p\ndevices: 2(p−1)/p of a sum, (p−1)/p of what is gathered."
        " Besides these: single numbers (norms, counts)."
    )
    if on_cpu and on_cpu.collectives:
        made.add_section()
        for (kind, axes), size in sorted(on_cpu.collectives.items()):
            planned = sum(c.bytes for c in found if (c.kind, c.axes) == (kind, axes))
            made.add_row("compiled, CPU", kind, "×".join(axes), scaled(size), "",
                         f"{size:,}" + (", as by formula" if planned == size
                                        else f"; by formula {planned:,}"))  # fmt: skip
    return made


def chips(
    work: Work, found: Sequence[Chip], assumed: Assumed, steps: int, price: float | None
) -> Table:
    """How fast the step should be on each chip, and how many rows fit."""
    made = _table(
        f"Expected on {work.devices} chip{'s' * (work.devices > 1)} of a kind; times in ms a step",
        "chip", "most rows", "passes", "Adam", "exchange", "exposed", "step", "tokens/s",
        f"{steps:,} steps", *(() if price is None else ("cost",)), formula=False,
    )  # fmt: skip
    for chip in found:
        t, most = times(work, chip, assumed), most_rows(work, chip, assumed)
        hours = steps * t.step / 3600
        made.add_row(
            chip.name, f"{most:,}" + ("!" if most < work.rows else ""),
            *(f"{1000 * x:.3g}" for x in (t.passes, t.optimizer, t.exchange, t.exposed)),
            f"{1000 * t.step:.4g}", f"{work.target_tokens / t.step:,.0f}", f"{hours:,.1f} h",
            *(() if price is None else (f"{hours * work.devices * price:,.0f}",)),
        )  # fmt: skip
    made.caption = (
        f"Tokens: target positions. step = passes + Adam + exposed. !: {work.rows:,} rows do not "
        "fit."
    )
    return made


def assumptions(found: Sequence[Chip], assumed: Assumed) -> str:
    """What the expectation rests on, and where the chips' numbers are from."""
    lines = [
        "Assumed, not measured:",
        f"  passes     max(FLOPs / (devices · {assumed.products:.0%} of peak), 2 · kept activations"
        " / bandwidth)",
        "  Adam       8 · bytes of the parameters / bandwidth",
        f"  exchange   bytes sent / {assumed.link:.0%} of link; of gradients and parameters at use"
        " exposed is",
        "             what is longer than the backward pass (⅔ of passes), of the others all",
        f"  most rows  what is needed ≤ {assumed.memory:.0%} of memory",
        "  cost       hours · chips · price; evaluation, saving and compiling are not counted",
        "  f32        exact products, the default; bf16: --model.compute-dtype bfloat16",
        "",
        f"{'chip':<10}{'bf16':>5}{'f32':>6}{'memory':>8}{'bandwidth':>10}{'link':>9}  source",
    ]
    for c in found:
        peaks = (f"{c.bfloat16 / 1e12:.0f} T", f"{c.float32 / 1e12:.0f} T")
        lines.append(
            f"{c.name:<10}{peaks[0]:>5}{peaks[1]:>6}{scaled(c.memory):>8}"
            f"{scaled(c.bandwidth, 'B/s'):>10}{scaled(c.link, 'B/s'):>9}  {c.source}"
        )
    return "\n".join(lines)
