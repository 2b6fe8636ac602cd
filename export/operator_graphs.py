"""The graphs of forward operators, checked as they are made: for a new bundle, or for one that gets more of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from rlsd.export import check
from rlsd.export.bundle import BundleWriter
from rlsd.export.onnx_graph import to_onnx
from rlsd.export.operators import default_parameters
from rlsd.export.pullback import Split, split
from rlsd.export.trace import PLAIN_REWRITES, to_aten


def declare(operators: Mapping[str, nn.Module], image: Sequence[int], bundle: BundleWriter) -> None:
    """Writes each operator's name, the shape of y and the shapes of its parameters to the manifest."""
    for name, operator in operators.items():
        given = default_parameters(operator, image, 1)
        with torch.no_grad():
            y = copy.deepcopy(operator).float()(torch.zeros(1, *image), **given)
        bundle.fact("operator", name, *y.shape[1:])
        for word, value in given.items():
            bundle.fact("operator_param", name, word, *value.shape[1:])


class OperatorGraphs:
    """Exports and checks the graphs of forward operators for one batch. x: images [batch, *image] to check with."""

    def __init__(self, bundle: BundleWriter, x: Tensor, rewrites: Sequence[str]):
        self.bundle, self.x = bundle, x
        self.rewrites = [name for name in rewrites if bundle.target == "cpu" or name in PLAIN_REWRITES]
        self.batch = len(x)

    def operator(self, name: str, operator: nn.Module) -> None:
        """Adds the two graphs of a forward operator: f(x), and the data loss with its gradient."""
        operator = copy.deepcopy(operator).float()
        given = default_parameters(operator, self.x.shape[1:], self.batch)
        with torch.no_grad():
            y = operator(self.x, **given)
        args, names = [self.x, *given.values()], ["x", *given]
        forward = to_onnx(to_aten(operator, args, self.rewrites), args, names, ["y"])
        want = check.float64(operator)(*check.doubled(args))
        rounds = bool(getattr(operator, "rounds", False))
        got = self._add(f"operator.{name}.forward", forward, dict(zip(names, args)), {"y": want}, rounds)

        loss = DataLoss(operator)
        measured = y + 0.1 * torch.randn_like(y)
        args, names = [self.x, measured, *given.values()], ["x", "y", *given]
        parts = split(to_aten(loss, args, self.rewrites), args, names)
        whole = LossAndGradient(parts, names)
        model = to_onnx(whole, args, names, ["loss", "grad"])
        if rounds:
            value, gradient = around(operator, torch.from_numpy(got["y"]), *args)
        else:
            value, gradient, _ = check.pulled_in_float64(loss, *args, cotangent=torch.ones(self.batch))
        self._add(f"operator.{name}.loss", model, dict(zip(names, args)), {"loss": value, "grad": gradient}, rounds)

    def _add(
        self,
        name: str,
        model: ir.Model,
        inputs: Mapping[str, Tensor | np.ndarray],
        want: Mapping[str, Tensor],
        rounds: bool = False,
    ) -> dict[str, np.ndarray]:
        """Adds the graph, checks it against what float64 gives, records the error, returns its outputs."""
        got = check.run(self.bundle.graph(name, self.batch, model), inputs)
        error = check.compare(name, got, want, rounds=rounds)
        self.bundle.fact("check", name, self.batch, float(f"{error:.3g}"))
        return got


def around(operator: nn.Module, seen: Tensor, x: Tensor, y: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [B] and gradient in x, in float64, where `seen` stands for f(x): an edge's other side counts for the loss.

    One value of two levels that is rounded the other way is worth 2 in y, against residuals of 0.1.
    """
    residual = (seen - y).double()
    loss = 0.5 * residual.square().flatten(1).mean(1)
    _, gradient, _ = check.pulled_in_float64(operator, x, *given, cotangent=residual / residual[0].numel())
    return loss, gradient


class DataLoss(nn.Module):
    """(x, y, *parameters) -> [B]: half the mean squared residual of each particle."""

    def __init__(self, operator: nn.Module):
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        residual = y - self.operator(x, *parameters)
        return 0.5 * residual.square().flatten(1).mean(1)


class LossAndGradient(nn.Module):
    """Both halves of a split loss as one graph: (x, y, *parameters) -> loss [B], gradient in x."""

    def __init__(self, parts: Split, names: Sequence[str]):
        super().__init__()
        self.loss, self.pull = parts.forward, parts.pull
        self.names, self.kept, self.sources = list(names), parts.kept, parts.pull_inputs

    def forward(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        loss, *kept = self.loss(*args)
        named = dict(zip(self.names, args)) | dict(zip(self.kept, kept))
        return loss, self.pull(torch.ones_like(loss), *(named[source] for source in self.sources))[0]
