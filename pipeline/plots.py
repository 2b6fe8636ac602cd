"""The plots of a report: how the items went over the steps, and whether the particles' spread can be trusted."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np

from rlsd.pipeline.calibration import EDGES

INK, FAINT, LIGHT = "#1c2028", "#6b7280", "#e3e6ea"


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def trajectories(trace: np.ndarray, scale: float, sigma: float) -> bytes:
    """A PNG of residual, diversity and bandwidth over the steps, from a trace [K - 1, N, 3]; see rlsd.h.

    scale: the root of how much the mean over what was observed exceeds that over all of y. sigma: the noise, shown as a
    line; 0 if it is not known. Thin lines are particles, the thick one is their median.
    """
    residual = np.sqrt(2 * trace[:, :, 0].astype(np.float64)) * scale
    bandwidth, diversity = trace[:, :, 1].astype(np.float64), trace[:, :, 2].astype(np.float64)
    figure = _figure(10.5, 2.9)
    panels = (
        ("data residual", residual, ""),
        ("diversity: how far a latent is from the others", diversity, "one particle"),
        ("bandwidth of the repulsion", bandwidth, "no repulsion"),
    )
    for axes, (title, values, without) in zip(figure.subplots(1, 3), panels):
        _lines(axes, values, without)
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_xlabel("step", fontsize=9, color=FAINT)
        if title == "data residual" and sigma > 0:
            axes.axhline(sigma, color="#a3262a", linewidth=1, linestyle="--")
            axes.text(len(values) - 1, sigma, "noise ", color="#a3262a", fontsize=8, ha="right", va="bottom")
    return _png(figure)


def _lines(axes: Any, values: np.ndarray, without: str) -> None:
    known = np.isfinite(values).all(1)
    axes.set_xlim(0, max(len(values) - 1, 1))
    if not known.any():
        axes.text(0.5, 0.5, without, transform=axes.transAxes, ha="center", va="center", color=FAINT, fontsize=9)
        axes.set_yticks([])
        return
    steps = np.flatnonzero(known)
    axes.plot(steps, values[known], color="#2f5f9e", alpha=0.35, linewidth=0.7)
    axes.plot(steps, np.median(values[known], axis=1), color=INK, linewidth=1.6)
    if (values[known] > 0).all():
        axes.set_yscale("log")
    axes.grid(True, color=LIGHT, linewidth=0.6)


def calibration_plot(pooled: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A PNG for the pooled calibration of each task (calibration.pool): coverage, and error against spread."""
    figure = _figure(10.5, 4.6)
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--")
    right.plot([EDGES[0] / 2, 2], [EDGES[0] / 2, 2], color=FAINT, linewidth=1, linestyle="--")
    for task, figures in pooled.items():
        label = f"{task} (spread / error {figures['ratio']:.2f})" if figures["ratio"] else task
        nominal, found = zip(*[(1, 1), *figures["coverage"], (0, 0)])
        (line,) = left.plot(nominal, found, marker="o", markersize=4, linewidth=1.3, label=label)
        bins = {key: np.array(values, float) for key, values in figures["bins"].items()}
        used = bins["pixels"] >= 0.001 * bins["pixels"].sum()
        means = (np.sqrt(bins[key][used] / bins["pixels"][used]) for key in ("variance", "squared_error"))
        spread, error = (np.maximum(mean, EDGES[0] / 2) for mean in means)  # 0 has no place on the axis
        right.plot(spread, error, marker="o", markersize=4, linewidth=1.3, color=line.get_color())
    left.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    right.set(xscale="log", yscale="log")
    _titles(left, "Coverage of intervals between particles", "nominal", "share of the pixels inside")
    _titles(right, "Error of the mean against the particles' spread", "spread of a pixel", "root mean square error")
    left.legend(fontsize=8, frameon=False, loc="upper left")
    for axes in (left, right):
        axes.grid(True, color=LIGHT, linewidth=0.6)
    return _png(figure)


def _titles(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(x, fontsize=9, color=FAINT)
    axes.set_ylabel(y, fontsize=9, color=FAINT)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _png(figure: Any) -> bytes:
    for axes in figure.axes:
        axes.tick_params(which="both", labelsize=8, colors=FAINT)
        for spine in axes.spines.values():
            spine.set_color(LIGHT)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})  # nothing in the file but the picture
    return stream.getvalue()
