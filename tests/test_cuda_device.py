"""The engine on a real GPU: tiny networks on ONNX Runtime's CUDA provider, our kernels as cubins.

Skips where there is no NVIDIA GPU, or only ONNX Runtime for CPUs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import numpy as np
import onnxruntime
import torch
from bundle_factory import write_bundle
from device_nodes import bundle_of, features_graph, graph_of_all, run
from device_terms import PARAMS, TOLERANCE, difference
from hosted import hosted_bundle
from tiny import CONTEXT, make_job, make_nets, reference
from traced import wanted_trace

from rlsd.engine import Engine, Params
from rlsd.kernels import aot

HERE = torch.cuda.is_available() and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
pytestmark = pytest.mark.skipif(not HERE, reason="needs an NVIDIA GPU, and ONNX Runtime for it")

NETS = make_nets()
WIDEST = 5 * TOLERANCE  # of one value among many: these networks' float32 products have TF32's 11 bits on a GPU
BATCHES = (1, 2, 4, 17, 65)


@pytest.fixture(name="cubins", scope="module")
def cubins_fixture() -> list[tuple[str, bytes, str]]:
    major, minor = torch.cuda.get_device_capability()
    compiled = [aot.compile_kernel(kernel, 10 * major + minor) for kernel in aot.kernels(precise=True)]
    return [(cubin.file, cubin.binary, cubin.line) for cubin in compiled]


@pytest.fixture(name="bundle", scope="module")
def bundle_fixture(tmp_path_factory: pytest.TempPathFactory, cubins: list[tuple[str, bytes, str]]) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return hosted_bundle(write_bundle(folder / "cpu", NETS, *BATCHES), folder / "cuda", cubins=cubins)


@pytest.fixture(name="engine")
def engine_fixture(bundle: Path):
    with Engine(bundle, device="cuda:0") as engine:
        yield engine


@pytest.mark.parametrize("repulsion", ["features", "latent"])
@pytest.mark.parametrize("particles", [1, 2, 5, 17, 65, 80])
def test_a_crowd_of_any_size_agrees(engine, particles, repulsion):
    job = make_job(NETS, particles=particles, params=Params(gamma=5.0, repulsion=repulsion, **PARAMS), trace=True)
    (found,), (again,) = engine.reconstruct([job]), engine.reconstruct([job])
    wanted = reference(NETS, job)
    assert np.linalg.norm(found.particles - wanted) < TOLERANCE * np.linalg.norm(wanted)
    widest = WIDEST if particles > 64 else TOLERANCE
    assert difference(found.particles, wanted) < widest
    assert found.particles.tobytes() == again.particles.tobytes()
    np.testing.assert_allclose(found.trace, wanted_trace(NETS, job), rtol=max(2e-2, widest))  # losses and bandwidths


def test_jobs_of_all_kinds_agree_side_by_side(engine):
    context = np.random.default_rng(1).standard_normal(CONTEXT).astype(np.float32)
    jobs = [
        make_job(NETS, "saturate", particles=3, item=1, params=Params(gamma=2.0, **PARAMS)),
        make_job(NETS, particles=2, item=2, params=Params(variant="rlsd-nonaug", **PARAMS)),
        make_job(NETS, particles=5, item=3, context=context, params=Params(guidance=3.0, **PARAMS)),
    ]
    for job, found in zip(jobs, engine.reconstruct(jobs), strict=True):
        assert difference(found.particles, reference(NETS, job)) < TOLERANCE


def test_a_tick_waits_once_and_results_may_stay_on_the_device(engine):
    out = torch.full((4, 1, 4, 4), float("nan"), device="cuda:0")
    job = make_job(NETS, particles=4, params=Params(gamma=2.0, **PARAMS))
    handle = engine.submit(job, out=out)
    engine.tick()
    before = engine.stats()["synchronisations"]
    engine.tick()
    assert engine.stats()["synchronisations"] - before == 1
    engine.run()
    handle.result()
    (wanted,) = engine.reconstruct([job])
    assert np.array_equal(out.cpu().numpy(), wanted.particles)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_every_operator_of_the_graphs_is_its_definition(tmp_path, cubins, kind):
    graph = graph_of_all(kind)
    bundle = bundle_of(tmp_path, features_graph(graph.nodes, graph.constants, graph.wanted), cubins)
    with Engine(bundle, device="cuda:0") as engine:
        found = run(engine, graph.wanted)
    for name, want in graph.wanted.items():
        assert difference(found[name], want.astype(np.float32)) < 2e-3, name
