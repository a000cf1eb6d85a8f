"""The ledger as pages: report.html of a run, and the documentation in English and Chinese."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments.checkpoints.run_folder import write_json, write_text
from experiments.reporting.page import Section, page

Record = dict[str, Any]

_CLASSES = {"supported": "right", "not supported": "wrong"}  # of the page's style
_ZH = {
    "supported": "成立",
    "supported, with a caveat": "成立，但有保留",
    "not supported": "不成立",
    "undecided": "未定",
}
_WORDS = {
    "en": {
        "title": "Eleven questions about the Transformer, measured",
        "head": ("Statement", "Effect", "95 % interval", "δ", "Seeds", "Verdict"),
        "caveat": "caveat: ",
        "error": "largest error {:.2g}, bound {:g}",
        "clock": "Measured with a clock: another run gives other numbers.",
        "again": "To measure it again:",
        "other": "[中文](claims.zh.md)",
        "against": "What the measurements do not bear out",
    },
    "zh": {
        "title": "关于 Transformer 的十一个问题：逐一测量",
        "head": ("陈述", "效应", "95 % 区间", "δ", "种子数", "结论"),
        "caveat": "保留意见：",
        "error": "最大误差 {:.2g}，上界 {:g}",
        "clock": "由计时得出：再次运行的数值会有不同。",
        "again": "重新测量：",
        "other": "[English](claims.md)",
        "against": "测量结果不支持的说法",
    },
}
_INTRO = {
    "en": """Each verdict follows from a rule that was written in code before the run: *supported*
where the effect's 95 % interval lies above the threshold δ, *not supported* where it lies below,
*undecided* where it spans δ, and *supported, with a caveat* where a caveat is supported too. An
effect of training is a difference paired by seed (t interval), a share has Wilson's interval, and a
formula's effect is its bound minus its largest error. Small models on CMUdict; preset `{preset}`,
first seed {seed}, {minutes:.0f} minutes on the machine that wrote this page.""",
    "zh": """每个结论都由运行之前就写在代码里的规则得出：效应的 95 % 区间高于阈值 δ 为*成立*，
低于 δ 为*不成立*，跨越 δ 为*未定*；若相应的保留意见也成立，则为*成立，但有保留*。
训练的效应是按种子配对的差（t 区间），比例用 Wilson 区间，公式的效应是“上界减最大误差”。
模型很小，数据为 CMUdict；预设 `{preset}`，首个种子 {seed}，
写出本页的机器用了 {minutes:.0f} 分钟。""",
}


def number(value: float) -> str:
    """A number with three significant digits."""
    return "0" if value == 0 else f"{value:.3g}"


def _interval(subclaim: Record) -> str:
    low, high = subclaim["interval"]
    return number(low) if low == high else f"{number(low)} … {number(high)}"


def _said(subclaim: Record, language: str) -> str:
    words = _WORDS[language]
    statement = subclaim["statement" if language == "en" else "statement_zh"]
    text = (words["caveat"] if subclaim["caveat_of"] else "") + statement
    if "bound" in subclaim:
        error = words["error"].format(subclaim["largest_error"], subclaim["bound"])
        text += f" ({error})" if language == "en" else f"（{error}）"
    return text + (f" {words['clock']}" if subclaim["timed"] else "")


def _verdict(subclaim: Record, language: str) -> str:
    return subclaim["verdict"] if language == "en" else _ZH[subclaim["verdict"]]


def _minutes(records: Sequence[Record]) -> float:
    return sum(record["seconds"] for record in records) / 60


def command(settings: Record, only: str = "") -> str:
    """The command that repeats the measurement."""
    preset = "" if settings["preset"] == "default" else f" --preset {settings['preset']}"
    seed = f" --seed {settings['seed']}" if settings["seed"] else ""
    return f"python -m experiments.run claims{preset}{seed}" + (f" --only {only}" if only else "")


# The report of a run


def _row(subclaim: Record) -> str:
    kind = _CLASSES.get(subclaim["verdict"].split(",")[0], "unknown")
    return (
        f'<tr title="{escape(subclaim["rule"])}"><td>{escape(_said(subclaim, "en"))}</td>'
        f'<td class="number">{number(subclaim["effect"])}</td>'
        f'<td class="number">{_interval(subclaim)}</td>'
        f'<td class="number">{subclaim["threshold"]:g}</td>'
        f'<td class="number">{subclaim["seeds"]}</td>'
        f'<td class="{kind}">{subclaim["verdict"]}</td></tr>'
    )


def _section(record: Record, folder: Path) -> Section:
    head = "".join(f"<th>{name}</th>" for name in _WORDS["en"]["head"])
    rows = "".join(map(_row, record["subclaims"]))
    picture = (folder / record["figure"]).read_text(encoding="utf-8")
    return Section(
        record["id"],
        escape(record["question"]),
        f"<code>{escape(record['formula'])}</code> is <code>{record['function']}</code>. "
        f"{escape(record['lesson'])}",
        f'<div class="card">{picture}</div><div class="card"><table class="verdicts">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>",
    )


def _tiles(records: Sequence[Record]) -> str:
    verdicts = [s["verdict"] for r in records for s in r["subclaims"]]
    tiles = [
        ("Questions", len(records), "of 11"),
        ("Statements", len(verdicts), "each with a rule"),
    ]
    for name in _ZH:
        tiles.append((name.capitalize(), verdicts.count(name), "statements"))
    tiles.append(("Minutes", f"{_minutes(records):.1f}", "all measurements"))
    shown = (f"<div><dt>{n}</dt><dd>{v}</dd><dd>{note}</dd></div>" for n, v, note in tiles)
    return f'<dl class="tiles">{"".join(shown)}</dl>'


def write_report(path: Path, records: Sequence[Record], settings: Record) -> None:
    """Writes the ledger as one self-contained page, its figures inside."""
    intro = escape(_INTRO["en"].format(**settings, minutes=_minutes(records)))
    intro = intro.replace("`", "").replace("*", "")
    sections = [_section(record, path.parent) for record in records]
    title = _WORDS["en"]["title"]
    write_text(path, page(title, intro, command(settings), _tiles(records), sections))


# The documentation


def _question(record: Record, language: str, settings: Record) -> str:
    words, zh = _WORDS[language], language == "zh"
    table = [words["head"], ("---",) * 6]
    table += [
        (
            _said(s, language), number(s["effect"]), _interval(s), f"{s['threshold']:g}",
            str(s["seeds"]), f"**{_verdict(s, language)}**",
        )
        for s in record["subclaims"]
    ]  # fmt: skip
    rows = "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in table)
    question = record["question_zh" if zh else "question"]
    return f"""## {question}

`{record["formula"]}` – `{record["function"]}`

![{question}](claims/{record["figure"]})

{record["lesson_zh" if zh else "lesson"]}

{rows}

{words["again"]} `{command(settings, record["id"])}`
"""


def _contradicted(records: Sequence[Record], language: str) -> str:
    lines = [
        f"- *{record['id']}*: {_said(s, language)} ({number(s['effect'])}; δ = {s['threshold']:g})"
        for record in records
        for s in record["subclaims"]
        if s["verdict"] == "not supported"
    ]
    return f"## {_WORDS[language]['against']}\n\n" + "\n".join(lines) + "\n" if lines else ""


def markdown(records: Sequence[Record], settings: Record, language: str) -> str:
    """The page in one language, 'en' or 'zh'; from the JSON alone."""
    words = _WORDS[language]
    intro = _INTRO[language].format(**settings, minutes=_minutes(records))
    parts = [f"# {words['title']}\n", words["other"] + "\n", intro + "\n"]
    parts += [_contradicted(records, language)]
    parts += [_question(record, language, settings) for record in records]
    return "\n".join(part for part in parts if part)


def publish(docs: Path, records: dict[str, Record], run: Path, settings: Record) -> None:
    """Copies a run's ledger to docs/claims/, and writes docs/claims.md and claims.zh.md."""
    folder = docs / "claims"
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    in_order = list(records.values())
    write_json(folder / "claims.json", in_order)
    write_json(folder / "config.json", settings)
    for record in in_order:
        write_text(folder / record["figure"], (run / record["figure"]).read_text(encoding="utf-8"))
    write_pages(docs)


def write_pages(docs: Path) -> None:
    """docs/claims/claims.json -> docs/claims.md and docs/claims.zh.md."""
    records, settings = (
        json.loads((docs / "claims" / name).read_text(encoding="utf-8"))
        for name in ("claims.json", "config.json")
    )
    write_text(docs / "claims.md", markdown(records, settings, "en"))
    write_text(docs / "claims.zh.md", markdown(records, settings, "zh"))
