"""The GPU benchmark's arithmetic: work, shares, verdicts. No figure here is one of a GPU."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from rlsd.bench.gpu import __main__ as race
from rlsd.bench.gpu import agreement, arrivals, crowds, first_line, steps, targets, timing, work
from rlsd.bench.gpu.roof import Roof
from rlsd.bench.gpu.subject import Bench, Wrong
from rlsd.engine import Result
from rlsd.models.fashion import PATH

CPU = torch.device("cpu")
ROOF = Roof(matrix=8e14, single=5e13, copy=2.5e12)


def test_work_of_a_bundle() -> None:
    found = work.of_bundle(PATH / "bundle", dict.fromkeys(work.STEP, 1e8))
    assert found.largest == 16 and set(found.graphs) == set(work.STEP)
    assert found.operations(3) == 15e8
    latent, image = 4 * 8 * 8 * 4, 32 * 32 * 4
    assert found.graphs["denoiser"].passed == 2 * latent + 8 + 64 * 4  # z_t, eps, t, context
    kept = found.graphs["decoder"].passed - latent - image
    assert kept > 0 and found.graphs["decoder_pull"].passed >= kept
    more, less = (found.moved(n, ["denoiser"]) for n in (17, 16))
    assert more - less == found.graphs["denoiser"].passed + found.graphs["denoiser"].weights  # read once more
    each = [found.least_seconds(ROOF, 8, [name]) for name in work.STEP]
    assert found.least_seconds(ROOF, 8) == pytest.approx(sum(each))


def test_operations_of_a_bundle_for_cuda_come_from_its_manifest(tmp_path: Path) -> None:
    for file in (PATH / "bundle").glob("de*.b2.onnx"):
        (tmp_path / file.name).symlink_to(file)
    text = "graph denoiser 2 denoiser.b2.onnx\ninfo operations denoiser 2 500\ngraph operator.x.loss 4 nothing.onnx\n"
    (tmp_path / "manifest.txt").write_text(text)
    found = work.of_bundle(tmp_path, {})
    assert found.operations(3) == 750 and found.largest == 2


def test_roofline_of_algorithm_md() -> None:
    """5.87 TFLOP a particle-step at 790 TFLOP/s: 7.43 ms, 134.7 a second."""
    roof = Roof(matrix=790e12, single=1, copy=1e30)
    graphs = {"denoiser": 0.803e12, "decoder": 2.515e12, "decoder_pull": 2.549e12}
    counted = work.Work({name: work.Graph(flop, 0, 0) for name, flop in graphs.items()}, 8)
    assert 1 / counted.least_seconds(roof, 1) == pytest.approx(134.7, abs=0.1)


def test_launches_and_waits_are_told_by_their_names() -> None:
    events = {
        "cudaLaunchKernel": 3, "cuLaunchKernelEx": 2, "cudaMemcpyAsync": 1, "cudaStreamSynchronize": 4,
        "cudaDeviceSynchronize": 9, "cutlass_LaunchKernel": 5, "aten::mm": 7, "cuGraphLaunch": 1,
    }  # fmt: skip
    assert timing.counts(events) == {"launches": 7, "synchronisations": 4}


def test_idle_share() -> None:
    assert timing.idle_share([]) == 0
    assert timing.idle_share([(0, 4), (1, 2), (6, 10)]) == pytest.approx(0.2)
    assert timing.idle_share([(0, 4), (1, 2), (3, 5), (6, 10)]) == pytest.approx(0.1)  # one lies in another
    assert timing.idle_share([(5, 6), (0, 5)]) == 0


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({"section": "A", "particles": 8, "speedup": {"published": 9}, "median": 60.0}, ["missed", "met"]),
        ({"section": "A", "particles": 4}, []),
        ({"section": "A", "particles": 8, "method": "shared"}, []),
        ({"section": "B", "batch": 8, "both_ways": False, "roofline_share": 0.6}, ["met"]),
        ({"section": "B", "batch": 4, "both_ways": False, "roofline_share": 0.6}, []),
        ({"section": "C", "batch": 8, "both_ways": True, "roofline_share": 0.5, "speedup": {"compiled": 1.6}},
         ["missed", "met"]),
        ({"section": "D", "particles": 256, "speedup": {"pytorch": 4.9}}, ["missed"]),
        ({"section": "D", "particles": 1024, "speedup": {"pytorch": 4.9}}, []),
        ({"section": "E", "median": 0.01}, ["met"]),
        ({"section": "F", "speedup": {"one by one": 2.5}}, ["met"]),
    ],
)  # fmt: skip
def test_targets(changes: dict[str, Any], verdicts: list[str]) -> None:
    line = {"method": "engine", "case": "some", "median": 100.0, **changes}
    judged = targets.judge(line)
    assert [each["verdict"] for each in judged] == verdicts
    assert set(targets.not_measured(judged)) == set(targets.ALL) - {each["target"] for each in judged}
    assert targets.judge({key: value for key, value in line.items() if key != "median"} | {"wrong": "it is"}) == []


def test_a_missed_target_is_no_error() -> None:
    line = {"section": "E", "method": "engine", "case": "some", "median": 0.5, "unit": "share"}
    assert race.summary([{**line, "targets": targets.judge(line)}], []) == 0
    assert race.summary([{**line, "method": "keops", "failed": "it broke"}], []) == 0
    assert race.summary([{**line, "failed": "it broke"}], []) == 1


def test_agreement_is_judged() -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32)).astype(np.float32)
    noise = np.random.default_rng(1).standard_normal((4, 1, 32, 32)).astype(np.float32)
    result = lambda scale: Result(image + scale * noise, noise, 0.0)  # noqa: E731
    same = agreement.judge(result(0.1), result(0.1), result(0.1), image)
    assert "wrong" not in same and same["median"] == 0 and same["same_bytes_repeated"]
    assert "PSNR" in agreement.judge(result(0.1), result(0.2), result(0.2), image)["wrong"]
    for worse, wrong in ((1.008, False), (1.02, True)):  # 0.07 and 0.17 dB
        assert ("wrong" in agreement.judge(result(0.1), *[result(0.1 * worse)] * 2, image)) == wrong
    assert "other bytes" in agreement.judge(result(0.1), result(0.1), result(0.1001), image)["wrong"]


def test_what_an_error_says_in_a_line() -> None:
    assert first_line(ValueError("this\nand more")) == "this" and first_line(ValueError()) == "no message"


class Measuring(contextlib.nullcontext[None]):
    """Stands in for an engine whose last operator is off by a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        self.measure = lambda name, x, **params: factor * x if name == agreement.OPERATORS[-1] else x

    def __enter__(self) -> Any:
        return self


@pytest.mark.parametrize(("factor", "wrong"), [(1 + 1e-6, False), (1 + 5e-4, True), (np.nan, True)])
def test_operators_in_tf32_are_wrong(monkeypatch: pytest.MonkeyPatch, factor: float, wrong: bool) -> None:
    monkeypatch.setattr(agreement, "Engine", lambda path: Measuring())
    line = agreement._operators(SimpleNamespace(open=lambda path: Measuring(factor)), PATH)  # type: ignore[arg-type]
    assert "failed" not in line and ("wrong" in line) == wrong


def test_two_ways_of_running_the_same_jobs_must_agree() -> None:
    one = np.ones((2, 3), np.float32)
    assert arrivals.differences([one], [one], 0.0) == (0.0, True)
    assert arrivals.differences([one * 1.0005], [one], 1e-3)[1] is False
    for other in (1.002, np.nan):
        with pytest.raises(Wrong, match="two ways of running the same jobs differ"):
            arrivals.differences([one, one * other], [one, one], 1e-3)


def test_a_repulsion_that_is_wrong_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowds, "ROUNDS", 1)
    others = {"cdist": lambda phi: 1.001 * crowds.direct(phi), "keops": lambda phi: np.nan * phi}
    monkeypatch.setattr(crowds, "METHODS", {**crowds.METHODS, **others})
    lines = {line["method"]: line for line in crowds.crowd(Bench(CPU, ROOF, 1), 3, 8)}
    assert {name for name, line in lines.items() if "wrong" in line} == {"cdist", "keops"}
    assert {name for name, line in lines.items() if "median" in line} == {"pytorch", "engine"}


def test_tables_that_rows_are_picked_from_are_not_read_whole(tmp_path: Path) -> None:
    make, kinds = onnx.helper, onnx.TensorProto
    nodes = [make.make_node("Gather", ["table", "t"], ["row"]), make.make_node("MatMul", ["row", "weight"], ["y"])]
    ends = [make.make_tensor_value_info("t", kinds.INT64, [2]), make.make_tensor_value_info("y", kinds.FLOAT, [2, 5])]
    arrays = {"table": np.zeros((1000, 4), np.float32), "weight": np.zeros((4, 5), np.float32)}
    held = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    onnx.save(make.make_model(make.make_graph(nodes, "picked", ends[:1], ends[1:], held)), tmp_path / "g.onnx")
    assert work._graph(tmp_path / "g.onnx", 2, 7.0) == work.Graph(7.0, (2 * 8 + 2 * 5 * 4) / 2, 4 * 5 * 4)


def test_two_jobs_cannot_be_packed_to_twice_the_speed() -> None:
    """The third mix, two jobs that do not arrive together: NOTES.md says so."""
    bounds = [arrivals.at_most(jobs, arrivals.STEPS) for jobs, _ in arrivals.MIXES]
    assert bounds == pytest.approx([4.97, 3.17, 1.84], abs=0.01)


@pytest.mark.parametrize("seen, share", [({}, 0.1), ({"idle": 0.3, "launches": 9}, 0.3), ({"idle": 0.05}, 0.1)])
def test_time_outside_kernels_is_known_without_a_profiler(seen: dict[str, float], share: float) -> None:
    names = (*steps.GRAPHS, "repulsion", "elementwise", "wall", "ticks", "launches")
    before = dict.fromkeys(names, 0.0)
    after = before | {"denoiser": 0.5, "decoder": 0.3, "elementwise": 0.1, "wall": 1.0, "ticks": 2, "launches": 20}
    line = steps.host_line({"case": "x"}, before, after, seen)
    assert line["median"] == pytest.approx(share) and line["what"] == "time outside kernels"
    assert line["launches_per_step"] == 10
