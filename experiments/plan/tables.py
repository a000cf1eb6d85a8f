"""The plan as tables: each number with its formula, in 80 columns."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Group
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
WIDTH = 80


class OnCPU(NamedTuple):
    """Figures of the step that was compiled for simulated CPU devices."""

    arguments: int
    temporaries: int
    collectives: Counter[tuple[str, tuple[str, ...]]] | None
    """Bytes by kind and axes. None: they are in a loop, and not counted."""


def scaled(number: float, unit: str = "B") -> str:
    """1,234,567 -> '1.23 MB'."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def _table(title: str, *columns: str, text: tuple[int, ...], gap: int = 2) -> Table:
    """An empty table; `text` are the indices of text columns, the others are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                 show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))  # fmt: skip
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i in text else "right", no_wrap=True)
    return made


def about(work: Work, preset: str) -> Table:
    """The model, the mesh and the batch, with their letters in the formulas."""
    c, mesh = work.model, work.mesh
    made = _table(f"A training of the {preset} model", "what", "number", "formula",
                  text=(0, 2))  # fmt: skip
    whole = sum(p.elements(MeshConfig(1)) for p in parameters(c))
    padded = f"{c.vocab_size:,} words, padded to a multiple of {c.vocab_multiple}"
    for row in (
        ("parameters P", f"{whole:,}",
         "N_e(4D²+2DF+F+5D) + N_d(8D²+2DF+F+7D) + V·D"
         if _is_plain(c) else "the shapes of all parameters"),
        ("vocabulary V", f"{work.vocabulary:,}",
         padded if work.vocabulary != c.vocab_size else ""),
        ("features D, F", f"{c.d_model}, {c.d_ff}", f"H = {c.num_heads} heads"),
        ("layers N_e, N_d", f"{c.num_encoder_layers}, {c.num_decoder_layers}",
         f"rematerialize={c.rematerialize}"),
        ("products in", c.compute_dtype, f"implementation={c.implementation}"),
        ("devices", f"{work.devices}",
         f"data d = {mesh.sizes['data']}, fsdp f = {mesh.fsdp}, tensor t = {mesh.tensor}"),
        ("rows", f"{work.rows:,}", f"S = {work.source}, T = {work.target} positions"),
        ("rows at a time R", f"{work.rows_at_once:,}", "rows/(d·f·accumulation), on a device"),
        ("target positions", f"{work.target_tokens:,}", "rows·T, a step, padding included"),
    ):  # fmt: skip
        made.add_row(*row)
    return made


def _is_plain(config: TransformerConfig) -> bool:
    """Whether the parameters are those of the paper's model."""
    return (
        config.source_vocab_size is None and config.tied_output and not config.output_bias
        and not config.projection_bias and not config.has_final_norm
        and config.positions == "sinusoidal"
    )  # fmt: skip


Row = tuple[str, Callable[[Habits], float], str]
"""Name, bytes as a function of the compiler's habits, and formula."""


def _state_rows(work: Work) -> list[Row]:
    return [
        ("parameters", lambda h: parameter_bytes(work), "4·P, matrices over f·t or t"),
        ("moments", lambda h: 2 * parameter_bytes(work), "Adam's two: 2 · parameters"),
        ("step, counts, key", lambda h: COUNTERS, "3 int32, 2 uint32"),
        ("batch", lambda h: batch_bytes(work), "4·3·(S + T)·rows/(d·f)"),
    ]


def _held_rows(work: Work) -> list[Row]:
    recomputes, over = work.model.rematerialize == "layers", work.devices > 1
    gathered = "4·P/t, gathered over f"
    if work.mesh.fsdp == 1:
        gathered = "W^Q, W^K, W^V: 12·D²/t each time"
    return [
        ("gradients", lambda h: sum(s.gradients for s in stages(work, h)),
         "as parameters, a table a lookup"),
        ("kept activations", lambda h: activation_bytes(work, h),
         "4·n·D a layer: what goes in" if recomputes else "embeddings, N_e + N_d layers"),
        ("  encoder layer", lambda h: encoder_layer(work, h), "below"),
        ("  decoder layer", lambda h: decoder_layer(work, h), "below"),
        ("logits", lambda h: loss_bytes(work), "8·R·T·V/t; 12 where V is padded"),
        ("matrices at use", lambda h: sum(s.gathered for s in stages(work, h)), gathered),
        ("copies", lambda h: copied_bytes(work) if h.copies else 0,
         "both moments" + (", a table twice" if over else "")),
    ]  # fmt: skip


def _sum_rows(work: Work) -> list[Row]:
    return [
        ("arguments", lambda h: argument_bytes(work), "the first four"),
        ("temporaries", lambda h: temporary_bytes(work, h), "most at once on the way back"),
        ("sum", lambda h: needed_bytes(work, h), ""),
    ]


def memory(work: Work, on_cpu: OnCPU | None) -> Group:
    """Bytes of one device."""
    made = _table("Memory of one device", "what", "GPU", "TPU", "CPU", "formula",
                  text=(0, 4))  # fmt: skip
    for rows in (_state_rows(work), _held_rows(work), _sum_rows(work)):
        for name, bytes_of, formula in rows:
            made.add_row(name, *(scaled(bytes_of(h)) for h in HABITS), formula)
        made.add_section()
    if on_cpu:
        for name, compiled, ours in (
            ("compiled: args", on_cpu.arguments, argument_bytes(work)),
            ("compiled: temps", on_cpu.temporaries, temporary_bytes(work, CPU)),
        ):
            beside = "as by formula" if ours == compiled else f"formula {ours / compiled - 1:+.1%}"
            made.add_row(name, "", "", scaled(compiled), f"{compiled:,} B, {beside}")
    notes = (
        "encoder layer  4n(4D + 4D/t + 2F/t + 6) + 2nD draws\n"
        "               + 4·R·H/t·S² weights, n = R·S\n"
        "decoder layer  4n(6D + 6D/t + 2F/t + 9) + 8·R·S·D/t + 3nD draws\n"
        "               + 4·R·H/t·T(T + S) weights, n = R·T\n"
        "Weights: cuDNN's attention (bf16) keeps none, nor a CPU's of long sequences; its\n"
        "other keeps two copies. Draws: a byte an element dropped out, two on a CPU.\n"
        "Temporaries: activations before a layer, gradients behind it, copies; of layers\n"
        "that are computed anew, those of one at a time. Gradients on a CPU: whole until\n"
        "they are divided over f. Activations are f32 with bfloat16 too. Compiled: by\n"
        "XLA's memory_analysis(). GPU and TPU: not measured."
    )
    return Group(made, "", notes)


def computing(work: Work) -> Group:
    """FLOPs of the matrix products of a step."""
    made = _table("Matrix products of a step, on all devices", "what", "FLOPs", "a target token",
                  "formula", text=(0, 3))  # fmt: skip
    counts = products(work)

    def row(name: str, flops: float, formula: str) -> None:
        made.add_row(name, scaled(flops, ""), scaled(flops / work.target_tokens, ""), formula)

    row("forward", counts.forward, f"below; of attention {attention_share(work):.1%}")
    row("backward", counts.backward, "2 · forward")
    if counts.recomputed:
        row("anew", counts.recomputed, "rematerialize: forward without logits")
    row("rows", counts.rows, "γ, β, b₁, b₂: 16 a feature and position")
    row("sum", counts.step, "")
    notes = (
        "forward, a row: N_e·S(8D² + 4DF) + N_d(T(12D² + 4DF) + S·4D²) + T·2DV\n"
        "                + 4D a pair of attention. rows: gradients that are sums of rows."
    )
    return Group(made, "", notes)


def exchange(work: Work, on_cpu: OnCPU | None) -> Group:
    """The collectives of a step, with their formulas below the table."""
    made = _table("Collectives of a step, on each device", "what", "kind", "axes", "result",
                  "sent", text=(0, 1, 2))  # fmt: skip
    exchanged, lines = collectives(work), []
    for c in exchanged:
        times_ = f", × {work.accumulation} micro-batches" if work.accumulation > 1 else ""
        made.add_row(c.what, c.kind, "×".join(c.axes), scaled(c.bytes), scaled(c.sent(work)))
        lines.append((c.what, c.formula + (times_ if c.overlaps else "")))
    if not exchanged:
        made.add_row("none", "", "", "0 B", "0 B")
    for (kind, axes), size in sorted((on_cpu and on_cpu.collectives or {}).items()):
        planned = sum(c.bytes for c in exchanged if (c.kind, c.axes) == (kind, axes))
        beside = "as by formula" if planned == size else f"by formula {planned:,}"
        lines.append((f"compiled: {kind} {'×'.join(axes)}", f"{size:,} B, {beside}"))
    notes = [
        *(f"{name:<31}{formula}" for name, formula in lines),
        "M: elements of the matrices. n_s, n_t: positions of a step on a device. Sent",
        "around a ring of p devices: 2(p−1)/p of a sum, (p−1)/p of what is gathered.",
        "Besides these: single numbers (norms, counts).",
    ]
    return Group(made, "", "\n".join(notes))


def chips(
    work: Work, chosen: Sequence[Chip], assumed: Assumed, steps: int, price: float | None
) -> Group:
    """The expected speed on each chip, and the number of rows that fit."""
    made = _table(
        f"Expected on {work.devices} chip{'s' * (work.devices > 1)} of a kind",
        "chip", "rows", "passes", "Adam", "link", "exposed", "step", "tokens/s", "hours",
        *(() if price is None else ("cost",)), text=(0,), gap=1,
    )  # fmt: skip
    for chip in chosen:
        t, most = times(work, chip, assumed), most_rows(work, chip, assumed)
        hours = steps * t.step / 3600
        made.add_row(
            chip.name, f"{most:,}" + ("!" if most < work.rows else ""),
            *(_milliseconds(x)
              for x in (t.passes, t.optimizer, t.exchange, t.exposed, t.step)),
            scaled(work.target_tokens / t.step, ""), f"{hours:,.1f}",
            *(() if price is None else (f"{hours * work.devices * price:,.0f}",)),
        )  # fmt: skip
    notes = (
        f"Rows: most that fit; !: {work.rows:,} rows do not fit. Tokens: target positions.\n"
        "Times are milliseconds; step = passes + Adam + exposed.\n"
        f"Hours{', cost' * (price is not None)}: of {steps:,} steps."
    )
    return Group(made, "", notes)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 0.9995 else f"{1000 * seconds:,.0f}"


def assumptions(chosen: Sequence[Chip], assumed: Assumed) -> str:
    """The assumptions, and the sources of the chips' numbers."""
    lines = [
        "Assumed, not measured:",
        f"  rows    what is needed ≤ {assumed.memory:.0%} of memory",
        f"  passes  max(FLOPs / (devices · {assumed.products:.0%} of peak),",
        "              2 · kept activations / bandwidth)",
        "  Adam    8 · bytes of the parameters / bandwidth",
        f"  link    bytes sent / {assumed.link:.0%} of link; exposed, of gradients and",
        "          parameters at use, is what is longer than the backward pass (⅔ of",
        "          passes), of the others all",
        "  cost    hours · chips · price; no evaluation, saving or compiling",
        "  f32     exact products, the default; bf16: --model.compute-dtype bfloat16",
        "",
        f"{'chip':<10}{'bf16':>6}{'f32':>7}{'memory':>9}{'bandwidth':>11}{'link':>10}",
    ]
    for c in chosen:
        lines.append(
            f"{c.name:<10}{c.bfloat16 / 1e12:>4.0f} T{c.float32 / 1e12:>5.0f} T"
            f"{scaled(c.memory):>9}{scaled(c.bandwidth, 'B/s'):>11}{scaled(c.link, 'B/s'):>10}"
        )
    lines += ["", *(f"{c.name:<10}{c.source}" for c in chosen)]
    return "\n".join(lines)
