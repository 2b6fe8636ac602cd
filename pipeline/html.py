"""report.html: one page with the pictures beside it and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rlsd.pipeline.html_items import QUALITY, SPREAD, card, figure_table, item_table
from rlsd.pipeline.html_table import plain, table
from rlsd.pipeline.spreadsheet import dig

SHOWN, LISTED = 200, 1000  # items of a task with a card, and in its table: a page of thousands would not open
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
details { margin: 8px 0 0; } table + table { margin-top: 8px; }
details.wide { overflow-x: auto; } summary { cursor: pointer; color: var(--accent); }
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
        + (f", {rate:,.0f} a second on {escape(time['where'])}" if rate else "")
    )
    files = " ".join(f'<a href="{name}">{name}</a>' for name in ("report.json", "items.csv", "particles.csv"))
    parts = [
        "<h1>rlsd report</h1>",
        f'<p class="faint">{lead}</p>',
        f"<p>{files}</p>",
        *(f'<p class="failed">{escape(each["name"])} failed: {escape(each["error"])}</p>' for each in report["failed"]),
        _overview(report),
        _calibration(report),
        *(_task(task, [item for item in items if item["task"] == task["task"]]) for task in report["tasks"]),
        "<h2>How</h2>",
        _how(report),
        f'<p class="faint">{_NOTES}{_lpips_note(report)}</p>',
    ]
    title = escape(f"rlsd: {bundle['name']}, {count}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


_NOTES = (
    "PSNR (dB), SSIM and LPIPS are means over an item's particles, then the best particle's, then those of the "
    "particle that fits the measurement best (chosen without the clean image), then those of the mean image. "
    "They compare images clipped to [-1, 1], inside of the prior's black border if it has one. "
    "Residual is sqrt(mean (y - f(x))^2) over what was observed. "
    "Similarity is the mean cosine of the angle between the features of an item's particles, deviation the mean of "
    "the deviation map in units of the image range [-1, 1]: low similarity and high deviation mean diverse. "
    "Classes are those that the prior's classifier sees among the particles, entropy (in nats) that of their shares. "
    "Error of mean is the root mean square of the mean image's error; spread is what it should be by the particles' "
    "deviation: spread / error is 1 for particles that are as unsure as they should be, less for those too sure. "
    "Coverage is the share of the pixels whose true value lies between the lowest and the highest particle, nominal "
    "what it would be if truth and particles were drawn from the same distribution. "
)


def _lpips_note(report: Mapping[str, Any]) -> str:
    if not report.get("lpips"):
        return ""
    times = report["lpips"]["enlarged"]
    return f"For LPIPS each pixel is repeated {times} x {times} times. " if times > 1 else ""


def _overview(report: Mapping[str, Any]) -> str:
    """Means over the items of each task."""
    names, means = [], []
    for task in report["tasks"]:
        items = [item for item in report["items"] if item["task"] == task["task"]]
        if items:
            names.append([task["task"], str(len(items))])
            means.append(_means(items) | {"calibration": report["calibration"].get(task["task"])})
    tables = [figure_table(["task", "items"], names, figures, means) for figures in (QUALITY, SPREAD)]
    return '<section class="card"><h3>Means over the items</h3>' + "".join(tables) + "</section>" if names else ""


def _means(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each figure over the items that have it, in the shape of an item's record."""
    found: dict[str, Any] = {}
    for _, path, _ in (*QUALITY, *SPREAD):
        values = [value for item in items if (value := dig(item, path)) is not None]
        if not values or path[0] == "calibration":
            continue
        mean = sum(values) / len(values)
        if len(path) == 1:
            found[str(path[0])] = mean
        else:
            found.setdefault(str(path[0]), {})[path[1]] = mean
    return found


def _calibration(report: Mapping[str, Any]) -> str:
    if not report["calibration"]:
        return ""
    shown = '<img class="grid" src="calibration.png" alt="coverage, and error against spread">'
    return (
        '<section class="card"><h3>Calibration: all pixels of all items</h3>'
        + (shown if report["calibration_plot"] else f'<p class="faint">{_NO_PLOTS}</p>')
        + "</section>"
    )


_NO_PLOTS = "Plots need matplotlib: pip install 'rlsd[report]'."


def _task(task: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> str:
    """A task's heading, the table of its items, and their cards."""
    notes = []
    if len(items) > SHOWN:
        notes.append(f"The first {SHOWN} of {len(items)} items are shown; items.csv has all of them.")
    plotted = sum(bool(item["plots"]) for item in items)
    if items and plotted < len(items):
        notes.append(f"The first {plotted} items have plots.")
    parts = [
        f"<h2>{escape(task['task'])}: {escape(task['summary'])}</h2>",
        *(f'<p class="faint">{note}</p>' for note in notes),
        item_table(items[:LISTED]) if len(items) > 1 else "",
        *(card(item) for item in items[:SHOWN]),
    ]
    return "\n".join(parts)


def _how(report: Mapping[str, Any]) -> str:
    """Settings, time by phase, machine, versions and hashes."""
    keys = [key for key in report["tasks"][0] if key not in ("summary", "parameter_files")] if report["tasks"] else []
    settings = [[key.replace("_", " "), *(plain(task[key]) for task in report["tasks"])] for key in keys]
    phases = [[name.replace("_", " "), f"{value:.2f}"] for name, value in report["time"]["thread_seconds"].items()]
    bundle = [[key.replace("_", " "), plain(value)] for key, value in report["bundle"].items()]
    system = [[key, plain(value)] for part in ("machine", "versions") for key, value in report[part].items()]
    hashes = [[item["name"], item["sha256"] or ""] for item in report["items"][:SHOWN]]
    cards = (
        ("Settings", table(["", *("" for _ in report["tasks"])], settings)),
        ("Seconds in each phase, summed over the threads", table(["phase", "seconds"], phases)),
        ("Bundle", table(["", ""], bundle)),
        ("Machine and versions", table(["", ""], system)),
        ("SHA-256 of the inputs", table(["item", "SHA-256"], hashes, code=True)),
    )
    sections = (f'<section class="card"><h3>{title}</h3>{content}</section>' for title, content in cards)
    return f'<div class="cards">{"".join(sections)}</div>'
