"""The items of a report in HTML: a card for each, and tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rlsd.pipeline.html_table import number, table
from rlsd.pipeline.spreadsheet import Path, dig

Figure = tuple[str, Path, str]  # title, where it is in an item's record, format
QUALITY: Sequence[Figure] = tuple(
    (title, (metric, kind), form)
    for metric, name, form in (("psnr", "PSNR", ".2f"), ("ssim", "SSIM", ".3f"), ("lpips", "LPIPS", ".3f"))
    for title, kind in ((name, "mean"), ("best", "best"), ("by fit", "best_by_fit"), ("mean image", "of_mean_image"))
)
SPREAD: Sequence[Figure] = (
    ("residual", ("residual", "mean"), ".4f"),
    ("in sigma", ("residual_in_sigma", "mean"), ".2f"),
    ("of mean image", ("residual_in_sigma", "of_mean_image"), ".2f"),
    ("similarity", ("feature_similarity",), ".3f"),
    ("deviation", ("deviation",), ".3f"),
    ("classes", ("classes", "distinct"), ".3g"),
    ("entropy", ("classes", "entropy"), ".2f"),
    ("error of mean", ("calibration", "error"), ".3f"),
    ("spread / error", ("calibration", "ratio"), ".2f"),
    ("nominal", ("calibration", "coverage", 0, 0), ".2f"),
    ("coverage", ("calibration", "coverage", 0, 1), ".2f"),
)
FILES = ("mean.png", "std.png", "measurement.png", "arrays.npz", "item.json")
PLOTS = {"trajectories.png": "over the steps", "similarity.png": "particles by similarity"}


def figure_table(first: Sequence[str], rows: Sequence[Sequence[str]], figures: Sequence[Figure], items: Any) -> str:
    """A table of figures, a row for each of `items` (records or the like) behind the texts of `rows`.

    A figure that none of them has gets no column; "" where none is left.
    """
    values = [[number(dig(item, path), form) for _, path, form in figures] for item in items]
    kept = [column for column in range(len(figures)) if any(row[column] for row in values)]
    if not kept:
        return ""
    head = [*first, *(figures[column][0] for column in kept)]
    return table(head, [[*texts, *(row[column] for column in kept)] for texts, row in zip(rows, values)])


def item_table(items: Sequence[Mapping[str, Any]]) -> str:
    """A row for each item of a task, closed at first."""
    names = [[item["name"]] for item in items]
    tables = [figure_table(["item"], names, figures, items) for figures in (QUALITY, SPREAD)]
    return f'<details class="wide"><summary>all {len(items)} as a table</summary>{"".join(tables)}</details>'


def card(item: Mapping[str, Any]) -> str:
    """One item: its grid picture, its figures, its plots, its particles, its files."""
    folder = escape(item["name"], quote=True)
    source = f"{item['source'] or 'given array'}" + (f" ({'; '.join(item['notes'])})" if item["notes"] else "")
    image = '<img class="grid" loading="lazy" src="{}" alt="">'
    plots = "".join(
        f"<details><summary>{PLOTS[name]}</summary>{image.format(f'{folder}/{name}')}</details>"
        for name in item["plots"]
    )
    return (
        f'<section class="card"><h3>{folder}</h3>'
        f'<a href="{folder}/grid.png"><img class="grid" loading="lazy" src="{folder}/grid.png" alt="{folder}"></a>'
        + "".join(figure_table([], [[]], figures, [item]) for figures in (QUALITY, SPREAD))
        + _classes(item)
        + plots
        + f"<details><summary>each particle, files</summary>{particle_table(item)}"
        f'<p class="faint">from {escape(source)}</p><p>'
        + " ".join(f'<a href="{folder}/{name}">{name}</a>' for name in FILES)
        + "</p></details></section>"
    )


def _classes(item: Mapping[str, Any]) -> str:
    classes = item.get("classes")
    if not classes:
        return ""
    counted = ", ".join(f"{name} {count}" for name, count in classes["histogram"].items())
    given = f"; the input is taken for {classes['of_input']}" if classes["of_input"] else ""
    return f'<p class="faint">classes: {escape(counted + given)}</p>'


def particle_table(item: Mapping[str, Any]) -> str:
    """A row for each particle; the one that fits the measurement best is marked."""
    columns = (
        ("PSNR", ("psnr", "particles"), ".2f"),
        ("SSIM", ("ssim", "particles"), ".3f"),
        ("LPIPS", ("lpips", "particles"), ".3f"),
        ("residual", ("residual", "particles"), ".4f"),
    )
    shown = [(title, values, form) for title, path, form in columns if (values := dig(item, path)) is not None]
    names = dig(item, ("classes", "predicted"))
    head = ["particle", *(title for title, _, _ in shown), *(["class"] if names else []), ""]
    rows = [
        [
            str(i),
            *(number(v[i], form) for _, v, form in shown),
            *([names[i]] if names else []),
            "best by fit" * (i == item["best_by_fit"]),
        ]
        for i in range(len(item["residual"]["particles"]))
    ]
    return table(head, rows)
