"""LPIPS on random weights of the true layout, against torch's own operators in float64; and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from rlsd.pipeline.errors import InputError
from rlsd.pipeline.lpips import Lpips, load_lpips

RNG = np.random.default_rng(0)
SHAPES = {
    "features.0": (64, 3, 11, 11), "features.3": (192, 64, 5, 5), "features.6": (384, 192, 3, 3),
    "features.8": (256, 384, 3, 3), "features.10": (256, 256, 3, 3),
}  # fmt: skip
HEADS = (64, 192, 384, 256, 256)


@pytest.fixture(scope="module")
def weights():
    found = {}
    for name, shape in SHAPES.items():
        found[f"{name}.weight"] = (RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        found[f"{name}.bias"] = (0.1 * RNG.normal(size=shape[0])).astype(np.float32)
    for i, channels in enumerate(HEADS):
        found[f"lin{i}.model.1.weight"] = RNG.uniform(0, 1, (1, channels, 1, 1)).astype(np.float32)
    return found


def wanted(weights, image, truth):
    """As the authors define it, with torch's convolution and pooling in float64; images [3, H, W]."""
    torch = pytest.importorskip("torch")
    relu, pool = torch.nn.functional.relu, torch.nn.functional.max_pool2d
    w = {name: torch.from_numpy(value).double() for name, value in weights.items()}
    shift = torch.tensor([-0.030, -0.088, -0.188]).double()[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450]).double()[:, None, None]

    def layers(x):
        def step(x, name, **options):
            return relu(torch.nn.functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options))

        x = step((torch.from_numpy(x).double()[None] - shift) / scale, "features.0", stride=4, padding=2)
        yield x
        x = step(pool(x, 3, 2), "features.3", padding=2)
        yield x
        x = step(pool(x, 3, 2), "features.6", padding=1)
        yield x
        for name in ("features.8", "features.10"):
            x = step(x, name, padding=1)
            yield x

    total = 0.0
    for i, (a, b) in enumerate(zip(layers(image), layers(truth))):
        a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
        total += float(((a - b).square() * w[f"lin{i}.model.1.weight"]).sum(1).mean())
    return total


def pair(*shape):
    truth = RNG.uniform(-1, 1, shape).astype(np.float32)
    return np.clip(truth + 0.3 * RNG.normal(size=shape), -1, 1).astype(np.float32), truth


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 71, 130)])
def test_agrees_with_the_definition(weights, shape):
    image, truth = pair(*shape)
    lpips = Lpips(weights)
    found = lpips.distance(image, lpips.to(truth))
    assert found > 0.01 and found == pytest.approx(wanted(weights, image, truth), rel=1e-4)
    assert lpips.distance(truth, lpips.to(truth)) == 0
    assert lpips.distance(image, lpips.to(image * 0.99)) < found


def test_small_gray_images_are_enlarged(weights):
    image, truth = pair(1, 28, 30)
    lpips = Lpips(weights)
    large = [x.repeat(3, 0).repeat(3, 1).repeat(3, 2) for x in (image, truth)]
    assert lpips.distance(image, lpips.to(truth)) == pytest.approx(wanted(weights, *large), rel=1e-4)
    outside = lpips.distance(3 * image, lpips.to(truth))
    assert outside == lpips.distance(np.clip(3 * image, -1, 1), lpips.to(truth))


def test_weights_from_one_file_or_several(weights, tmp_path):
    save = pytest.importorskip("safetensors.numpy").save_file
    save(weights, tmp_path / "all.safetensors")
    folder = tmp_path / "parts"
    folder.mkdir()
    save({name: value for name, value in weights.items() if name.startswith("lin")}, folder / "alex.safetensors")
    with pytest.raises(InputError, match=r"parts: there is no weight 'features.0.weight'"):
        load_lpips(folder)
    save({name: value for name, value in weights.items() if name.startswith("f")}, folder / "alexnet.safetensors")
    image, truth = pair(3, 64, 64)
    one, two = (load_lpips(path) for path in (tmp_path / "all.safetensors", folder))
    assert one.distance(image, one.to(truth)) == two.distance(image, two.to(truth))


@pytest.mark.parametrize(
    "spoil, why", [("shape", r"is \[1, 2\]"), ("nan", "finite values"), ("gone", "there is no weight")]
)
def test_weights_that_do_not_fit(weights, spoil, why):
    name, wrong = "lin3.model.1.weight", dict(weights)
    if spoil == "shape":
        wrong[name] = np.zeros((1, 2), np.float32)
    elif spoil == "nan":
        wrong[name] = weights[name] * np.nan
    else:
        del wrong[name]
    with pytest.raises(InputError, match=why):
        Lpips(wrong)


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"pickle?" * 9)
    for path, why in ((tmp_path / "no", "is wanted"), (tmp_path / "x.safetensors", "cannot be read as safetensors")):
        with pytest.raises(InputError, match=why):
            load_lpips(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder with some"):
        load_lpips(tmp_path / "empty")
