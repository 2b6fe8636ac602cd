"""Every forward operator on Stable Diffusion's layout at toy width: three channels, one step each, all in one batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
import checkpoints  # noqa: E402

from rlsd.bench.full_size import one_step_jobs  # noqa: E402
from rlsd.engine import Engine, Job, Params  # noqa: E402
from rlsd.export import export_checkpoint  # noqa: E402
from rlsd.export.bundle import BundleWriter  # noqa: E402
from rlsd.export.operator_graphs import OperatorGraphs  # noqa: E402
from rlsd.export.operators import chain, operators  # noqa: E402
from rlsd.export.trace import CUDA_SAVINGS, REWRITES  # noqa: E402
from rlsd.pipeline.tasks import TASKS, named_task  # noqa: E402

IMAGE = (3, 32, 32)
CHAINS = {"colour+jpeg": "luminance+jpeg", "sr4+quantise": "superres4+quantisation"}
NAMES = ["all", *CHAINS.values()]
NEW = ("nonlinear_blur", "luminance", "quantisation", "jpeg")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    checkpoint = checkpoints.stable_diffusion(folder / "checkpoint", text=False)
    return export_checkpoint(checkpoint, folder / "bundle", size="32", batches=[2], operators=NAMES)


def test_every_task_takes_a_step_in_colour(bundle: Path) -> None:
    tasks = [*TASKS.values(), *(named_task(name) for name in CHAINS)]
    with Engine(bundle, threads=1) as engine:
        assert engine.image_shape == IMAGE and {task.operator for task in tasks} <= set(engine.operators)
        jobs = one_step_jobs(engine, tasks, particles=2)
        results = engine.reconstruct(jobs)
    for task, job, result in zip(tasks, jobs, results):
        assert np.isfinite(job.y).all() and np.isfinite(result.particles).all(), task.name
        assert result.particles.shape == (2, *IMAGE), task.name


OWN = {
    "jpeg": [{"tables": np.full((2, 8, 8), step, np.float32)} for step in (4, 90)],
    "quantisation": [{"levels": np.array([count], np.float32)} for count in (2, 16)],
}


@pytest.mark.parametrize("name", list(OWN))
def test_items_of_a_batch_have_their_own_tables_and_levels(bundle: Path, name: str) -> None:
    """Two items that share a batch give what each gives alone."""
    x = np.random.default_rng(0).uniform(-1, 1, (1, *IMAGE)).astype(np.float32)
    jobs = []
    with Engine(bundle, threads=1) as engine:
        for given in OWN[name]:
            y = engine.measure(name, x, **{word: value[None] for word, value in given.items()})[0]
            jobs.append(Job(y, name, given, particles=1, params=Params(steps=4)))
        together = engine.reconstruct(jobs)
        alone = [engine.reconstruct([job])[0] for job in jobs]
    assert not np.array_equal(jobs[0].y, jobs[1].y)
    for one, two in zip(together, alone):
        assert one.particles.tobytes() == two.particles.tobytes()


def test_the_same_graphs_go_into_a_bundle_for_cuda(tmp_path: Path) -> None:
    found = {name: each for name, each in operators(IMAGE).items() if name in NEW}
    found |= dict(chain(names, IMAGE) for names in CHAINS.values())
    with BundleWriter(tmp_path / "bundle", "operators", "rlsd tests", "cuda", "fp16") as writer:
        graphs = OperatorGraphs(writer, torch.rand(1, *IMAGE) * 2 - 1, [n for n in CUDA_SAVINGS if n in REWRITES])
        for name, operator in found.items():
            graphs.operator(name, operator)  # which raises CheckError if a graph is not what the module is
    lines = [line.split() for line in (tmp_path / "bundle" / "manifest.txt").read_text().splitlines()]
    made = {words[1] for words in lines if words[0] == "graph"}
    assert made == {f"operator.{name}.{graph}" for name in found for graph in ("forward", "loss")}
    assert set(NEW) | {"luminance-jpeg", "superres4-quantisation"} == set(found)
