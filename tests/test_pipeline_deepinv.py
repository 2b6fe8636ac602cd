"""RLSD as a deepinv Reconstructor: against the reference in float64, for batches, sizes, caches and wrong input."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from with_deepinv import deepinv  # isort: skip
import torch
from bundle_factory import manifest, write_bundle
from tiny import make_job, make_nets, reference
from torch import Tensor

from rlsd.engine import Engine, Params
from rlsd.export import extend as extension
from rlsd.pipeline.deepinv import RLSD
from rlsd.pipeline.errors import InputError

p = deepinv.physics
NETS = make_nets()
PARAMS = {"steps": 12, "lr_x": 0.05, "lr_z": 0.05, "gamma": 1.0, "rho": 0.1, "lambda_": 0.2}
MASKS = (torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.4).float()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 4 x 4, of which one row above and one column on the right are a border."""
    path = write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", NETS, 2)
    lines = (path / "manifest.txt").read_text().splitlines()[1:-1]
    facts = [line for line in lines if not line.startswith("file ")] + ["info image_padding 0 1 1 0"]
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.txt"}
    (path / "manifest.txt").write_bytes(manifest(facts, files))
    return path


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of this module's own, shared by its tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def model(bundle: Path, **changes: Any) -> RLSD:
    return RLSD(bundle, **{"particles": 3, "seed": 5, **PARAMS, **changes})


def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("exported again")

    monkeypatch.setattr(extension, "extend", refuse)


def wanted(y: Tensor, mask: Tensor, item: int) -> np.ndarray:
    """[N, 1, 4, 4] in [0, 1] by the reference in float64; y and mask of one item."""
    job = make_job(NETS, particles=3, seed=5, item=item, params=Params(**PARAMS))
    job = replace(job, y=(2 * y - mask).numpy(), operator_params={"mask": mask.numpy()})  # of images in [-1, 1]
    return (reference(NETS, job) + 1) / 2


def test_each_item_of_a_batch_with_its_own_mask_is_the_reference(bundle: Path) -> None:
    physics = p.Inpainting(img_size=(1, 4, 4), mask=MASKS)
    y = physics.A(torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)))
    particles = model(bundle, result="all")(y, physics)
    assert particles.shape == (2, 3, 1, 4, 4) and particles.dtype == torch.float32
    for i in range(2):
        assert np.abs(particles[i].numpy() - wanted(y[i], MASKS[i], i)).max() < 1e-4
    assert torch.allclose(model(bundle)(y, physics), particles.mean(1), atol=1e-6)
    best = model(bundle, result="best")(y, physics)
    residuals = ((particles - best[:, None]).flatten(2).norm(dim=2) == 0, (MASKS[:, None] * particles - y[:, None]))
    assert torch.equal(residuals[0].int().argmax(1), residuals[1].flatten(2).norm(dim=2).argmin(1))


def test_seeds_and_the_cache(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physics = p.Inpainting(img_size=(1, 4, 4), mask=MASKS[0], noise_model=p.GaussianNoise(0.1))
    y = physics.A(torch.rand(2, 1, 4, 4))
    first = model(bundle)
    one, other = first(y, physics), first(y, physics, seed=6)
    assert not torch.allclose(one, other, atol=1e-3)
    again = p.Inpainting(img_size=(1, 4, 4), mask=MASKS[0])  # another object, another noise: the same f
    changed = p.Inpainting(img_size=(1, 4, 4), mask=MASKS[1])
    no_export(monkeypatch)
    assert torch.equal(first(y, again, seed=6), other)
    assert torch.equal(model(bundle)(y, again), one)  # a new model finds it in the user's cache
    with pytest.raises(AssertionError, match="exported again"):
        first(y, changed)


def test_a_call_that_fails_leaves_no_jobs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physics = p.Inpainting(img_size=(1, 4, 4), mask=MASKS[0])
    y = physics.A(torch.rand(2, 1, 4, 4))
    solver = model(bundle)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError) as raised:
        patch.setattr(Engine, "run", lambda _: 1 / 0)
        solver(y, physics)
    assert solver._engine.tick() == 0 and raised.tb is not None  # which holds the jobs


def test_what_can_only_be_a_matrix_and_differs_between_items(bundle: Path) -> None:
    masks = MASKS.expand(2, 2, 4, 4).clone()
    physics = p.MRI(mask=masks)
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    y = physics.A(torch.cat([x, 0 * x], 1))
    both = model(bundle, result="all", steps=118)
    images = both(y, physics)
    assert images.shape == (2, 3, 2, 4, 4) and not images[:, :, 1].any()
    assert both.prepare(y, physics).operators == ["physics_0", "physics_1"]
    misfit = (physics.A(images.mean(1)) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
    swapped = (physics.A(images.mean(1).flip(0)) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
    assert (misfit < 0.12).all() and (misfit < swapped).all()


def test_a_physics_for_the_images_without_their_border(bundle: Path) -> None:
    physics = p.Inpainting(img_size=(1, 3, 3), mask=torch.ones(1, 3, 3))
    x = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(3))
    found = model(bundle, steps=60, unit=False)(2 * x.double() - 1, physics)
    assert found.shape == (1, 1, 3, 3)
    mask = torch.zeros(1, 4, 4)
    mask[:, 1:, :3] = 1
    y = torch.zeros(1, 4, 4)
    y[:, 1:, :3] = x[0]
    want = wanted_signed(y, mask)
    assert np.abs(found[0].numpy() - want[:, 1:, :3]).max() < 1e-4


def wanted_signed(y: Tensor, mask: Tensor) -> np.ndarray:
    """Mean particle for a denoised 3 x 3: y counts 9 values, where the bundle's inpainting counts 16."""
    job = make_job(NETS, particles=3, seed=5, params=Params(**{**PARAMS, "steps": 60}))
    grown = 4 / 3  # a residual larger by this makes the same loss: the mean is over 16 values, and not 9
    job = replace(job, y=(grown * (2 * y - 1) * mask).numpy(), operator_params={"mask": (grown * mask).numpy()})
    return reference(NETS, job).mean(0)


def test_wrong_input(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="result is 'median'; allowed are mean, best, all"):
        model(bundle, result="median")
    with pytest.raises(InputError, match="steps is 1"):
        model(bundle, steps=1)
    physics = p.Inpainting(img_size=(1, 4, 4), mask=MASKS[0])
    with pytest.raises(ValueError, match=r"measures \(\(\(1, 4, 4\), False\),\), and y is \(\(\(1, 4, 5\), False\),\)"):
        model(bundle)(torch.zeros(1, 1, 4, 5), physics)
    with pytest.raises(ValueError, match="Inpainting does not take images"):
        model(bundle)(torch.zeros(1, 1, 9, 9), p.Inpainting(img_size=(1, 9, 9), mask=0.5))
    monkeypatch.delitem(sys.modules, "rlsd.pipeline.deepinv")
    monkeypatch.setitem(sys.modules, "deepinv.models", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs deepinv.models: pip install 'rlsd\[deepinv\]'"):
        import rlsd.pipeline.deepinv  # noqa: F401
