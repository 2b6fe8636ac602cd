"""Bundles for CUDA on ONNX Runtime's own CUDA provider, over stand-ins for NVIDIA's libraries (fake_provider.py)."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
pytest.importorskip("onnx")
import checkpoints
import fake_cuda
import fake_provider

from rlsd.export import checkpoint, cuda
from rlsd.export.package import Networks
from rlsd.models.fashion import PATH as FASHION
from rlsd.pipeline.plan import read_plan

pytestmark = pytest.mark.skipif(fake_provider.onnxruntime() is None, reason="ONNX Runtime for GPUs: make provider")

LAUNCH_FAILED, UNSUPPORTED = 719, 900
SCRATCH = 8 << 20  # of the engine's operators


def package(networks: Networks, folder: Path, batches: tuple[int, ...]) -> Path:
    """A bundle for CUDA with what the fake driver reads in place of cubins."""

    def add_fakes(bundle, precise=False):
        for name, contents, line in fake_cuda.fake_cubin_bundle_lines(90):
            bundle.file(name, contents)
            bundle.fact(*line.split())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "Cubins", lambda _: contextlib.nullcontext(SimpleNamespace(add=add_fakes)))
        return cuda.package_cuda(networks, folder, name="b", architectures=[90], batches=batches)


@pytest.fixture(name="stable_diffusion", scope="module")
def stable_diffusion_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoints.stable_diffusion(
        tmp_path_factory.mktemp("sd"), text=False, block_out_channels=checkpoints.WIDE_END
    )
    checkpoints.vision_transformer(folder / "features")
    networks = checkpoint.load(folder, (64, 64), ["inpainting", "gaussian_blur"], folder / "features")
    return package(networks, folder / "bundle", (1, 2))


@pytest.fixture(name="fashion", scope="module")
def fashion_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    networks = checkpoint.load(FASHION / "checkpoint", None, ["inpainting", "phase_retrieval"], None)
    return package(networks, tmp_path_factory.mktemp("fashion") / "bundle", (4,))


def scenario(bundle: Path, *jobs: dict, **more: object) -> dict:
    return {"bundle": str(bundle), "jobs": jobs, "ticks": 4, **more}


def a_job(particles: int, operator: str = "inpainting", **params: object) -> dict:
    return {"operator": operator, "particles": particles, "steps": 4, **params}


def all_streams(lines: list[str]) -> set[str]:
    return {found[0] for line in lines if (found := re.search(r"stream \d+", line))}


@pytest.mark.parametrize("name", ["stable_diffusion", "fashion"])
def test_graphs_are_recorded_and_later_ticks_replay_them(name: str, request: pytest.FixtureRequest) -> None:
    other = {"stable_diffusion": "gaussian_blur", "fashion": "phase_retrieval"}[name]
    report = fake_provider.run(scenario(request.getfixturevalue(name), a_job(3), a_job(2, other, repulsion="latent")))
    first, *_, last = report["ticks"][:3]
    assert report["messages"] == ["", ""] and report["faults"] == ""
    assert report["stats"]["not_recorded"] == 0
    (ours,) = {line for line in report["open"] if line.startswith("cuStreamCreate")}
    recordings = fake_provider.recordings(first)
    for recording in recordings:
        assert all_streams(recording) == all_streams([ours])
        assert not [line for line in recording if "host" in line or "pinned" in line]  # gone when it is replayed
    assert all_streams(last) == all_streams([ours])
    assert not [line for line in last if line.startswith(("work", "cuMemAlloc", "cuMemFree"))]
    assert sum(line.startswith("cuGraphLaunch") for line in last) >= 6
    assert sum("Synchronize" in line for line in last) == 1
    assert report["live"] == "context retained 1 times\n"  # by the runtime's stand-in


def works(tick: list[str]) -> int:
    return sum(line.startswith("work") for line in tick)


def test_a_graph_that_cannot_be_recorded_runs_node_by_node(stable_diffusion: Path) -> None:
    """The denoiser of a bundle whose every graph is recorded: a kernel that a capture does not allow."""
    first = fake_provider.run(scenario(stable_diffusion, a_job(2)))["ticks"][0]
    begins = [i for i, line in enumerate(first) if line.startswith("cuStreamBeginCapture")]
    recordings = fake_provider.recordings(first)
    longest = max(range(len(recordings)), key=lambda i: len(recordings[i]))
    call = works(first[: begins[longest]]) + 10
    report = fake_provider.run(scenario(stable_diffusion, a_job(2), fail=[["work", call, UNSUPPORTED]]))
    assert report["messages"] == [""] and report["faults"] == ""
    assert report["stats"]["not_recorded"] == 1
    assert works(report["ticks"][2]) == sum(line.startswith("work") for line in recordings[longest])


def test_a_kernel_that_fails_fails_its_job(stable_diffusion: Path) -> None:
    """While the first batch is made: the last job ends, for which there is no place, and the other one is finished."""
    jobs = (a_job(1), a_job(1))
    report = fake_provider.run(scenario(stable_diffusion, *jobs, fail=[["work", 40, LAUNCH_FAILED]]))
    done, failed = report["messages"]
    assert "a graph failed" in failed and done == report["faults"] == ""


def test_memory_is_what_the_plan_says(stable_diffusion: Path) -> None:
    """With ONNX Runtime's own allocator; three particles sit in two batches, four in two seats of one batch."""
    plan = read_plan(stable_diffusion)
    used = {n: fake_provider.run(scenario(stable_diffusion, a_job(n)))["used"] for n in (2, 3, 4)}
    for particles, found in used.items():
        assert 0 <= found - SCRATCH - plan.total(particles) < 0.2 * plan.total(particles)
    assert used[4] - used[2] < 1.1 * (plan.seats[-1].tensors + 2 * plan.particle)  # no more for the graphs


def test_nothing_is_given_back_that_a_recorded_graph_reads(stable_diffusion: Path) -> None:
    """Two seats of one batch: the second one's first runs find the sessions used, and their memory in a graph."""
    (first, *_) = fake_provider.run(scenario(stable_diffusion, a_job(4)))["ticks"]
    born: dict[str, int] = {}
    recorded = freed = 0
    for line in first:
        if line.startswith("cuMemAlloc_v2") and " at " in line:
            born[line.split(" at ")[1]] = recorded
        elif line.startswith("cuStreamEndCapture") and " graph " in line:
            recorded += 1
        elif line.startswith("cuMemFree_v2"):
            freed += 1
            assert born.get(line.removeprefix("cuMemFree_v2 "), recorded) == recorded, line
    assert recorded > 8 and freed > 20


def test_engines_in_parallel_record_all_their_graphs(stable_diffusion: Path) -> None:
    report = fake_provider.run({"bundle": str(stable_diffusion), "jobs": [a_job(2)], "parallel": 3})
    assert [stats.get("failed") for stats in report["parallel"]] == [None] * 3
    assert all(stats["not_recorded"] == 0 for stats in report["parallel"]) and report["faults"] == ""


def test_engines_that_change_their_threads_wait_while_one_records(stable_diffusion: Path) -> None:
    report = fake_provider.run({"bundle": str(stable_diffusion), "jobs": [a_job(2)], "in_turns": 4})
    assert [stats.get("failed") for stats in report["parallel"]] == [None] * 2
    assert all(stats["not_recorded"] == 0 for stats in report["parallel"]) and report["faults"] == ""


def test_without_memory_for_two_particles_they_go_one_by_one(stable_diffusion: Path) -> None:
    """ONNX Runtime itself says in which words that it is out of memory."""
    room, one = (fake_provider.run(scenario(stable_diffusion, a_job(n))) for n in (2, 1))
    memory = (room["used"] + one["used"]) // 2
    report = fake_provider.run(scenario(stable_diffusion, a_job(2), memory=memory))
    assert report["messages"] == [""] and report["faults"] == ""
    assert any("cuMemAlloc" in line and "-> 2" in line for line in report["ticks"][0])
    assert report["used"] <= memory
    replays = [sum(line.startswith("cuGraphLaunch") for line in each["ticks"][2]) for each in (room, report)]
    assert replays[1] > replays[0]
