"""Tables of texts in HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


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


def number(value: float | None, form: str) -> str:
    """A number in a format, "" for None."""
    return "" if value is None else format(value, form)


def plain(value: object) -> str:
    """Any value of a report as words."""
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)
