"""report.html: one page with the pictures beside it and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

CSS = """
:root { --ink: #1c2028; --faint: #6b7280; --line: #e3e6ea; --paper: #fff; --soft: #f6f7f9; --accent: #2f5f9e; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--soft); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 19px; margin: 36px 0 10px; } h3 { font-size: 16px; margin: 0 0 8px; }
p { margin: 6px 0; } .faint { color: var(--faint); } .failed { color: #a3262a; }
.cards { columns: 2 420px; column-gap: 14px; } .cards section { break-inside: avoid; margin: 0 0 14px !important; }
section.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
  margin: 14px 0; overflow-x: auto; }
.grid { max-width: 100%; height: auto; display: block; margin: 4px 0 10px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.cards td { overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--faint); white-space: nowrap; } tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; }
details { margin: 8px 0 0; } summary { cursor: pointer; color: var(--accent); }
code { font-size: 12.5px; overflow-wrap: anywhere; } a { color: var(--accent); }
"""


def to_html(report: Mapping[str, Any]) -> str:
    """The page for a report (report.build_report); pictures are linked relative to it."""
    items, bundle, time = report["items"], report["bundle"], report["time"]
    count = f"{len(items)} reconstruction{'s' if len(items) != 1 else ''}"
    rate = time["particle_steps_per_second"]
    lead = (
        f"{count} with the prior <b>{escape(bundle['name'])}</b> on {escape(report['created'])}: "
        f"{time['particle_steps']:,} particle-steps in {time['seconds']:.1f} s"
        + (f", {rate:,.0f} a second on {time['threads']} threads" if rate else "")
    )
    parts = [
        "<h1>rlsd report</h1>",
        f'<p class="faint">{lead}</p>',
        *(f'<p class="failed">{escape(each["name"])} failed: {escape(each["error"])}</p>' for each in report["failed"]),
        _overview(report),
    ]
    for task in report["tasks"]:
        parts.append(f"<h2>{escape(task['task'])}: {escape(task['summary'])}</h2>")
        parts += [_item(item) for item in items if item["task"] == task["task"]]
    parts += ["<h2>How</h2>", _how(report), f'<p class="faint">{_NOTES}</p>']
    title = escape(f"rlsd: {bundle['name']}, {count}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


_NOTES = (
    "PSNR (dB) and SSIM are means over an item's particles, then the best particle's, then those of the particles' "
    "mean image. They compare images clipped to [-1, 1], inside of the prior's black border if it has one. "
    "Similarity is the mean cosine of the angle between the features of an item's particles, deviation the mean of "
    "the deviation map in units of the image range [-1, 1]: low similarity and high deviation mean diverse. "
    "Residual is sqrt(mean (y - f(x))^2) over what was observed."
)


def _overview(report: Mapping[str, Any]) -> str:
    """One line of means for each task."""
    rows = []
    for task in report["tasks"]:
        items = [item for item in report["items"] if item["task"] == task["task"]]
        if items:
            rows.append(
                [task["task"], str(len(items)), *(_number(_mean(items, path), form) for _, path, form in _FIGURES)]
            )
    head = ["task", "items", *(title for title, _, _ in _FIGURES)]
    return '<section class="card"><h3>Means over the items</h3>' + table(head, rows) + "</section>" if rows else ""


_FIGURES: Sequence[tuple[str, tuple[str, ...], str]] = (
    ("PSNR", ("psnr", "mean"), ".2f"),
    ("best", ("psnr", "best"), ".2f"),
    ("mean image", ("psnr", "of_mean_image"), ".2f"),
    ("SSIM", ("ssim", "mean"), ".3f"),
    ("best", ("ssim", "best"), ".3f"),
    ("mean image", ("ssim", "of_mean_image"), ".3f"),
    ("similarity", ("feature_similarity",), ".3f"),
    ("deviation", ("deviation",), ".3f"),
    ("residual", ("residual", "mean"), ".4f"),
    ("in sigma", ("residual_in_sigma", "mean"), ".2f"),
)


_FILES = ("mean.png", "std.png", "measurement.png", "arrays.npz", "item.json")


def _item(item: Mapping[str, Any]) -> str:
    """One item: its grid picture, its figures, its files."""
    folder = escape(item["name"], quote=True)
    figures = [_number(_dig(item, path), form) for _, path, form in _FIGURES]
    shown = [(title, value) for (title, _, _), value in zip(_FIGURES, figures) if value]
    notes = "; ".join(item["notes"])
    source = f"{item['source'] or 'given array'}" + (f" ({notes})" if notes else "")
    columns = ["particle", "PSNR", "SSIM", "residual"]
    paths = (("psnr", ".2f"), ("ssim", ".3f"), ("residual", ".4f"))
    values = [(_dig(item, (key, "particles")) or [], form) for key, form in paths]
    count = max((len(each) for each, _ in values), default=0)
    rows = [[str(i), *(_number(v[i], form) if i < len(v) else "" for v, form in values)] for i in range(count)]
    return (
        f'<section class="card"><h3>{folder}</h3>'
        f'<a href="{folder}/grid.png"><img class="grid" loading="lazy" src="{folder}/grid.png" alt="{folder}"></a>'
        + table([title for title, _ in shown], [[value for _, value in shown]])
        + f"<details><summary>each particle, files</summary>{table(columns, rows)}"
        f'<p class="faint">from {escape(source)}</p><p>'
        + " ".join(f'<a href="{folder}/{name}">{name}</a>' for name in _FILES)
        + "</p></details></section>"
    )


def _how(report: Mapping[str, Any]) -> str:
    """Settings, time by phase, machine, versions and hashes."""
    keys = [key for key in report["tasks"][0] if key not in ("summary", "parameter_files")] if report["tasks"] else []
    settings = [[key.replace("_", " "), *(_text(task[key]) for task in report["tasks"])] for key in keys]
    phases = [[name.replace("_", " "), f"{value:.2f}"] for name, value in report["time"]["thread_seconds"].items()]
    bundle = [[key.replace("_", " "), _text(value)] for key, value in report["bundle"].items()]
    system = [[key, _text(value)] for part in ("machine", "versions") for key, value in report[part].items()]
    hashes = [[item["name"], item["sha256"] or ""] for item in report["items"]]
    cards = (
        ("Settings", table(["", *("" for _ in report["tasks"])], settings)),
        ("Seconds in each phase, summed over the threads", table(["phase", "seconds"], phases)),
        ("Bundle", table(["", ""], bundle)),
        ("Machine and versions", table(["", ""], system)),
        ("SHA-256 of the inputs", table(["item", "SHA-256"], hashes, code=True)),
    )
    sections = (f'<section class="card"><h3>{title}</h3>{content}</section>' for title, content in cards)
    return f'<div class="cards">{"".join(sections)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], code: bool = False) -> str:
    """A table of texts. Columns of numbers stand to the right; a head of empty texts is left out."""
    numbers = [bool(rows) and all(is_number(row[column]) for row in rows) for column in range(len(head))]

    def line(tag: str, texts: Sequence[str]) -> str:
        cells = []
        for text, right in zip(texts, numbers):
            shown = f"<code>{escape(text)}</code>" if code and tag == "td" else escape(text)
            cells.append(f"<{tag}{' class=number' if right else ''}>{shown}</{tag}>")
        return f"<tr>{''.join(cells)}</tr>"

    top = line("th", head) if any(head) else ""
    return f"<table>{top}{''.join(line('td', row) for row in rows)}</table>"


def is_number(text: str) -> bool:
    """Whether the text looks like a number (or is empty, as a figure that there is not)."""
    return not text.strip("0123456789.,-")


def _dig(item: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = item
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _mean(items: Sequence[Mapping[str, Any]], path: Sequence[str]) -> float | None:
    values = [value for item in items if (value := _dig(item, path)) is not None]
    return sum(values) / len(values) if values else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _text(value: object) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)
