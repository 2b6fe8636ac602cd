"""Markdown tables, and the numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Line = dict[str, Any]


def by(lines: Iterable[Line], key: Any) -> Iterator[tuple[str, list[Line]]]:
    """The lines in groups, each in the order in which its first line stands."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    yield from groups.items()


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table, and an empty line."""
    cells = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (list(head), ["---"] * len(head), *cells)] + [""]


def number(value: Any) -> str:
    """Four digits."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def share(value: float | None) -> str:
    """Percent."""
    return "" if value is None else f"{value:.1%}"


def target_table(lines: Iterable[Line]) -> list[str]:
    """The targets that lines were judged by; nothing without any."""
    judged = [each for line in lines for each in line.get("targets", [])]
    rows = [(each["name"], each["wanted"], number(each["value"]), each["verdict"]) for each in judged]
    return table(("target", "wanted", "measured", "verdict"), rows) if rows else []
