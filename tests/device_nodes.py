"""A graph of every operator that our kernels run on a GPU, on constants, and what each must return.

It takes the place of a tiny bundle's graph `features`: x, weights and the like are constants of the graph, what the
operators return are outputs beside phi.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundle_factory import write_bundle
from hosted import hosted_bundle
from onnx import TensorProto, helper, numpy_helper
from tiny import FEATURES, IMAGE, make_nets

from rlsd.engine import Engine
from rlsd.engine.arrays import tensor_structs
from rlsd.engine.native import check, library
from rlsd.kernels.narrow import columns
from rlsd.kernels.narrow import naive as narrow
from rlsd.kernels.norm import naive

Array = np.ndarray
EPSILON = 1e-5
RNG = np.random.default_rng(0)


def normal(*shape: int, kind: type = np.float32) -> Array:
    return RNG.standard_normal(shape).astype(kind)


def features_graph(nodes: list[Any], constants: Mapping[str, Array], outputs: Mapping[str, Array]) -> bytes:
    """phi is a constant; `outputs`: arrays like what the nodes return by that name."""
    shapes = {"phi": (1, FEATURES)} | {name: array.shape for name, array in outputs.items()}
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in outputs.items()}
    made = [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), shape) for n, shape in shapes.items()]
    given = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    given.append(numpy_helper.from_array(np.zeros((1, FEATURES), np.float32), "zeros"))
    taken = helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, *IMAGE))
    nodes = [*nodes, helper.make_node("Identity", ["zeros"], ["phi"])]
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("rlsd", 1)]
    graph = helper.make_graph(nodes, "features", [taken], made, given)
    return helper.make_model(graph, opset_imports=versions, ir_version=8).SerializeToString()


def bundle_of(folder: Path, graph: bytes, cubins: Sequence[tuple[str, bytes, str]] | None = None) -> Path:
    """A tiny bundle whose features are the graph. cubins: as for hosted_bundle, which makes stand-ins without."""
    source = write_bundle(folder / "cpu", make_nets(), 1, instead={"features": graph})
    return hosted_bundle(source, folder / "cuda", cubins=cubins)


def run(engine: Engine, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """What `features` returns by these names, as float32."""
    found = {name: np.full(array.shape, np.nan, np.float32) for name, array in outputs.items()}
    given, keep = tensor_structs({"image": np.zeros((1, *IMAGE), np.float32)})
    wanted, kept = tensor_structs(found)
    check(library().rlsd_evaluate(engine._pointer, b"features", 1, given, len(keep), wanted, len(kept)))
    return found


class Graph:
    """Nodes of operators on constants, and what they must return, by the definitions in rlsd.kernels.norm.naive."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = {}
        self.wanted: dict[str, Array] = {}

    def add(self, op: str, given: list[Array | None], outputs: list[str], wanted: Any, **attributes: Any) -> None:
        """given: None for an input that is left out between others. outputs: names, "" for one that the node leaves
        out; wanted: as many tensors."""
        names = ["" if each is None else f"{op}.{len(self.nodes)}.{i}" for i, each in enumerate(given)]
        self.constants |= {name: each for name, each in zip(names, given) if each is not None}
        self.nodes.append(helper.make_node(op, names, outputs, domain="rlsd", **attributes))
        self.wanted |= {name: each.numpy() for name, each in zip(outputs, wanted) if name}

    def x_bias(self, rows: int, channels: int) -> list[Array]:
        """None, one for all samples or one for each: what stands at the end of a node's inputs."""
        return [2 * normal(rows, 1, 1, channels, kind=self.kind)] if rows else []

    def norm(
        self, name: str, shape: tuple[int, ...], groups: int, silu: int, outputs: list[str], rows: int = 0
    ) -> None:
        x, weight, bias = normal(*shape, kind=self.kind), 1 + normal(shape[-1]), normal(shape[-1])
        first = self.x_bias(rows, shape[-1])
        known = (groups, EPSILON, bool(silu), *map(torch.tensor, first))
        wanted = naive.group_norm(*map(torch.tensor, (x, weight, bias)), *known)
        named = [name + suffix for suffix in outputs if suffix is not None]
        given = [x, weight, bias, *first]
        self.add("GroupNormNhwc", given, named, wanted, groups=groups, silu=silu, epsilon=EPSILON)

    def add_norm(self, outputs: list[str], rows: int = 0) -> None:
        shape, groups = (2, 3, 2, 32), 8
        x, added = (normal(*shape, kind=self.kind) for _ in range(2))
        weight, bias = 1 + normal(shape[-1]), normal(shape[-1])
        first = self.x_bias(rows, shape[-1])
        known = (groups, EPSILON, True, *map(torch.tensor, first))
        wanted = naive.add_group_norm(*map(torch.tensor, (x, added, weight, bias)), *known)
        given = [x, added, weight, bias, *first]
        self.add("AddGroupNormNhwc", given, outputs, wanted, groups=groups, silu=1, epsilon=EPSILON)

    def pull(self, name: str, added: bool, rows: int = 0) -> None:
        shape, groups = (2, 3, 2, 32), 4
        cotangent, x, more = (normal(*shape, kind=self.kind) for _ in range(3))
        weight, bias = 1 + normal(shape[-1]), normal(shape[-1])
        first = self.x_bias(rows, shape[-1])
        x_bias = torch.tensor(first[0]) if first else None
        known = (groups, EPSILON, True, x_bias)
        _, mean, rstd = naive.group_norm(*map(torch.tensor, (x, weight, bias)), *known)
        given = [cotangent, x, mean.numpy(), rstd.numpy(), weight, bias]
        other = torch.tensor(more) if added else None
        wanted = naive.group_norm_pull(*map(torch.tensor, given), groups, True, other, x_bias)
        given += [more if added else None, *first] if added or first else []
        self.add("GroupNormPullNhwc", given, [name], [wanted], groups=groups, silu=1)

    def pull_phases(self, name: str, added: bool, shape: tuple[int, ...] = (2, 6, 4, 32)) -> None:
        groups = 4
        cotangent, x, more = (normal(*shape, kind=self.kind) for _ in range(3))
        weight, bias = 1 + normal(shape[-1]), normal(shape[-1])
        _, mean, rstd = naive.group_norm(*map(torch.tensor, (x, weight, bias)), groups, EPSILON, True)
        given = [cotangent, x, mean.numpy(), rstd.numpy(), weight, bias]
        other = torch.tensor(more) if added else None
        wanted = naive.group_norm_pull_phases(*map(torch.tensor, given), groups, True, other)
        self.add("GroupNormPullPhases", [*given, *([more] if added else [])], [name], [wanted], groups=groups, silu=1)

    def bias(self, name: str, residual: bool) -> None:
        x, bias, more = normal(5, 48, kind=self.kind), normal(48), normal(5, 48, kind=self.kind)
        given = [x, bias, *([more] if residual else [])]
        wanted = naive.bias_residual(*map(torch.tensor, given), silu=residual)
        self.add("BiasResidual", given, [name], [wanted], silu=int(residual))

    def add_layer_norm(self, outputs: list[str], channels: int, residual: bool) -> None:
        x, more = (normal(3, 2, channels, kind=self.kind) for _ in range(2))
        x_bias, weight, bias = (normal(channels) for _ in range(3))
        given = [x, x_bias, weight, bias, *([more] if residual else [])]
        first, other = map(torch.tensor, given[:4]), [torch.tensor(each) for each in given[4:]]
        wanted = naive.add_layer_norm(*first, EPSILON, *other)
        self.add("AddLayerNorm", given, outputs, wanted[: len(outputs)], epsilon=EPSILON)

    def layer_norm_pull(self, name: str, channels: int, added: bool) -> None:
        cotangent, x, more = (normal(3, 2, channels, kind=self.kind) for _ in range(3))
        given = [cotangent, x, normal(channels), *([more] if added else [])]
        first, other = map(torch.tensor, given[:3]), [torch.tensor(each) for each in given[3:]]
        wanted = naive.layer_norm_pull(*first, EPSILON, *other)
        self.add("LayerNormPull", given, [name], [wanted], epsilon=EPSILON)

    def softmax_pull(self, name: str, columns: int) -> None:
        cotangent, y = (normal(2, 3, columns, kind=self.kind) for _ in range(2))
        wanted = naive.softmax_pull(torch.tensor(cotangent), torch.tensor(y), 0.25)
        self.add("SoftmaxPull", [cotangent, y], [name], [wanted], scale=0.25)

    def narrow_conv(self, name: str, shape: tuple[int, ...], channels: int, first: int, bias: bool) -> None:
        x, few = normal(*shape, kind=self.kind), shape[1 if first else 3]
        kernel = normal(columns(few), channels, kind=self.kind)
        kernel[9 * few :] = 0
        given = [x, kernel, *([normal(channels)] if bias else [])]
        wanted = narrow.narrow_conv(*map(torch.tensor, given), *([] if bias else [None]), bool(first))
        self.add("NarrowConv", given, [name], [wanted], channels_first=first)

    def taps(self, name: str, planes: int, outputs: list[str], rows: int = 0, summed: bool = False) -> None:
        shape, groups = (2, 3, 5, 80), 8
        x, added, kernel = (normal(*each, kind=self.kind) for each in (shape, shape, (80, columns(planes))))
        kernel[:, 9 * planes :] = 0
        norm, first = [1 + normal(80), normal(80)], self.x_bias(rows, 80)
        known = (planes, groups, EPSILON, True, *map(torch.tensor, first))
        given = [x, *([added] if summed else []), *norm, kernel]
        plain = narrow.add_group_norm_taps if summed else narrow.group_norm_taps
        wanted = plain(*map(torch.tensor, given), *known)
        op, kinds = "AddGroupNormTaps" if summed else "GroupNormTaps", {"groups": groups, "silu": 1, "epsilon": EPSILON}
        self.add(op, [*given, *first], [name + end if end else "" for end in outputs], wanted, **kinds, planes=planes)
        bias = normal(planes, kind=self.kind)
        image = narrow.sum_taps(wanted[0], torch.tensor(bias))
        self.add("SumTaps", [wanted[0].numpy(), bias], [f"{name} image"], [image])


def add_narrow(graph: Graph) -> None:
    """What bundles have in halves only."""
    graph.pull_phases("pulled phases", added=False)
    graph.pull_phases("pulled phases and more", added=True)
    graph.pull_phases("more phases than pixels", added=False, shape=(1, 16, 32, 32))  # which fill a program
    graph.narrow_conv("from three planes", (2, 3, 5, 7), 144, first=1, bias=False)
    graph.narrow_conv("from four channels", (2, 5, 7, 4), 16, first=0, bias=True)
    graph.taps("three", 3, [".taps", ".mean", ".rstd"], rows=2)
    graph.taps("four", 4, [".taps"])
    graph.taps("sum's", 1, [".taps", ".mean", ".rstd", ".total"], rows=1, summed=True)


def graph_of_all(kind: type) -> Graph:
    graph = Graph(kind)
    graph.norm("small", (2, 3, 2, 32), 8, 1, [".y", ".mean", ".rstd"])
    graph.norm("whole", (2, 5, 1, 96), 1, 0, [".y"])  # one group of 96: 128 lanes
    graph.norm("odd", (1, 2, 1, 144), 8, 1, [".y"])  # of 7 groups of 18 that fit into 128 lanes, 4 start at 16 bytes
    graph.norm("row", (2, 3, 2, 32), 8, 1, [".y", ".mean", ".rstd"], rows=2)
    graph.norm("wide row", (2, 5, 1, 96), 1, 0, [".y"], rows=1)
    graph.add_norm(["sum.y", "sum.mean", "sum.rstd", "sum.total"])
    graph.add_norm(["sum with row.y", "", "", "sum with row.total"], rows=1)
    graph.add_norm(["sum with rows.y", "", "", ""], rows=2)
    graph.pull("pull", added=False)
    graph.pull("pull and more", added=True)
    graph.pull("pull with row", added=False, rows=1)
    graph.pull("pull with rows and more", added=True, rows=2)
    graph.bias("bias", residual=False)
    graph.bias("bias and residual", residual=True)
    phases, image = normal(2, 3, 4, 64, kind=kind), normal(2, 4, 6, 16, kind=kind)
    graph.add("InterleaveNhwc", [phases], ["image of phases"], [naive.interleave(torch.tensor(phases))])
    bias = normal(16)
    wanted = naive.interleave(torch.tensor(phases), "blocks", torch.tensor(bias))
    graph.add("InterleaveNhwc", [phases, bias], ["image with bias"], [wanted])
    graph.add_layer_norm(["normed row", "row's sum"], 48, residual=True)
    graph.add_layer_norm(["long normed row"], 640, residual=False)
    graph.add_layer_norm(["longer normed row", "its sum"], 1280, residual=True)
    graph.layer_norm_pull("row", 48, added=False)
    graph.layer_norm_pull("long row and more", 768, added=True)
    cotangent, x = normal(2, 5, 32, kind=kind), normal(2, 5, 32, kind=kind)
    graph.add("GeluPull", [cotangent, x], ["gate"], [naive.gelu_pull(torch.tensor(cotangent), torch.tensor(x))])
    graph.softmax_pull("softmax of 24", 24)  # not of 16, as the other kernel was promised
    graph.softmax_pull("softmax", 1040)
    graph.add("InterleavePullNhwc", [image], ["phases of image"], [naive.interleave_pull(torch.tensor(image))])
    if kind == np.float16:
        add_narrow(graph)
    return graph
