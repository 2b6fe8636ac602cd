"""What a graph must do at least: floating-point operations and bytes, from its bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from rlsd.bench.gpu.roof import Roof

STEP = ("denoiser", "decoder", "decoder_pull", "features", "features_pull")
SIZES = {1: 4, 7: 8, 10: 2, 11: 8}  # bytes of ONNX's float, int64, float16, double


@dataclass(frozen=True)
class Graph:
    """operations and passed (bytes in and out) of one sample; weights: bytes read once for a whole batch."""

    operations: float
    passed: float
    weights: float


@dataclass(frozen=True)
class Work:
    """The graphs of a bundle. largest: the most samples that one run takes, so that weights are read again after."""

    graphs: Mapping[str, Graph]
    largest: int

    def operations(self, samples: int, names: Sequence[str] = STEP) -> float:
        """Of the named graphs; by default of a full step."""
        return samples * sum(self.graphs[name].operations for name in names if name in self.graphs)

    def moved(self, samples: int, names: Sequence[str] = STEP) -> float:
        """Bytes: weights once a run, inputs and outputs (kept activations among them) once."""
        runs, found = math.ceil(samples / self.largest), [self.graphs[n] for n in names if n in self.graphs]
        return sum(runs * graph.weights + samples * graph.passed for graph in found)

    def least_seconds(self, roof: Roof, samples: int, names: Sequence[str] = STEP) -> float:
        """The roofline of the named graphs, one after another: each is bound by its work or by its bytes."""
        return sum(roof.seconds(self.operations(samples, [n]), self.moved(samples, [n])) for n in names)


def of_bundle(bundle: Path, counted: Mapping[str, float]) -> Work:
    """Reads the manifest and the graphs' headers. counted: operations of one sample where the manifest has none."""
    operations, batches = dict(counted), set()
    files: dict[str, tuple[int, Path]] = {}
    for line in (bundle / "manifest.txt").read_text().splitlines():
        match line.split():
            case ["info", "operations", graph, batch, number]:
                operations[graph] = float(number) / int(batch)
            case ["graph", graph, batch, file] if graph in STEP:
                batches.add(int(batch))
                files.setdefault(graph, (int(batch), bundle / file))
    graphs = {name: _graph(path, batch, operations[name]) for name, (batch, path) in files.items()}
    return Work(graphs, max(batches))


def _graph(path: Path, batch: int, operations: float) -> Graph:
    """Initializers that Gather picks rows from are tables, of which a run reads next to nothing."""
    graph = onnx.load(path, load_external_data=False).graph
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    weights = [w for w in graph.initializer if w.name not in tables]
    constants = {w.name for w in graph.initializer}
    passed = [_value_bytes(v) for v in [*graph.input, *graph.output] if v.name not in constants]
    return Graph(operations, sum(passed) / batch, sum(_bytes(w.data_type, w.dims) for w in weights))


def _value_bytes(value: onnx.ValueInfoProto) -> int:
    kind = value.type.tensor_type
    return _bytes(kind.elem_type, [dim.dim_value for dim in kind.shape.dim])


def _bytes(kind: int, shape: Sequence[int]) -> int:
    return SIZES.get(kind, 4) * math.prod(shape)
