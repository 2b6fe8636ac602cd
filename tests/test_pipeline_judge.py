"""The figures of an item, and what is written for it; with a stand-in engine."""

import json

import numpy as np
import pytest
from PIL import Image
from pipeline_fake import FakeEngine, make_bundle

from rlsd.engine import Params
from rlsd.pipeline import plots, record
from rlsd.pipeline.batch_item import write_lean
from rlsd.pipeline.classes import class_head
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.items import Item, frame_of
from rlsd.pipeline.judge import Judge, summary
from rlsd.pipeline.output import is_item_folder
from rlsd.pipeline.reconstruct import Outcome, reconstruct_items
from rlsd.pipeline.settings import Settings
from rlsd.pipeline.tasks import TASKS, Task

SETTINGS = Settings(Params(steps=5), particles=3, sigma=0.1)
HEAD = np.array([[1, 0, 0, 0, 0, 0, 0.1], [-1, 0, 0, 0, 0, 0, -0.1], [0, 0, 0, 0, 0, 0, -9]], "<f4")


@pytest.fixture
def engine(tmp_path):
    return FakeEngine(make_bundle(tmp_path / "bundle"))


def outcome(engine: FakeEngine, **changes) -> Outcome:
    y = np.zeros((1, 8, 8), np.float32)
    values = {"index": 0, "name": "i0", "task": TASKS["sr4"], "settings": SETTINGS, "y": y} | changes
    (made,) = reconstruct_items(engine, [Item(**values)])
    return made


class Lightness:
    """Stands in for LPIPS: the difference of the means."""

    def to(self, truth):
        return [truth.mean()]

    def distance(self, image, truth):
        return abs(float(image.mean() - truth[0]))


def test_figures(engine):
    truth = np.zeros((1, 32, 32), np.float32)
    made = outcome(engine, truth=truth)
    figures = Judge(engine, Lightness())(made).figures
    inside = made.particles[:, :, 2:30, 2:30].astype(float)
    assert figures["psnr"]["particles"][0] == pytest.approx(10 * np.log10(4 / (inside[0] ** 2).mean()), rel=1e-6)
    predicted = engine.measure("superres4", made.particles)
    assert figures["residual"]["particles"][2] == pytest.approx(np.sqrt((predicted[2] ** 2).mean()), rel=1e-5)
    assert figures["residual_in_sigma"]["mean"] == pytest.approx(figures["residual"]["mean"] / 0.1)
    of_mean = engine.measure("superres4", made.particles.mean(0, keepdims=True))
    assert figures["residual"]["of_mean_image"] == pytest.approx(np.sqrt((of_mean**2).mean()), rel=1e-5)
    assert figures["residual_in_sigma"]["of_mean_image"] == pytest.approx(figures["residual"]["of_mean_image"] / 0.1)
    assert figures["residual_in_sigma"]["particles"] == pytest.approx(
        [r / 0.1 for r in figures["residual"]["particles"]]
    )
    assert figures["deviation"] == pytest.approx(inside.std(0).mean(), rel=1e-6)
    assert -1 <= figures["feature_similarity"] <= 1 and figures["classes"] is None
    fit = figures["best_by_fit"]
    assert figures["residual"]["particles"][fit] == figures["residual"]["best"] == figures["residual"]["best_by_fit"]
    for metric, best in (("psnr", max), ("ssim", max), ("lpips", min)):
        values = figures[metric]["particles"]
        assert figures[metric]["best_by_fit"] == values[fit] and figures[metric]["best"] == best(values)
    assert figures["lpips"]["of_mean_image"] == pytest.approx(abs(inside.mean()), rel=1e-5)
    assert figures["calibration"]["error"] == pytest.approx(np.sqrt((inside.mean(0) ** 2).mean()))


def test_particles_are_clipped_once_and_before_their_mean(engine, tmp_path):
    made = outcome(engine, truth=np.zeros((1, 32, 32), np.float32))
    particles = np.random.default_rng(0).uniform(-3, 2, made.particles.shape).astype(np.float32)
    made = Outcome(made.item, particles, made.latents, made.trace, 1.0)
    judgement = Judge(engine, Lightness())(made)
    figures, shown = judgement.figures, np.clip(particles[:, :, 2:30, 2:30].astype(float), -1, 1)
    error = np.sqrt((shown.mean(0) ** 2).mean())
    assert figures["calibration"]["error"] == pytest.approx(error)
    assert figures["psnr"]["of_mean_image"] == pytest.approx(20 * np.log10(2 / error))
    assert figures["lpips"]["of_mean_image"] == pytest.approx(abs(shown.mean()))
    assert figures["deviation"] == pytest.approx(shown.std(0).mean())
    assert figures["residual"]["particles"] == pytest.approx(
        np.sqrt((engine.measure("superres4", particles) ** 2).mean((1, 2, 3))).tolist()
    )
    for name in ("whole", "lean"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "lean":
            write_lean(folder, made, np.zeros(3), frame_of(engine), pictures=True)
        else:
            record.write_item(folder, made, judgement, frame_of(engine), plots=False)
        written = json.loads((folder / "item.json").read_text())
        assert written["psnr"]["of_mean_image"] == figures["psnr"]["of_mean_image"]
        values = np.asarray(Image.open(folder / "mean.png")) / 127.5 - 1
        np.testing.assert_allclose(values, shown.mean(0)[0], atol=0.5 / 127.5 + 1e-6)


def test_the_best_by_fit_is_chosen_without_the_truth(engine):
    made = outcome(engine)
    for order in ([0, 1, 2], [2, 0, 1]):
        found = Judge(engine)(Outcome(made.item, made.particles[order], made.latents, made.trace, 1.0)).figures
        residual = np.sqrt((engine.measure("superres4", made.particles[order]) ** 2).mean((1, 2, 3)))
        assert found["best_by_fit"] == residual.argmin() and "psnr" not in found and "calibration" not in found


def test_a_summary_has_the_particle_that_fits_best():
    values = [3.0, 1.0, float("inf"), 2.0]
    assert summary(values[:2] + values[3:], 2) == {"mean": 2, "best": 1, "best_by_fit": 2, "particles": [3, 1, 2]}
    assert summary(values, 2, max) == {"mean": None, "best": None, "best_by_fit": None, "particles": [3, 1, None, 2]}


def with_classes(engine, *names, values=HEAD):
    facts = engine.describe()
    facts["info"] = [*facts["info"], "class_head head.f32 " + " ".join(names)]
    engine.describe = lambda: facts
    values.tofile(engine.path / "head.f32")
    return engine


def test_classes(engine):
    truth = np.ones((1, 32, 32), np.float32)
    made = outcome(engine, truth=truth, settings=Settings(Params(steps=5), particles=40))
    found = Judge(with_classes(engine, "up", "down", "never"))(made).figures["classes"]
    first = made.particles.reshape(40, -1)[:, 0]
    want = np.where(first + 0.1 > 0, "up", "down")
    assert found["predicted"] == want.tolist() and found["of_input"] == "up" and found["distinct"] == 2
    share = np.array([(want == name).mean() for name in ("up", "down")])
    assert found["entropy"] == pytest.approx(-(share * np.log(share)).sum())
    assert found["histogram"] == {name: int((want == name).sum()) for name in ("up", "down")}
    logits = np.stack([first + 0.1, -first - 0.1, np.full(40, -9)], 1)
    likely = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found["probability"], likely.max(1), rtol=1e-5)


def test_classes_that_do_not_fit(engine):
    with pytest.raises(InputError, match=r"head\.f32 of the bundle has 21 values, 14 finite ones are wanted"):
        class_head(with_classes(engine, "up", "down"))
    (engine.path / "head.f32").unlink()
    with pytest.raises(InputError, match=r"head\.f32 of the bundle cannot be read"):
        class_head(engine)


def test_lpips_is_for_gray_and_colour(tmp_path):
    with pytest.raises(InputError, match="images of 1 or 3 channels, but the prior's have 2"):
        Judge(FakeEngine(make_bundle(tmp_path / "b"), channels=2), Lightness())


def test_one_particle_and_a_perfect_one(engine, tmp_path):
    made = outcome(engine, settings=Settings(Params(steps=3), particles=1))
    made = outcome(engine, settings=made.item.settings, truth=made.particles[0])
    judgement = Judge(engine)(made)
    figures = judgement.figures
    assert figures["feature_similarity"] is None and figures["residual_in_sigma"] is None
    assert figures["psnr"] == {**dict.fromkeys(("mean", "best", "best_by_fit", "of_mean_image")), "particles": [None]}
    assert figures["calibration"] is None and figures["lpips"] is None
    (tmp_path / "item").mkdir()
    entry = record.write_item(tmp_path / "item", made, judgement, frame_of(engine))
    assert entry["plots"] == ["trajectories.png"]
    json.loads((tmp_path / "item" / "item.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("matplotlib", [True, False])
def test_an_items_folder(tmp_path, monkeypatch, channels, matplotlib):
    monkeypatch.setattr(plots, "find_spec", lambda name: matplotlib or None)
    engine = FakeEngine(make_bundle(tmp_path / "b"), channels=channels)
    truth = np.random.default_rng(0).uniform(-1, 1, (channels, 32, 32)).astype(np.float32)
    y = engine.measure("superres4", truth[None])[0]
    made, frame = outcome(engine, truth=truth, y=y), frame_of(engine)
    folder = tmp_path / "item"
    folder.mkdir()
    entry = record.write_item(folder, made, Judge(engine)(made), frame)
    pictures = ["similarity.png", *(["trajectories.png"] if matplotlib else [])]
    assert entry["plots"] == pictures and is_item_folder(folder)
    names = ["arrays.npz", "grid.png", "input.png", "item.json", "mean.png", "measurement.png", "std.png", *pictures]
    assert {p.name for p in folder.iterdir()} == {*names, *(f"particle_0{i}.png" for i in range(3))}
    particle = np.asarray(Image.open(folder / "particle_01.png"))
    assert particle.shape[:2] == (28, 28) and particle.ndim == (2 if channels == 1 else 3)
    shown = np.moveaxis(np.atleast_3d(particle), -1, 0) / 127.5 - 1
    np.testing.assert_allclose(shown, frame.crop(made.particles[1]), atol=0.5 / 127.5 + 1e-6)
    with np.load(folder / "arrays.npz") as arrays:
        assert set(arrays) == {"particles", "latents", "y", "truth", "trace"}
        assert all(array.dtype == np.float32 for array in arrays.values())
        np.testing.assert_array_equal(arrays["particles"], made.particles)
        assert arrays["trace"].shape == (4, 3, 3)
    written = json.loads((folder / "item.json").read_text())
    assert written["psnr"]["best"] == max(written["psnr"]["particles"])
    assert Image.open(folder / "std.png").text["scale"].startswith("0 to ")


@pytest.mark.parametrize(
    "task, shape",
    [(TASKS["phase-retrieval"], (1, 48, 48)), (Task("sum", "a vector", "sum"), (5,)), (TASKS["random"], (1, 32, 32))],
)
def test_every_kind_of_measurement_has_a_picture(engine, tmp_path, task, shape):
    params = {"mask": np.ones((1, 32, 32), np.float32)} if task.operator == "inpainting" else {}
    y = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    made = outcome(engine, task=task, y=y, operator_params=params)
    folder = tmp_path / "item"
    folder.mkdir()
    record.write_item(folder, made, Judge(engine)(made), frame_of(engine), plots=False)
    assert Image.open(folder / "measurement.png").size[0] >= 3
    assert not (folder / "similarity.png").exists() and not (folder / "trajectories.png").exists()
