"""items.csv and particles.csv: a report's figures for other programs; docs/metrics.md explains the columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Path = tuple[str | int, ...]
_KINDS = ("mean", "best", "best_by_fit", "of_mean_image")

ITEM_COLUMNS: Mapping[str, Path] = {
    "task": ("task",),
    "item": ("item",),
    "name": ("name",),
    "source": ("source",),
    "seconds": ("seconds",),
    **{f"{metric}_{kind}": (metric, kind) for metric in ("psnr", "ssim", "lpips") for kind in _KINDS},
    **{
        f"{metric}_{kind}": (metric, kind)
        for metric in ("residual", "residual_in_sigma")
        for kind in ("mean", "best", "of_mean_image")
    },
    "best_by_fit": ("best_by_fit",),
    "feature_similarity": ("feature_similarity",),
    "deviation": ("deviation",),
    "classes": ("classes", "distinct"),
    "class_entropy": ("classes", "entropy"),
    "class_of_input": ("classes", "of_input"),
    "error_of_mean": ("calibration", "error"),
    "spread": ("calibration", "spread"),
    "spread_over_error": ("calibration", "ratio"),
    "coverage_nominal": ("calibration", "coverage", 0, 0),
    "coverage": ("calibration", "coverage", 0, 1),
}
PARTICLE_COLUMNS: Mapping[str, Path] = {
    "psnr": ("psnr", "particles"),
    "ssim": ("ssim", "particles"),
    "lpips": ("lpips", "particles"),
    "residual": ("residual", "particles"),
    "residual_in_sigma": ("residual_in_sigma", "particles"),
    "class": ("classes", "predicted"),
    "class_probability": ("classes", "probability"),
}


def dig(value: Any, path: Path) -> Any:
    """What lies at the end of a path of keys and indices, None where it breaks off."""
    for key in path:
        if isinstance(key, int):
            value = value[key] if isinstance(value, Sequence) and key < len(value) else None
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


def items_csv(items: Sequence[Mapping[str, Any]]) -> str:
    """A line of names, and one for each item of a report; what is not known is empty."""
    return _csv(ITEM_COLUMNS, ([dig(item, path) for path in ITEM_COLUMNS.values()] for item in items))


def particles_csv(items: Sequence[Mapping[str, Any]]) -> str:
    """A line of names, and one for each particle of each item; best_by_fit is 1 for the particle that fits best."""
    names = ["task", "item", "name", "particle", *PARTICLE_COLUMNS, "best_by_fit"]
    return _csv(names, (row for item in items for row in _particles(item)))


def _particles(item: Mapping[str, Any]) -> Iterable[list[Any]]:
    columns = [dig(item, path) for path in PARTICLE_COLUMNS.values()]
    for index in range(len(item["residual"]["particles"])):
        values = [None if column is None else column[index] for column in columns]
        yield [item["task"], item["item"], item["name"], index, *values, int(index == item["best_by_fit"])]


def _csv(names: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return stream.getvalue()
