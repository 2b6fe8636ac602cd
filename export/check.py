"""Checks of exported graphs: ONNX Runtime's float32 result against the torch module in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from rlsd.engine import library_path
from rlsd.export.bundle import WEIGHTS
from rlsd.export.trace import plain_attention

LIMIT = 1e-4  # largest allowed ||got - want|| / ||want||
SPARED = 0.005
LARGE = 1 << 32  # bytes of weights, beyond which no optimizer may widen all those that are kept as halves at once


class CheckError(RuntimeError):
    """An exported graph does not compute what its module computes."""


def float64(module: nn.Module) -> Callable[..., Tensor]:
    """The module, which is in evaluation mode, in float64 and without gradients; its weights stay as they are."""

    def call(*args: Tensor) -> Tensor:
        with torch.no_grad(), plain_attention(), WidenedWeights(module):
            return module(*args)

    return call


class WidenedWeights(TorchFunctionMode):
    """Whatever reads one of the module's weights or buffers gets it in float64.

    Each is widened where it is read and dropped again: a network of billions of weights is never in memory twice.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.weights = {id(x) for x in (*module.parameters(), *module.buffers()) if x.is_floating_point()}

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, named = tree_map_only(Tensor, self._widened, (args, dict(kwargs or {})))
        return func(*args, **named)

    def _widened(self, x: Tensor) -> Tensor:
        return x.double() if id(x) in self.weights else x


def doubled(args: Sequence[Tensor]) -> list[Tensor]:
    """Floating-point tensors as float64, others as they are."""
    return [x.double() if x.is_floating_point() else x for x in args]


def pulled_in_float64(
    module: nn.Module, *args: Tensor, cotangent: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the cotangent of the first argument by torch's autograd in float64, and the float32 cotangent of y used."""
    precise = copy.deepcopy(module).double().eval().requires_grad_(False)
    x, *rest = doubled(args)
    x.requires_grad_(True)
    with plain_attention():
        y = precise(x, *rest)
    if cotangent is None:
        cotangent = torch.randn(y.shape)
    if y.requires_grad:
        (pulled,) = torch.autograd.grad(y, x, cotangent.double(), allow_unused=True)
    else:
        pulled = None
    return y.detach(), torch.zeros_like(x) if pulled is None else pulled, cotangent


def open_session(model: Path, optimized: bool = True) -> onnxruntime.InferenceSession:
    """An ONNX file on the CPU with the engine's operators; not `optimized`, it does each of its nodes as written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # as in engine/src/ort.cpp
    options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # for one run they only take memory
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def run(model: Path, inputs: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs of a graph of a bundle that is being written, by name; inputs that it does not have are left out."""
    weights = model.parent / WEIGHTS
    session = open_session(model, optimized=not weights.is_file() or weights.stat().st_size <= LARGE)
    wanted = {node.name for node in session.get_inputs()}
    feed = {n: v.detach().numpy() if isinstance(v, Tensor) else v for n, v in inputs.items() if n in wanted}
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, feed)))


def compare(graph: str, got: Mapping[str, np.ndarray], want: Mapping[str, Tensor], *, rounds: bool = False) -> float:
    """The largest relative error over the outputs; raises CheckError above LIMIT.

    rounds: the module rounds, so that what lies at an edge may fall to either side: the SPARED share of the largest
    differences does not count.
    """
    worst = 0.0
    for name, value in want.items():
        error = relative_error(torch.from_numpy(got[name]), value, rounds)
        if not error <= LIMIT:
            raise CheckError(
                f"graph {graph}, output {name}: relative error {error:.2e} against float64, allowed {LIMIT}"
            )
        worst = max(worst, error)
    return worst


def relative_error(got: Tensor, want: Tensor, rounds: bool = False) -> float:
    """||got - want|| / ||want|| in float64; rounds: without the SPARED share of the largest differences."""
    gaps = (got.double() - want.double()).abs().flatten()
    if rounds and bool(gaps.isfinite().all()):
        gaps = gaps.sort().values[: gaps.numel() - int(SPARED * gaps.numel())]
    return float(gaps.norm()) / (float(want.double().norm()) or 1.0)
