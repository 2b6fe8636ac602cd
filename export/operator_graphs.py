"""The graphs of forward operators, checked as they are made: for a new bundle, or for one that gets more of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from rlsd.export import check
from rlsd.export.bundle import BundleWriter, check_name
from rlsd.export.onnx_graph import to_onnx
from rlsd.export.operators import default_parameters
from rlsd.export.pullback import Split, split
from rlsd.export.refusals import exporting
from rlsd.export.resizing import plain_resizing
from rlsd.export.trace import PLAIN_REWRITES, to_aten

RESIDUAL = 0.1  # deviation of y - f(x) in the checks
# What float32 rounds the other way is seldom, but changes a whole block of a JPEG: more than a check of a small image
# can spare. It happens to other images than those before; a wrong graph is wrong for all.
TRIES = 4
LONGEST = 80  # characters of an operator's name: those of its files may have 128
TAKEN = ("x", "y", "t", "loss", "grad")  # tensors of every operator's graphs


def check_operator(name: str, operator: nn.Module, image: Sequence[int]) -> None:
    """ValueError for a name, of the operator or a parameter, that neither a bundle nor the engine would take."""
    check_name("operator", name)
    if len(name) > LONGEST:
        raise ValueError(f"operator {name[:LONGEST]!r}... is longer than the {LONGEST} characters that are allowed")
    for word in default_parameters(operator, image, 1):
        if check_name("parameter", word) in TAKEN:
            raise ValueError(f"parameter {word!r} of operator {name!r} is not allowed: the graphs use that name")


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
        """Adds the two graphs of a forward operator: f(x), and the data loss with its gradient.

        ValueError for one that cannot be a graph, CheckError for graphs that do not agree with it.
        """
        operator = copy.deepcopy(operator).float()
        x, given = self.x, default_parameters(operator, self.x.shape[1:], self.batch)
        with exporting(name):
            graphs = self._traced(name, operator, x, given)
        tries = TRIES if getattr(operator, "rounds", False) else 1
        while True:
            tries -= 1
            try:
                with exporting(name):
                    errors = self._errors(graphs, operator, x, given)
                break
            except check.CheckError:
                if not tries:
                    raise
            x, given = torch.rand_like(x) * 2 - 1, default_parameters(operator, x.shape[1:], self.batch)
        for graph, error in zip(graphs, errors):
            self._figure(graph, error)

    def _traced(self, name: str, operator: nn.Module, x: Tensor, given: Mapping[str, Tensor]) -> dict[str, Path]:
        """The files of both graphs by their names."""
        args, names = [x, *given.values()], ["x", *given]
        forward = to_onnx(self._aten(operator, args), args, names, ["y"])
        with torch.no_grad():
            y = torch.zeros_like(operator(x, **given))  # a tensor of its own: an identity gives x itself
        args, names = [x, y, *given.values()], ["x", "y", *given]
        parts = split(self._aten(DataLoss(operator), args), args, names)
        loss = to_onnx(LossAndGradient(parts, names), args, names, ["loss", "grad"])
        models = {f"operator.{name}.forward": forward, f"operator.{name}.loss": loss}
        return {graph: self.bundle.graph(graph, self.batch, model) for graph, model in models.items()}

    def _aten(self, module: nn.Module, args: Sequence[Tensor]) -> fx.GraphModule:
        graph_module = to_aten(module, args, self.rewrites)
        plain_resizing(graph_module)
        return graph_module

    def _errors(
        self, graphs: Mapping[str, Path], operator: nn.Module, x: Tensor, given: Mapping[str, Tensor]
    ) -> tuple[float, float]:
        """The errors of both graphs against float64, for these images and parameters. CheckError above the limit."""
        (forward, model), (loss, model_of_loss) = graphs.items()
        rounds = bool(getattr(operator, "rounds", False))
        with torch.no_grad():
            y = operator(x, **given)
        want = check.float64(operator)(*check.doubled([x, *given.values()]))
        got = check.run(model, {"x": x, **given})
        first = check.compare(forward, got, {"y": want}, rounds=rounds)

        measured = y + RESIDUAL * residual_scale(y) * torch.randn_like(y)
        args = [x, measured, *given.values()]
        if rounds:
            value, gradient = around(operator, torch.from_numpy(got["y"]), *args)
        else:
            ones = torch.ones(self.batch)
            value, gradient, _ = check.pulled_in_float64(DataLoss(operator), *args, cotangent=ones)
        got = check.run(model_of_loss, {"x": x, "y": measured, **given})
        return first, check.compare(loss, got, {"loss": value, "grad": gradient}, rounds=rounds)

    def _add(
        self,
        name: str,
        model: ir.Model,
        inputs: Mapping[str, Tensor | np.ndarray],
        want: Mapping[str, Tensor],
    ) -> dict[str, np.ndarray]:
        """Adds the graph, checks it against what float64 gives, records the error, returns its outputs."""
        got = check.run(self.bundle.graph(name, self.batch, model), inputs)
        self._figure(name, check.compare(name, got, want))
        return got

    def _figure(self, graph: str, error: float) -> None:
        self.bundle.fact("check", graph, self.batch, float(f"{error:.3g}"))


def residual_scale(y: Tensor) -> float:
    """The root mean square of measurements y, 1 at least: beside large values small residuals drown in float32."""
    return max(1.0, float(y.square().mean().sqrt()))


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
