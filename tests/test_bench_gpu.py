"""The GPU benchmark's road on a CPU; no figure here is one of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlsd.bench import engine as full_steps
from rlsd.bench import measure, report
from rlsd.bench.gpu import __main__ as race
from rlsd.bench.gpu import crowds, plan, prepare, side_by_side, steps, torch_step
from rlsd.bench.gpu import networks as parts
from rlsd.bench.gpu.roof import Roof
from rlsd.bench.gpu.subject import Bench, Subject, Wrong
from rlsd.bench.problem import PARAMS, frozen, job, torch_loop
from rlsd.bench.serve_queue import packed
from rlsd.engine import Engine, library_path
from rlsd.export.checkpoint import load
from rlsd.models.fashion import PATH

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ROOF = Roof(matrix=8e14, single=5e13, copy=2.5e12)


@pytest.fixture(scope="module")
def networks() -> Any:
    return frozen(load(PATH / "checkpoint", None, ["inpainting"], None))


@pytest.fixture(scope="module")
def subject(networks: Any) -> Iterator[Subject]:
    opened = Subject("fashion", networks, PATH / "bundle", Bench(CPU, ROOF, rounds=1))
    yield opened
    opened.close()


def test_the_whole_road_at_toy_sizes(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    words = ["--device", "cpu", "--toy", "--out", str(out), "--particles", "2", "--rounds", "1"]
    assert race.main([*words, "--methods", "shared", "published"]) == 0
    lines = [json.loads(row) for row in out.read_text().splitlines()]
    assert {line["section"] for line in lines} == {"A", "B", "C", "D", "E", "F", "G", "agreement"}
    assert not [line for line in lines if "wrong" in line or "failed" in line]
    assert all(line["toy"] and line["commit"] and line["machine"] and line["versions"]["torch"] for line in lines)
    timed = [line for line in lines if "roofline_share" in line]
    assert timed and all(line["roofline_share"] > 0 and line["error"] < 1e-3 for line in timed)
    steps = {line["method"]: line for line in lines if line["section"] == "A"}
    assert steps.keys() == {"engine", "shared", "published"}
    assert steps["engine"]["speedup"].keys() == {"shared", "published"}
    beside = {line["method"]: line for line in lines if line["section"] == "G"}
    assert beside.keys() == {"engine", "two engines"} and beside["two engines"]["same_bytes"]
    assert report.write(tmp_path, tmp_path / "report").read_text().count("A rehearsal") == 1
    assert (ROOT / "bench" / "results").is_dir() and not list((ROOT / "bench" / "results").glob("gpu-none*"))


def test_the_shell_script_rehearses(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "LIBRARY": str(library_path())}
    words = ["--sections", "D", "--networks", "sd15"]
    command = ["bash", str(ROOT / "bench" / "gpu_check.sh"), "--rehearse", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "### D: repulsion" in done.stdout and "### Triton kernels" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert race.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    done = subprocess.run(["bash", str(ROOT / "bench" / "gpu_check.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--toy"], "--out"),
        (["--device", "cpu"], "--toy"),
        (["--bundle", "b"], "belong together"),
    ],
)
def test_bad_options(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        race.parse(words)
    assert said in capsys.readouterr().err


def test_no_case_is_begun_when_the_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--toy", "--out", str(tmp_path / "x"), "--minutes", "0", "--sections", "D", "F"]
    assert race.main(words) == 0
    said = capsys.readouterr().out
    assert "no time was left for D N=4 D=384" in said and "no time was left for F fashion" in said
    assert not (tmp_path / "x").exists()


def test_what_needs_no_bundle_is_done_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "bundle_path", lambda name: tmp_path / name)
    bench, maker = Bench(CPU, ROOF, 1), subprocess.Popen(["true"])

    def order(seen: int) -> list[str]:
        """The cases' titles; the bundle is there after so many."""
        titles = []
        for case in plan.cases(race.parse([]), bench, maker, plan.Budget(1)):
            titles.append(case.title)
            if len(titles) == seen:
                (tmp_path / "sd15").mkdir()
        (tmp_path / "sd15").rmdir()
        return [title for title in titles if title[:2] == "D " or title == "A sd15 N=8"][len(crowds.FIRST) :]

    late = [f"D N={N} D={D}" for N, D in crowds.LAST]
    assert order(1) == ["A sd15 N=8", *late]
    assert order(len(crowds.FIRST) + 2) == [late[0], "A sd15 N=8", *late[1:]]  # the agreement is one, too
    maker.wait()


def test_a_wrong_result_gets_no_figure(networks: Any, tmp_path: Path) -> None:
    bench = Bench(CPU, ROOF, rounds=1)
    other = replace(networks, denoiser=torch.nn.Identity())
    other.denoiser.forward = lambda z, t, context: networks.denoiser(z, t, context) * 1.1  # type: ignore[assignment]
    subject = Subject("fashion", networks, PATH / "bundle", bench)
    subject.exact = other  # the reference differs: then the engine is what is wrong
    lines = plan.steps.full_steps(subject, 2, [])
    subject.close()
    assert len(lines) == 1 and "wrong" in lines[0] and "median" not in lines[0]
    assert race.summary(lines, []) == 1
    with pytest.raises(Wrong):
        Subject(
            "fashion", networks, PATH / "bundle", bench, references={(2, PARAMS.gamma): np.ones((2, 1, 32, 32))}
        ).check("shared", 2)


def broken(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError


def test_what_breaks_in_the_middle_leaves_no_job(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would tick along with all that is timed after."""
    with monkeypatch.context() as patch:
        patch.setattr(steps, "profiled", broken)
        patch.setattr(measure, "interleaved", broken)
        for lines in steps.full_steps(subject, 1, []), parts.parts(subject, 1, []):
            assert [line["failed"] for line in lines] == ["ZeroDivisionError: no message"] * len(lines) != []
            assert subject.engine.tick() == 0
    some = [job(subject.engine.image_shape, 1)] * 2
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(subject.engine, "tick", broken)
        packed(subject.engine, some, 0)
    assert subject.engine.tick() == 0
    opened = plan._Opened("fashion", race.parse([]), subject.bench, None, plan.Budget(1))
    opened.subject = subject
    assert "failed" in opened.lines("A", broken)[0] and opened.broken is None


def test_what_was_measured_before_a_break_stays(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parts._part

    def breaking(opened: Subject, part: Any, *others: Any) -> list[dict[str, Any]]:
        if part.title == "decoder":
            raise RuntimeError("no memory")
        return whole(opened, part, *others)

    monkeypatch.setattr(parts, "_part", breaking)
    lines = parts.parts(subject, 2, ["shared"])
    assert [line["method"] for line in lines if line["section"] == "B" and "median" in line] == ["engine", "shared"]
    assert [line["failed"] for line in lines if "failed" in line] == ["RuntimeError: no memory"]
    assert lines[-1]["section"] == "C"


def test_each_of_two_engines_stays_in_its_thread(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, set[int]] = {}
    whole = Engine.reconstruct

    def watched(engine: Engine, jobs: Any) -> Any:
        seen.setdefault(id(engine), set()).add(threading.get_ident())
        return whole(engine, jobs)

    monkeypatch.setattr(Engine, "reconstruct", watched)
    lines = side_by_side.side_by_side(subject, 4, 4)
    assert [line["method"] for line in lines if "median" in line] == ["engine", "two engines"]
    assert len(seen) == 2 and all(len(each) == 1 for each in seen.values())
    assert seen[id(subject.engine)] == {threading.get_ident()}


def test_the_engine_has_its_memory_before_a_method_tries(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(name: str, particles: int) -> float:
        if name != "engine":
            assert subject.engine.stats()["ticks"] == before + 1
        return 0.0

    before = subject.engine.stats()["ticks"]
    monkeypatch.setattr(subject, "check", check)
    monkeypatch.setattr(subject, "method", broken)
    monkeypatch.setitem(subject.errors, ("engine", 1), 0.0)
    lines = steps.full_steps(subject, 1, ["shared"])
    assert [line["method"] for line in lines] == ["shared", "engine", "engine"]
    assert lines[0]["failed"].startswith("ZeroDivisionError")


def test_compiled_networks_may_err_twice_as_much_as_plain_ones(
    networks: Any, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where plain ones are not timed beside them."""
    off = replace(networks, denoiser=lambda *given: 1.01 * networks.denoiser(*given))
    method = torch_step.Method("compiled", off, CPU, torch.float32, torch.channels_last)
    monkeypatch.setattr(parts, "PARTS", parts.PARTS[:1])
    monkeypatch.setitem(subject.made, "compiled", method)
    lines = {line["method"]: line for line in parts.parts(subject, 2, ["compiled"])}
    assert lines.keys() == {"engine", "compiled"} and "allowed 1.0e-03" in lines["compiled"]["wrong"]


def test_what_was_compiled_gives_its_memory_back(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(Subject, "__post_init__", lambda self: None)
    for used in ("shared", "compiled"):
        Subject("fashion", networks, PATH, Bench(CPU, ROOF), made={used: None}).close()  # type: ignore[dict-item]
    assert resets == [1]


@pytest.mark.parametrize("given", [{"chunk": 2}, {"published": True}, {"layout": torch.channels_last}])
@pytest.mark.parametrize("features", [True, False])
def test_the_baselines_take_the_same_steps(networks: Any, given: dict[str, Any], features: bool) -> None:
    chosen = networks if features else replace(networks, features=None)
    found = []
    for options in ({}, given):
        loop = torch_loop(chosen, 3, replace(PARAMS, steps=4), **options)
        for _ in range(3):
            loop.step()
        loop.finish()
        found.append(loop.x)
    assert (found[0] - found[1]).norm() <= 1e-4 * found[0].norm()


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("factor", [1.01, np.nan])
def test_no_figure_on_a_cpu_without_agreement(
    networks: Any, monkeypatch: pytest.MonkeyPatch, published: bool, factor: float
) -> None:
    def made(*given: Any, **options: Any) -> Any:
        loop = torch_loop(*given, **options)
        finish = loop.finish
        if options["published"] == published:
            monkeypatch.setattr(loop, "finish", lambda: (finish(), loop.x.mul_(factor)))
        return loop

    monkeypatch.setattr(full_steps, "torch_loop", made)
    with pytest.raises(SystemExit, match="engine and PyTorch differ by"):
        full_steps.check(networks, str(PATH / "bundle"), 2)


class NoSelection(TorchDispatchMode):
    """Nothing whose size depends on values: on a GPU the host would wait for them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten.index, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("N", [2, 3, 8])
def test_the_baselines_repulsion_does_not_wait(networks: Any, N: int) -> None:
    loop = torch_loop(networks, N)
    phi = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
    with NoSelection():
        found = loop._crowd(phi)
    want = crowds.gram(phi.double())
    assert (found - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("name", [name for name in crowds.METHODS if name != "keops"])
@pytest.mark.parametrize(("N", "D"), [(2, 5), (3, 8), (9, 33), (40, 7)])
def test_all_define_the_same_repulsion(name: str, N: int, D: int) -> None:
    phi = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    want = crowds.gram(phi.double())
    assert (crowds.METHODS[name](phi) - want).norm() <= 1e-5 * want.norm()
    exact = crowds.naive.repulsion(phi.double(), torch.tensor([0, N]), *[torch.zeros(1, dtype=torch.int64)] * 3)[0]
    assert torch.allclose(exact, want, rtol=1e-9, atol=1e-12)
