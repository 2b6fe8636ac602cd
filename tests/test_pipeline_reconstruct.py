"""Streaming reconstruction and simulation of measurements; with a stand-in engine."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pipeline_fake import FakeEngine, make_bundle

from rlsd.engine import Params, RlsdError, Status, normal
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.items import (
    Item,
    Plan,
    Source,
    check_plan,
    context_of,
    load_items,
    name_sources,
    simulate,
)
from rlsd.pipeline.reconstruct import reconstruct_items
from rlsd.pipeline.settings import Settings, settings_for
from rlsd.pipeline.tasks import TASKS

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


def test_after_each_item_that_is_dropped_one_may_stop(engine):
    dropped, looks = [], []
    outcomes = reconstruct_items(engine, map(item, range(5)), submit=dropped.append, watch=looks.append)
    assert list(outcomes) == [] and len(dropped) == 5 and len(looks) >= 5


def test_what_is_under_way_is_dropped_however_it_ends(engine):
    stream = reconstruct_items(engine, [item(0), item(1), item(2, settings=replace(SETTINGS, params=Params(steps=9)))])
    next(stream)
    assert len(engine.handles) == 1
    stream.close()
    assert engine.handles == []
    engine.on_tick = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError) as raised:
        list(reconstruct_items(engine, map(item, range(3))))
    assert engine.handles == [] and raised.tb is not None  # which holds the jobs


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
        np.save(masks[-1], np.arange(32) % 2 * np.ones((32, 1)) if index else np.ones((32, 32)))
    plan = Plan(TASKS["random"], SETTINGS, name_sources(images), given={"mask": masks})
    check_plan(engine, plan)
    assert [loaded.operator_params["mask"].mean() for loaded in load_items(engine, plan)] == [1, 0.5]
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


def test_many_files_of_one_name_are_named_in_no_time(tmp_path):
    start = time.process_time()
    names = [source.name for source in name_sources([tmp_path / str(i) / "image.png" for i in range(20_000)])]
    assert names[:2] == ["image", "image-2"] and names[-1] == "image-20000"
    assert time.process_time() - start < 5  # each counting from 1 anew: minutes


def test_settings(engine):
    changed = settings_for(TASKS["half"], "sd512", {"gamma": 3.0, "steps": None, "seed": 4})
    assert (changed.params.gamma, changed.params.steps, changed.seed, changed.particles) == (3.0, 999, 4, 4)
    bare = settings_for(TASKS["sr8"], "sd512", {"variant": "rlsd-nonaug", "steps": 20}).params
    assert (bare.steps, bare.lambda_, bare.lr_z, bare.gamma) == (20, 0.1, 0.6, 35)
    for changes, message in (
        ({"particles": 0}, "particles is 0; allowed are 1 to 65536"),
        ({"sigma": -1.0}, "sigma is -1.0; it must be 0 or more"),
        ({"sigma": float("nan")}, "sigma is nan"),
        ({"guidance": 0.5}, "guidance is 0.5, which needs a class to guide to"),
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


def test_source_and_plan_count_their_work():
    plan = Plan(TASKS["sr4"], SETTINGS, [Source(None, i, str(i)) for i in range(5)])
    assert plan.particle_steps() == 5 * 3 * 4
