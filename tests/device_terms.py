"""Settings and tolerance of the comparisons in halves: over the stand-in for a driver, and on a real GPU."""

from __future__ import annotations

import numpy as np

PARAMS = {"steps": 6, "lr_x": 0.05, "lr_z": 0.05, "lambda_": 0.3, "repulsion_until": 0.8}
TOLERANCE = 1e-2  # of values in halves, after 5 steps of Adam


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
