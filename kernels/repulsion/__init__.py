"""Repulsion among the particles of many jobs: bandwidths, kernel matrix and gradient, without host synchronisation."""

from __future__ import annotations

from rlsd.kernels.repulsion.launch import KERNELS
from rlsd.kernels.repulsion.ops import median_bandwidth, rbf, repulsion, squared_distances, weighted_differences

__all__ = ["KERNELS", "median_bandwidth", "rbf", "repulsion", "squared_distances", "weighted_differences"]
