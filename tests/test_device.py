"""The engine on CUDA without a GPU: over the stand-in for the driver, with the Triton kernels run by their interpreter.

Tiny networks, so that what is tested is the engine: state, tables, launches, copies, seats. One test has a Stable
Diffusion of toy size, whose GroupNorm and the like go through the engine's operators and our kernels.
test_device_failures.py has what goes wrong.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from device_case import NETS, PARAMS, TOLERANCE, bundle_fixture, difference, fake_fixture, jobs_of_all_kinds  # noqa: F401
from hosted import hosted_bundle
from tiny import CONTEXT, IMAGE, LATENT, TIMESTEPS, make_job, reference

from rlsd.engine import Engine, Job, OperatorInfo, Params, RlsdError, Status, dlpack
from rlsd.engine.arrays import tensor_structs
from rlsd.engine.native import check, library
from rlsd.pipeline import cli, tuning
from rlsd.pipeline.plan import read_plan

SCRATCH = 8 << 20  # of the operators: engine/src/device_ops.cpp


@pytest.mark.parametrize("repulsion, gamma", [("auto", 0.0), ("features", 3.0), ("latent", 3.0)])
@pytest.mark.parametrize("variant", ["rlsd", "rlsd-nonaug"])
@pytest.mark.parametrize("operator", ["inpainting", "saturate"])
def test_agreement(fake, bundle, operator, variant, repulsion, gamma):
    params = Params(variant=variant, repulsion=repulsion, gamma=gamma, **{**PARAMS, "lr_x": 0.08})
    job = make_job(NETS, operator, particles=3, seed=2**40 + 3, item=7, params=params)
    with Engine(bundle, device="cuda:0") as engine:
        (result,) = engine.reconstruct([job])
    assert difference(result.particles, reference(NETS, job)) < TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_guidance_and_context(fake, bundle, guidance):
    context = np.random.default_rng(1).standard_normal(CONTEXT).astype(np.float32)
    job = make_job(NETS, particles=2, context=context, params=Params(guidance=guidance, **PARAMS))
    with Engine(bundle) as engine:
        (result,) = engine.reconstruct([job])
        assert engine.stats()["denoiser_runs"] == 2 * 5 * (1 if guidance == 1 else 2)
    assert difference(result.particles, reference(NETS, job)) < TOLERANCE


def test_a_job_is_the_same_alone_and_in_company(fake, bundle):
    jobs = jobs_of_all_kinds()
    alone = []
    for job in jobs:
        with Engine(bundle) as engine:
            alone += engine.reconstruct([job])
    for limit in (0, 4):
        with Engine(bundle, max_particles=limit) as engine:
            together = engine.reconstruct(jobs)
        for one, other in zip(alone, together, strict=True):
            assert one.particles.tobytes() == other.particles.tobytes()
            assert one.latents.tobytes() == other.latents.tobytes()


def test_jobs_join_between_ticks(fake, bundle):
    jobs = jobs_of_all_kinds()
    with Engine(bundle) as engine:
        wanted = [engine.reconstruct([job])[0].particles for job in jobs]
        handles = []
        for job in jobs:
            handles.append(engine.submit(job))
            engine.tick()
        engine.run()
    assert all(np.array_equal(handle.result().particles, want) for handle, want in zip(handles, wanted, strict=True))


def test_launches_follow_the_step(fake, bundle):
    """What a tick asks of the driver, once the particles are seated: order, grids, and the one wait."""
    with Engine(bundle) as engine:
        engine.submit(make_job(NETS, particles=4, params=Params(gamma=2.0, **PARAMS)))
        engine.tick()
        engine.tick()
        before = engine.stats()
        fake.clear_log()
        engine.tick()
        log, after = fake.log(), engine.stats()
        engine.cancel()
    launches = [re.sub(r" stream.*", "", line.split(" ", 1)[1]) for line in log if line.startswith("cuLaunchKernel")]
    assert launches == [
        "gather_features_fp16 grid 1,4,1", "repulsion_distances_4 grid 1,1,1", "repulsion_crowd_4 grid 1,1,1",
        "spread_repulsion_fp16 grid 1,4,1", "step_x_fp16_nchw grid 1,4,1", "step_z_fp16_nchw grid 1,4,1",
    ]  # fmt: skip
    graphs = [line for line in log if line.startswith("cuLaunchHostFunc")]
    assert len(graphs) == 6  # decoder, features, loss, features' pull-back, denoiser, decoder's pull-back
    assert sum(line.startswith("cuStreamSynchronize") for line in log) == 1
    assert after["launches"] - before["launches"] == len(launches) + len(graphs)
    assert after["synchronisations"] - before["synchronisations"] == 1
    assert not [line for line in log if re.match(r"cuMem(Alloc|Free|HostAlloc)", line)]


def test_graphs_can_be_evaluated(fake, bundle, tmp_path):
    z = np.random.default_rng(0).standard_normal((5, 4, 2, 2)).astype(np.float32)
    t = np.arange(5) * 7
    context = np.zeros((5, *CONTEXT), np.float32)
    with Engine(write_bundle(tmp_path / "cpu", NETS, 1)) as cpu, Engine(bundle) as engine:
        for graph, outputs, inputs in (
            ("decoder", ["image"], {"z": z}),
            ("denoiser", ["eps"], {"z_t": z, "t": t, "context": context}),
        ):
            want, found = (each.evaluate(graph, outputs, **inputs) for each in (cpu, engine))
            assert all(difference(found[name], want[name]) < 2e-3 for name in outputs)
        x = np.random.default_rng(1).standard_normal((3, 1, 4, 4)).astype(np.float32)
        found, want = (each.measure("saturate", x, gain=np.ones(1, np.float32)) for each in (engine, cpu))
        np.testing.assert_allclose(found, want, rtol=1e-6)
        with pytest.raises(RlsdError, match="needs input 'z'"):
            engine.evaluate("decoder", ["image"], y=z)
        with pytest.raises(RlsdError, match="indices") as raised:  # as the graph runs
            engine.evaluate("denoiser", ["eps"], z_t=z, t=t + TIMESTEPS, context=context)
        assert raised.value.status == Status.RUNTIME_ERROR


def test_an_evaluation_writes_what_is_asked_for_alone(fake, bundle):
    """5 samples in batches of 4: not the second batch's other 3."""
    room = np.full((8, *IMAGE), 7, np.float32)
    given, z = tensor_structs({"z": np.zeros((5, *LATENT), np.float32)})
    wanted, images = tensor_structs({"image": room[:5]})
    with Engine(bundle) as engine:
        check(library().rlsd_evaluate(engine._pointer, b"decoder", 5, given, len(z), wanted, len(images)))
    assert (room[:5] != 7).all() and (room[5:] == 7).all()


def test_facts_of_the_device(fake, tmp_path):
    notes = ["info kept decoder 1 100", "info kept features 1 20", "info kept decoder 10 5000", "info kept context 1 7"]
    path = hosted_bundle(write_bundle(tmp_path / "cpu", NETS, 1), tmp_path / "cuda", notes=notes)
    with Engine(path) as engine:
        assert engine.on_gpu and engine.describe()["device"] == ["Fake GPU"]
        assert engine.describe()["capability"] == ["90"] and engine.bytes_per_particle == 120
    notes = ["info kept decoder 2 200", "info kept features 2 40"]  # of a batch
    path = hosted_bundle(write_bundle(tmp_path / "pairs", NETS, 2), tmp_path / "cuda pairs", notes=notes)
    with Engine(path) as engine:
        assert engine.bytes_per_particle == 120


class OnDevice:
    """A float32 array in the stand-in's memory, as torch or CuPy would hand it over."""

    def __init__(self, driver, values: np.ndarray, bits: int = 32):
        self.driver, self.shape = driver.library, values.shape
        self.host = np.ascontiguousarray(values, np.float32)
        pointer = ctypes.c_uint64()
        assert self.driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(self.host.nbytes)) == 0
        self.pointer, self.bits = pointer.value, bits
        self.move("cuMemcpyHtoD_v2", ctypes.c_uint64(self.pointer), ctypes.c_void_p(self.host.ctypes.data))

    def move(self, call: str, to, source) -> None:
        assert getattr(self.driver, call)(to, source, ctypes.c_size_t(self.host.nbytes)) == 0

    def numpy(self) -> np.ndarray:
        back = np.empty_like(self.host)
        self.move("cuMemcpyDtoH_v2", ctypes.c_void_p(back.ctypes.data), ctypes.c_uint64(self.pointer))
        return back

    def free(self) -> None:
        assert self.driver.cuMemFree_v2(ctypes.c_uint64(self.pointer)) == 0

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, stream=None):
        assert stream == 1
        sizes = (ctypes.c_int64 * len(self.shape))(*self.shape)
        self.tensor = dlpack._Tensor(self.pointer, 2, 0, len(self.shape), 2, self.bits, 1, sizes, None, 0)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


def test_arrays_of_the_device_pass_without_the_host(fake, bundle, tmp_path):
    job = make_job(NETS, particles=2, params=Params(**PARAMS))
    with Engine(bundle) as engine, fake.context():
        (wanted,) = engine.reconstruct([job])
        y, mask = OnDevice(fake, job.y), OnDevice(fake, job.operator_params["mask"])
        out, latents = OnDevice(fake, np.ones((2, 1, 4, 4))), OnDevice(fake, np.ones((2, 4, 2, 2)))
        handle = engine.submit(replace(job, y=y, operator_params={"mask": mask}), out, latents)
        assert not out.numpy().any() and not latents.numpy().any()
        engine.run()
        assert handle.result().particles is out and handle.result().latents is latents
        assert out.numpy().tobytes() == wanted.particles.tobytes()
        assert latents.numpy().tobytes() == wanted.latents.tobytes()
        own = np.empty((2, 1, 4, 4), np.float32)
        handle = engine.submit(job, own)
        engine.run()
        assert handle.result().particles is own and own.tobytes() == wanted.particles.tobytes()
        with pytest.raises(ValueError, match="out has shape"):
            engine.submit(job, latents)
        with pytest.raises(ValueError, match="float32 is needed"):
            engine.submit(replace(job, y=half_of(y)))
        with Engine(write_bundle(tmp_path / "cpu", NETS, 1)) as cpu, pytest.raises(ValueError, match="runs on the CPU"):
            cpu.submit(replace(job, y=y))
        for each in (y, mask, out, latents):
            each.free()


def half_of(array: OnDevice) -> OnDevice:
    other = copy.copy(array)
    other.bits = 16
    return other


STABLE_DIFFUSION = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
import checkpoints
from rlsd.export import checkpoint, cuda
from rlsd.export.package import package
folder = Path(sys.argv[1])
source = checkpoints.stable_diffusion(folder / "sd", text=False, block_out_channels=checkpoints.WIDE_END)
checkpoints.vision_transformer(source / "features")
for write, options in ((package, {}), (cuda.package_cuda, {"architectures": []})):
    networks = checkpoint.load(source, (32, 32), ["inpainting"], source / "features")
    write(networks, folder / write.__name__, name="toy", batches=[2], **options)
"""


def test_stable_diffusion_through_our_kernels(fake, tmp_path):
    """A step of a toy Stable Diffusion on the graphs of a CUDA export, against the CPU's bundle in float32."""
    command = [sys.executable, "-c", STABLE_DIFFUSION, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run(command, check=True, env=environment)
    bundle = hosted_bundle(tmp_path / "package_cuda", tmp_path / "hosted")
    rng = np.random.default_rng(0)
    mask = (rng.random((1, 32, 32)) > 0.5).astype(np.float32)
    y = 0.3 * rng.standard_normal((3, 32, 32)).astype(np.float32) * mask
    params = Params(steps=2, gamma=20.0, lr_z=0.05, lr_x=0.1)
    job = Job(y=y, operator="inpainting", operator_params={"mask": mask}, particles=2, params=params)
    with Engine(tmp_path / "package") as cpu, Engine(bundle) as engine:
        (wanted,), (found,) = (each.reconstruct([job]) for each in (cpu, engine))
        assert engine.stats()["redone"] == 0
    for mine, theirs in ((found.particles, wanted.particles), (found.latents, wanted.latents)):
        assert np.linalg.norm(mine - theirs) < 2e-3 * np.linalg.norm(theirs)
    plan = read_plan(bundle)
    (seat,) = plan.seats
    counted = plan.weights + 2 * plan.particle + plan.job + seat.tensors
    assert 0 <= most_memory(fake.log()) - SCRATCH - counted < 0.02 * counted  # tables and the like are not counted
    launched = {line.split()[1] for line in fake.log() if line.startswith("cuLaunchKernel")}
    assert {
        "group_norm_apply_64_fp16",
        "add_group_norm_statistics_64_fp16",
        "group_norm_pull_apply_64_fp16",
    } <= launched
    assert {"bias_residual_fp16", "interleave_fp16", "group_norm_pull_phases_64_fp16"} <= launched
    assert {"narrow_conv_32_fp16", "narrow_conv_64_fp16", "group_norm_taps_32_fp16", "sum_taps_fp16"} <= launched


def most_memory(log: list[str]) -> int:
    """The largest number of bytes of the device that were allocated at once."""
    held: dict[str, int] = {}
    most = 0
    for words in map(str.split, log):
        if words[0] == "cuMemAlloc_v2":
            held[words[-1]] = int(words[1])
            most = max(most, sum(held.values()))
        elif words[0] == "cuMemFree_v2":
            held.pop(words[-1], None)
    return most


def test_what_the_caller_queued_before_is_waited_for(fake, bundle):
    """y is filled on a stream of the caller's own."""
    job = make_job(NETS, particles=1, params=Params(**{**PARAMS, "steps": 2}))
    library, stream = fake.library, ctypes.c_void_p()
    with Engine(bundle) as engine, fake.context():
        y = OnDevice(fake, np.zeros_like(job.y))
        assert library.cuStreamCreate(ctypes.byref(stream), 1) == 0
        half = ctypes.c_uint32(int(np.float32(0.5).view(np.uint32)))
        assert library.cuMemsetD32Async(ctypes.c_uint64(y.pointer), half, ctypes.c_size_t(job.y.size), stream) == 0
        found, wanted = engine.reconstruct([replace(job, y=given) for given in (y, np.full_like(job.y, 0.5))])
        assert library.cuStreamDestroy_v2(stream) == 0
        y.free()
    assert found.particles.tobytes() == wanted.particles.tobytes()


def test_tuning_decides_the_batches(fake, bundle, tmp_path, capsys):
    path = tmp_path / "bundle"
    shutil.copytree(bundle, path)
    assert cli.run(["tune", str(path)]) == 0
    lines = (path / "tuning.txt").read_text().splitlines()
    assert lines[:2] == ["rlsd-tuning 1", "device Fake GPU"] and [line.split()[1] for line in lines[3:]] == [
        "1",
        "2",
        "4",
    ]
    assert "particle-steps/s" in capsys.readouterr().out
    job = make_job(NETS, particles=4, params=Params(**PARAMS))
    for times, grids in (([1, 5, 9], ["1,1,1"] * 4), ([3, 4, 9], ["1,2,1"] * 2), ([3, 4, 5], ["1,4,1"])):
        measured = [f"batch {size} {ms}" for size, ms in zip((1, 2, 4), times)]
        (path / "tuning.txt").write_text("\n".join([*lines[:3], *measured, ""]))
        assert tick_grids(fake, path, job) == grids
    measured = ["batch 1 3", "batch 2 4", "batch 4 9"]
    others = (
        ["rlsd-tuning 2", *lines[1:]],
        [lines[0], "device Other GPU", *lines[2:]],
        [*lines[:2], "bundle " + "0" * 64],
    )
    wrong = ("batch 1 fast", "batch 1 0", "batch 1 -3", "seat 1 3")
    for broken in (*(each[:3] + measured for each in others), lines[:4], *([*lines[:3], w, *measured] for w in wrong)):
        (path / "tuning.txt").write_text("\n".join([*broken, ""]))
        with Engine(path) as engine:
            assert "tuned" not in engine.describe()


def test_ticks_that_record_graphs_are_not_timed(monkeypatch):
    """The first ones, which take far longer; as many as there are of them and of others would move the median."""
    taken = [*[50.0] * tuning.WARM, *range(1, tuning.MEASURED + 1)]
    clock = itertools.chain.from_iterable((0.0, seconds) for seconds in taken)
    monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    engine = SimpleNamespace(
        operators={"sum": OperatorInfo((3,), {})}, timesteps=100, tick=lambda: 1,
        submit=lambda job: SimpleNamespace(release=lambda: None),
    )  # fmt: skip
    assert tuning.tick_time(engine, 2) == 1e3 * (tuning.MEASURED + 1) / 2


def tick_grids(driver, path: Path, job: Job) -> list[str]:
    """The grids of a tick's step_z: one launch for each chunk."""
    with Engine(path) as engine:
        engine.submit(job)
        engine.tick()
        driver.clear_log()
        engine.tick()
        engine.cancel()
    return re.findall(r"cuLaunchKernel step_z_fp16_nchw grid (\S+)", "\n".join(driver.log()))
