"""What the writer of bundles promises: all or nothing, each file once, readable by others, weights at round places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
from onnx import TensorProto, helper, load, numpy_helper  # noqa: E402

from rlsd.export.bundle import ALIGNMENT, WEIGHTS, BundleWriter  # noqa: E402


def writer(path: Path, target: str = "cpu", **options: Any) -> BundleWriter:
    return BundleWriter(path, "tiny", "rlsd tests", target, "fp32", **options)


def graph_with(*weights: np.ndarray) -> ir.Model:
    """x plus each of the weights."""
    names = [f"w{i}" for i in range(len(weights))]
    nodes = [helper.make_node("Sum", ["x", *names], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    given = [numpy_helper.from_array(each, name) for name, each in zip(names, weights)]
    graph = helper.make_graph(nodes, "g", [x], [y], given)
    versions = [helper.make_opsetid("", 17)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=versions, ir_version=8))


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    with writer(tmp_path / "bundle") as old:
        old.file("old", b"old")
    before = (tmp_path / "bundle" / "manifest.txt").read_bytes()
    with pytest.raises(ZeroDivisionError), writer(tmp_path / "bundle", overwrite=True) as new:
        new.file("new", b"new")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), writer(tmp_path / "other") as new:
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (tmp_path / "bundle" / "manifest.txt").read_bytes() == before
    assert not (tmp_path / "bundle" / "new").exists()


def test_a_file_is_written_once(tmp_path: Path) -> None:
    """Two operators of one name, say, would share graphs."""
    with writer(tmp_path / "bundle") as bundle:
        bundle.file("one", b"1")
        with pytest.raises(FileExistsError):
            bundle.file("one", b"2")
    assert (tmp_path / "bundle" / "one").read_bytes() == b"1"


def test_others_can_read_it(tmp_path: Path) -> None:
    """The folder it is made in is its maker's alone."""
    with writer(tmp_path / "bundle"):
        pass
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("word", ["two\nlines", "esc\x1b[2J"])
def test_a_line_is_one_line(tmp_path: Path, word: str) -> None:
    with writer(tmp_path / "bundle") as bundle:
        with pytest.raises(ValueError, match="cannot be printed"):
            bundle.fact("info", word)
        for name in ("a/b", "..", ".hidden", "name\n", ""):
            with pytest.raises(ValueError, match="is not allowed: letters, digits"):
                bundle.file(name, b"")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_weights_lie_at_round_places_each_once(tmp_path: Path, target: str) -> None:
    """Exact halves are stored as halves, but for CUDA, whose graphs are in halves where they can be."""
    rng = np.random.default_rng(0)
    odd, other = (rng.standard_normal(size).astype(np.float32) for size in (17, 33))
    exact = other.astype(np.float16).astype(np.float32)
    with writer(tmp_path / "bundle", target) as bundle:
        for batch in (1, 2):
            bundle.graph("g", batch, graph_with(odd, other, exact, odd[:15]))
    stored = (tmp_path / "bundle" / WEIGHTS).read_bytes()
    sizes = [4 * 17, 4 * 33, (2 if target == "cpu" else 4) * 33]
    assert len(stored) == sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes[:2]) + sizes[2]
    for batch in (1, 2):
        found = load(tmp_path / "bundle" / f"g.b{batch}.onnx", load_external_data=False).graph.initializer
        facts = [{entry.key: entry.value for entry in each.external_data} for each in found if each.external_data]
        assert len(facts) == 3 and all(int(each["offset"]) % ALIGNMENT == 0 for each in facts)
        whole = load(tmp_path / "bundle" / f"g.b{batch}.onnx").graph.initializer
        values = [numpy_helper.to_array(each).astype(np.float32) for each in whole]
        for want in (odd, other, exact, odd[:15]):
            assert any(np.array_equal(want, each) for each in values)
