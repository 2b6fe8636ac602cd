"""Streaming reconstruction, simulation of measurements, and what is written for an item; with a stand-in engine."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image
from pipeline_fake import FakeEngine, make_bundle

from rlsd.engine import Params, RlsdError, Status, normal
from rlsd.pipeline import record
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.items import (
    Item,
    Plan,
    Source,
    check_plan,
    context_of,
    frame_of,
    load_items,
    name_sources,
    simulate,
)
from rlsd.pipeline.reconstruct import Outcome, reconstruct_items
from rlsd.pipeline.settings import Settings, settings_for
from rlsd.pipeline.tasks import TASKS, Task

SETTINGS = Settings(Params(steps=5), particles=3, sigma=0.1)


@pytest.fixture
def engine(tmp_path):
    return FakeEngine(make_bundle(tmp_path / "bundle"))


def item(index: int, **changes) -> Item:
    y = np.zeros((1, 8, 8), np.float32)
    return Item(**{"index": index, "name": f"i{index}", "task": TASKS["sr4"], "settings": SETTINGS, "y": y} | changes)


def test_every_item_comes_out_once(engine):
    reports = []
    outcomes = list(reconstruct_items(engine, map(item, range(20)), window=7, report=reports.append))
    assert sorted(outcome.item.index for outcome in outcomes) == list(range(20))
    assert all(outcome.particles.shape == (3, 1, 32, 32) and outcome.error is None for outcome in outcomes)
    assert reports[-1] == 20 * 3 * 4 and reports == sorted(reports)


def test_items_are_drawn_only_as_they_are_needed(engine):
    drawn = itertools.count()
    endless = (item(next(drawn)) for _ in itertools.repeat(None))
    stream = reconstruct_items(engine, endless, window=9)
    for _ in range(6):
        next(stream)
    assert next(drawn) <= 9
    stream.close()


def test_one_bad_item_does_not_stop_the_others(tmp_path):
    engine = FakeEngine(make_bundle(tmp_path), broken=[1])
    outcomes = {outcome.item.index: outcome for outcome in reconstruct_items(engine, map(item, range(3)))}
    assert outcomes[1].error == "item 1 became NaN at step 1 of 9" and outcomes[1].particles.size == 0
    assert outcomes[0].error is None and outcomes[2].error is None


def test_other_failures_are_raised(tmp_path):
    def fail(_):
        raise RlsdError(Status.RUNTIME_ERROR, "no")

    with pytest.raises(RlsdError, match="no"):
        list(reconstruct_items(FakeEngine(make_bundle(tmp_path), on_tick=fail), [item(0)]))


def test_an_interrupt_cancels_the_engine(engine, monkeypatch):
    class Interrupted:
        def result(self):
            raise KeyboardInterrupt

        def exception(self):
            return None

    monkeypatch.setattr("rlsd.pipeline.reconstruct.ThreadPoolExecutor.submit", lambda *_: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        list(reconstruct_items(engine, [item(0)]))
    assert engine.cancelled


def test_noise_is_the_engines_own_drawn_once_an_item(engine):
    image = np.linspace(-1, 1, 1024, dtype=np.float32).reshape(1, 32, 32)
    y = simulate(engine, TASKS["sr4"], image, {}, SETTINGS, 3)
    clean = engine.measure("superres4", image[None])[0]
    np.testing.assert_allclose(y - clean, 0.1 * normal(0, 3, 0, 0xC0000000, 64).reshape(1, 8, 8), atol=1e-6)
    assert np.array_equal(simulate(engine, TASKS["sr4"], image, {}, Settings(Params(steps=5), 3), 3), clean)


def save_image(path, size=28):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size), np.uint8)).save(path)
    return path


def test_what_was_not_observed_is_zero(engine, tmp_path):
    plan = Plan(TASKS["random"], SETTINGS, name_sources([save_image(tmp_path / "a.png")]))
    (loaded,) = load_items(engine, plan)
    mask = loaded.operator_params["mask"]
    assert (loaded.y[mask == 0] == 0).all() and (loaded.y[mask == 1] != 0).all()
    assert loaded.truth.shape == (1, 32, 32) and loaded.notes == ("black border added to 32x32",)
    job = loaded.job()
    assert (job.operator, job.item, job.seed, job.particles) == ("inpainting", 0, 0, 3)


def test_measured_items_have_no_truth(engine, tmp_path):
    np.save(tmp_path / "y.npy", np.ones((8, 8)))
    plan = Plan(TASKS["sr4"], SETTINGS, name_sources([tmp_path / "y.npy"]), measured=True)
    (loaded,) = load_items(engine, plan)
    assert loaded.truth is None and loaded.y.shape == (1, 8, 8) and (loaded.y == 1).all()


def test_parameter_files_one_for_all_or_one_for_each(engine, tmp_path):
    images = [save_image(tmp_path / f"{name}.png") for name in "ab"]
    masks = []
    for index in range(2):
        masks.append(tmp_path / f"m{index}.npy")
        np.save(masks[-1], np.full((32, 32), bool(index)))
    plan = Plan(TASKS["random"], SETTINGS, name_sources(images), given={"mask": masks})
    check_plan(engine, plan)
    assert [loaded.operator_params["mask"].mean() for loaded in load_items(engine, plan)] == [0, 1]
    with pytest.raises(InputError, match="mask has 3 files for 2 inputs; give one, or one for each"):
        check_plan(engine, Plan(TASKS["random"], SETTINGS, plan.sources, given={"mask": [*masks, masks[0]]}))
    with pytest.raises(InputError, match="operator superres4 has no parameter 'mask'; allowed is none"):
        check_plan(engine, Plan(TASKS["sr4"], SETTINGS, plan.sources, given={"mask": masks}))


def test_names_are_safe_and_differ(tmp_path):
    paths = [
        tmp_path / name
        for name in ("a/x.png", "b/x.png", "X.png", "sp ace.png", "...", ".hidden.png", "report.json.png")
    ]
    names = [source.name for source in name_sources(paths)]
    assert names == ["x", "x-2", "X-3", "sp-ace", "item", "hidden", "report.json-2"]


def test_settings(engine):
    changed = settings_for(TASKS["half"], "sd512", {"gamma": 3.0, "steps": None, "seed": 4})
    assert (changed.params.gamma, changed.params.steps, changed.seed, changed.particles) == (3.0, 999, 4, 4)
    for changes, message in (
        ({"particles": 0}, "particles is 0; allowed are 1 to 65536"),
        ({"sigma": -1.0}, "sigma is -1.0; it must be 0 or more"),
        ({"sigma": float("nan")}, "sigma is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"guidance": 3.0}, "guidance is 3, which needs a class"),
        ({"steps": 1}, "steps is 1"),
        ({"lr_z": 0.0}, "lr_z is 0.0"),
        ({"variant": "x"}, "variant is 'x'"),
    ):
        with pytest.raises(InputError, match=message):
            settings_for(TASKS["half"], "fashion", changes)
    assert context_of(engine, None) is None and context_of(engine, "dog")[0, 0] == 1
    with pytest.raises(InputError, match="class 'cow' is not known to the prior fake; its classes: cat, dog"):
        context_of(engine, "cow")


# ------------------------------------------------------------------ writing


def outcome(engine: FakeEngine, **changes) -> Outcome:
    (made,) = reconstruct_items(engine, [item(0, **changes)])
    return made


@pytest.mark.parametrize("channels", [1, 3])
def test_an_items_folder(tmp_path, channels):
    engine = FakeEngine(make_bundle(tmp_path / "b"), channels=channels)
    truth = np.random.default_rng(0).uniform(-1, 1, (channels, 32, 32)).astype(np.float32)
    y = engine.measure("superres4", truth[None])[0]
    made, frame = outcome(engine, truth=truth, y=y), frame_of(engine)
    figures = record.measure_outcome(engine, made, frame)
    folder = tmp_path / "item"
    folder.mkdir()
    record.write_item(folder, made, figures, frame)
    names = ["arrays.npz", "grid.png", "input.png", "item.json", "mean.png", "measurement.png"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*names, "std.png", *(f"particle_0{i}.png" for i in range(3))]
    )
    particle = np.asarray(Image.open(folder / "particle_01.png"))
    assert particle.shape[:2] == (28, 28) and particle.ndim == (2 if channels == 1 else 3)
    shown = np.moveaxis(np.atleast_3d(particle), -1, 0) / 127.5 - 1
    np.testing.assert_allclose(shown, frame.crop(made.particles[1]), atol=0.5 / 127.5 + 1e-6)
    with np.load(folder / "arrays.npz") as arrays:
        assert set(arrays) == {"particles", "latents", "y", "truth"}
        assert all(array.dtype == np.float32 for array in arrays.values())
        np.testing.assert_array_equal(arrays["particles"], made.particles)
    written = json.loads((folder / "item.json").read_text())
    assert written["psnr"]["best"] == max(written["psnr"]["particles"])
    assert Image.open(folder / "std.png").text["scale"].startswith("0 to ")


def test_figures(engine):
    truth = np.zeros((1, 32, 32), np.float32)
    made = outcome(engine, truth=truth)
    figures = record.measure_outcome(engine, made, frame_of(engine))
    inside = made.particles[:, :, 2:30, 2:30].astype(float)
    assert figures["psnr"]["particles"][0] == pytest.approx(10 * np.log10(4 / (inside[0] ** 2).mean()), rel=1e-6)
    predicted = engine.measure("superres4", made.particles)
    assert figures["residual"]["particles"][2] == pytest.approx(np.sqrt((predicted[2] ** 2).mean()), rel=1e-5)
    assert figures["residual_in_sigma"]["mean"] == pytest.approx(figures["residual"]["mean"] / 0.1)
    assert figures["deviation"] == pytest.approx(inside.std(0).mean(), rel=1e-6)
    assert -1 <= figures["feature_similarity"] <= 1


@pytest.mark.parametrize(
    "task, shape",
    [(TASKS["phase-retrieval"], (1, 48, 48)), (Task("sum", "a vector", "sum"), (5,)), (TASKS["random"], (1, 32, 32))],
)
def test_every_kind_of_measurement_has_a_picture(engine, tmp_path, task, shape):
    params = {"mask": np.ones((1, 32, 32), np.float32)} if task.parameter else {}
    y = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    made = outcome(engine, task=task, y=y, operator_params=params)
    record.write_item(tmp_path, made, record.measure_outcome(engine, made, frame_of(engine)), frame_of(engine))
    assert Image.open(tmp_path / "measurement.png").size[0] >= 3


def test_one_particle_and_a_perfect_one(engine, tmp_path):
    made = outcome(engine, settings=Settings(Params(steps=3), particles=1))
    made = Outcome(item(0, truth=made.particles[0], settings=made.item.settings), made.particles, made.latents, 1.0)
    figures = record.measure_outcome(engine, made, frame_of(engine))
    assert figures["feature_similarity"] is None and figures["residual_in_sigma"] is None
    assert figures["psnr"] == {"mean": None, "best": None, "particles": [None], "of_mean_image": None}
    record.write_item(tmp_path, made, figures, frame_of(engine))
    json.loads((tmp_path / "item.json").read_text(), parse_constant=pytest.fail)


def test_source_and_plan_count_their_work():
    plan = Plan(TASKS["sr4"], SETTINGS, [Source(None, i, str(i)) for i in range(5)])
    assert plan.particle_steps() == 5 * 3 * 4
