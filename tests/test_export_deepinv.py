"""deepinv's physics as forward operators: against the physics themselves, in torch and through a bundle's graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from with_deepinv import deepinv  # isort: skip
import torch
from bundle_factory import write_bundle
from tiny import make_nets
from torch import Tensor, nn

from rlsd.engine import Engine
from rlsd.export import CheckError
from rlsd.export.deepinv import described, from_physics, scale_of
from rlsd.export.extend import extend
from rlsd.export.own import load_own
from rlsd.export.physics import IntensityOperator, Layout, MatrixOperator, PhysicsOperator, View

p = deepinv.physics
IMAGE, SIDE = (1, 16, 16), 16
BORDER = (1, 2, 3, 2)  # left, top, right, bottom: 12 x 12 remain
KERNEL = p.blur.gaussian_blur(sigma=(1.0, 1.0))
MASK = (torch.rand(SIDE, generator=torch.Generator().manual_seed(0)) > 0.5).float().expand(SIDE, SIDE).contiguous()
COILS = torch.view_as_complex(torch.randn(3, SIDE, SIDE, 2, generator=torch.Generator().manual_seed(1)))


def noisy_inpainting() -> nn.Module:
    """Its mask and its noise have random generators, which cannot be copied."""
    noise = p.GaussianNoise(0.5, rng=torch.Generator().manual_seed(3))
    return p.Inpainting(IMAGE, mask=0.6, rng=torch.Generator().manual_seed(2), noise_model=noise)


def stacked() -> nn.Module:
    return p.StackedLinearPhysics([noisy_inpainting(), p.Downsampling(img_size=IMAGE, factor=4)])


def squared() -> nn.Module:
    return p.Physics(A=lambda x, **_: x.square(), noise_model=p.PoissonNoise(0.1))


TRACED = {
    "inpainting": noisy_inpainting,
    "circular": lambda: p.Blur(filter=KERNEL, padding="circular"),
    "stacked": stacked,
    "squared": squared,
}
MATRICES = {
    "tomography": lambda: p.Tomography(angles=7, img_width=SIDE, normalize=True),
    "fan": lambda: p.Tomography(angles=5, img_width=SIDE, normalize=False, fan_beam=True),
    "mri": lambda: p.MRI(mask=MASK),
    "coils": lambda: p.MultiCoilMRI(mask=MASK, coil_maps=COILS),
}


def images(count: int = 2, shape: tuple[int, ...] = IMAGE) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(9)) * 2 - 1


def as_seen(physics: nn.Module, x: Tensor) -> Tensor:
    """What the physics takes, written out: [0, 1], and for MRI an imaginary part."""
    image = (x + 1) / 2
    return torch.cat([image, 0 * image], 1) if isinstance(physics, (p.MRI, p.MultiCoilMRI)) else image


@pytest.mark.parametrize("name", [*TRACED, *MATRICES])
def test_values_and_pull_back_are_those_of_the_physics(name: str) -> None:
    physics = (TRACED | MATRICES)[name]()
    operator = from_physics(physics, IMAGE)
    assert isinstance(operator, PhysicsOperator if name in TRACED else MatrixOperator)
    assert operator.affine == (name != "squared")
    x = images()
    want = physics.A(as_seen(physics, x))
    got = operator(x)
    assert torch.allclose(got, Layout.of(want).pack(want), atol=1e-5)
    back = operator.layout.unpack(got)
    for one, other in zip(*([y.x if hasattr(y, "x") else [y]][0] for y in (back, want)), strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, atol=1e-5)
    if name == "squared":
        return
    v = torch.randn(got.shape, generator=torch.Generator().manual_seed(8))
    (pulled,) = torch.autograd.grad(operator(x.requires_grad_(True)), x, v)
    adjoint = physics.A_adjoint(operator.layout.unpack(v))
    assert torch.allclose(pulled, adjoint[:, :1] / 2, atol=1e-4)  # of images in [-1, 1], half as long; the real part


def test_the_engine_computes_them(tmp_path: Path) -> None:
    """A matrix and an intensity through the graphs of a bundle."""
    physics = {
        "tomography": p.Tomography(angles=5, img_width=4, normalize=True),
        "phases": p.RandomPhaseRetrieval(m=40, img_size=(1, 4, 4)),
    }
    operators = {name: from_physics(each, (1, 4, 4)) for name, each in physics.items()}
    assert [type(each) for each in operators.values()] == [MatrixOperator, IntensityOperator]
    bundle = extend(write_bundle(tmp_path / "tiny", make_nets(), 2), tmp_path / "more", operators)
    x = images(3, (1, 4, 4))
    with Engine(bundle) as engine:
        for name, each in physics.items():
            image = (x + 1) / 2
            want = each.A(image.to(torch.complex64) if name == "phases" else image)
            assert np.allclose(engine.measure(name, x.numpy()), want, atol=1e-5)


def test_noise_is_left_out_and_the_physics_stays_as_it_is() -> None:
    physics = noisy_inpainting()
    state = {name: value.clone() for name, value in physics.state_dict().items()}
    operator = from_physics(physics, IMAGE)
    x = images()
    assert torch.equal(operator(x), operator(x))
    assert isinstance(physics.noise_model, p.GaussianNoise)
    assert all(torch.equal(physics.state_dict()[name], value) for name, value in state.items())


def test_the_images_convention_and_the_border() -> None:
    x = images()
    inner = x[..., 2:14, 1:13]
    assert View(unit=False)(x) is x
    assert torch.equal(View()(x), (x + 1) / 2)
    assert torch.equal(View(BORDER)(x), (inner + 1) / 2)
    assert torch.equal(View(complex=True)(x), ((x + 1) / 2).to(torch.complex64))
    mri = p.MRI(mask=MASK[:12, :12])
    for unit in (True, False):
        y = from_physics(mri, IMAGE, border=BORDER, unit=unit)(x)
        assert torch.allclose(y, mri.A(as_seen(mri, inner if unit else 2 * inner - 1)), atol=1e-5)


def test_parameters_of_an_item() -> None:
    physics = p.Blur(filter=KERNEL, padding="valid")
    operator = from_physics(physics, IMAGE, per_item=["filter"])
    assert operator.parameters_of(IMAGE) == {"filter": tuple(KERNEL.shape[1:])}
    kernels = torch.rand(2, *KERNEL.shape[1:], generator=torch.Generator().manual_seed(5))
    x = images()
    for i in range(2):
        want = physics.A((x[i : i + 1] + 1) / 2, filter=kernels[i : i + 1])
        assert torch.allclose(operator(x, filter=kernels)[i : i + 1], want, atol=1e-5)
    with pytest.raises(ValueError, match=r"no buffer \[1, ...\] of that name"):
        from_physics(physics, IMAGE, per_item=["kernel"])
    with pytest.raises(ValueError, match="so mask cannot be given per item"):
        from_physics(p.MRI(mask=MASK), IMAGE, per_item=["mask"])


@pytest.mark.parametrize("name", ["inpainting", "tomography", "phases"])
def test_scaled_to_unit_gain(name: str) -> None:
    physics = p.RandomPhaseRetrieval(m=200, img_size=IMAGE) if name == "phases" else (TRACED | MATRICES)[name]()
    plain = described(physics, IMAGE)
    operator = plain.scaled_by(scale_of(plain, IMAGE))
    x = images()
    y = plain.layout.unpack(plain(x))
    assert torch.allclose(operator.layout.pack(y), operator(x), rtol=1e-4, atol=1e-6)
    assert torch.allclose(operator.layout.unpack(operator(x)), y, rtol=1e-4, atol=1e-6)
    jacobian = torch.autograd.functional.jacobian(lambda x: operator(x).flatten(), torch.zeros(1, *IMAGE))
    matrix = jacobian.reshape(-1, SIDE * SIDE)
    gain = float(torch.linalg.matrix_norm(matrix, 2)) * (SIDE * SIDE / len(matrix)) ** 0.5
    assert abs(gain - 1) < 0.03  # the power iteration comes from below


def test_the_scale_is_exported_too() -> None:
    for physics in (p.RandomPhaseRetrieval(m=200, img_size=IMAGE), p.MRI(mask=MASK)):
        operator = from_physics(physics, IMAGE, scaled=True)
        wanted = described(physics, IMAGE).scaled_by(operator.layout.scale)
        assert operator.layout.scale != 1 and torch.allclose(operator(images()), wanted(images()), rtol=1e-3, atol=1e-4)


def test_layouts() -> None:
    real, complex_ = torch.randn(2, 3, 4), torch.randn(2, 5, dtype=torch.complex64)
    listed = deepinv.utils.TensorList([real, complex_])
    deep = torch.randn(2, 1, 1, 1, 1, 1, 3)
    shapes = [(2, 3, 4), (2, 5, 2), (2, 12 + 10), (2, 3)]
    for y, shape in zip((real, complex_, listed, deep), shapes, strict=True):
        layout = Layout.of(y)
        assert layout.pack(y).shape == shape and not layout.pack(y).is_complex()
        back = layout.unpack(layout.pack(y))
        assert type(back) is type(y)
        pairs = zip(back.x, y.x, strict=True) if y is listed else [(back, y)]
        assert all(torch.equal(one, other) for one, other in pairs)
    assert torch.equal(Layout.of(complex_).pack(complex_)[..., 1], complex_.imag)
    with pytest.raises(TypeError, match="not float"):
        Layout.of(1.0)


class Wrong(p.LinearPhysics):
    def A(self, x: Tensor, **_: object) -> Tensor:
        return x.square()

    def A_adjoint(self, y: Tensor, **_: object) -> Tensor:
        return y


class Crooked(Wrong):
    def A(self, x: Tensor, **_: object) -> Tensor:
        return 3 * x


class Spectral(p.Physics):
    def A(self, x: Tensor, **_: object) -> Tensor:
        return torch.fft.fft2(x).abs()


@pytest.mark.parametrize(
    "physics, image, error, text",
    [
        (Wrong(), IMAGE, CheckError, "says it is affine"),
        (Crooked(), IMAGE, CheckError, "A_adjoint is not the adjoint of its A: they differ by 6.7e-01"),
        (Spectral(), IMAGE, ValueError, r"Spectral cannot be traced \(.*\), and it is not linear"),
        (p.BlurFFT((1, 80, 80), KERNEL), (1, 80, 80), ValueError, "6400 values are too large for a matrix: 4096"),
        (p.MRI(mask=MASK), (1, 8, 8), ValueError, r"MRI does not take images \[1, 8, 8\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_said(
    physics: nn.Module, image: tuple[int, ...], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        from_physics(physics, image)


def test_an_adjoint_that_is_only_near_can_be_allowed() -> None:
    physics = p.Tomography(angles=7, img_width=SIDE, normalize=True, adjoint_via_backprop=False)
    operator = from_physics(physics, IMAGE, adjoint_limit=None)
    assert torch.allclose(operator(images()), physics.A((images() + 1) / 2), atol=1e-5)


FILE = """
from deepinv.physics import Tomography

def ct_scan(image):
    return Tomography(angles=4, img_width=image[-1], normalize=True)
"""


def test_a_file_may_give_a_physics(tmp_path: Path) -> None:
    file = tmp_path / "scan.py"
    file.write_text(FILE)
    name, operator = load_own(f"{file}:ct_scan", IMAGE)
    assert name == "ct_scan" and isinstance(operator, MatrixOperator)
    want = p.Tomography(angles=4, img_width=SIDE, normalize=True).A((images() + 1) / 2)
    assert torch.allclose(operator(images()), want, atol=1e-5)
