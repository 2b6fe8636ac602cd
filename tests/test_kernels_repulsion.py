"""Repulsion by the Triton kernels (in interpreter mode without a GPU) against the plain definition in float64."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsd.engine import native, reference
from rlsd.kernels.repulsion import KERNELS, launch, median_bandwidth, naive, ops, rbf, repulsion

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from rows that are computed and not kept


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Every tensor that torch leaves uninitialised holds NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["small", "large"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way of small jobs, and that of large jobs for small ones too (the interpreter is slow)."""
    if request.param == "large":
        monkeypatch.setattr(launch, "SIZES", [dataclasses.replace(launch.SIZES[0], n=0)])
    return request.param


def addresses(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """offsets, seeds, items, steps for jobs of those sizes."""
    jobs = torch.arange(len(sizes), device=DEVICE)
    offsets = torch.tensor([0, *sizes], device=DEVICE).cumsum(0).int()
    return offsets, -5 - jobs * 2**33, jobs + 3, 2 * jobs + 1


def kernels(phi: Tensor, sizes: tuple[int, ...], scratch: int = ops.SCRATCH) -> tuple[Tensor, Tensor]:
    return launch.repulsion(phi, *addresses(sizes), max(sizes), scratch)


def compare(phi: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The kernels' result, which errs at most twice as much as the plain definition in float32."""
    exact = naive.repulsion(phi.double(), *addresses(sizes))
    plain = naive.repulsion(phi.float(), *addresses(sizes))
    result = kernels(phi, sizes)
    for ours, low, high in zip(result, plain, exact):
        scale = high.abs().max() + 1e-30
        error, allowed = ((value - high).abs().max() / scale for value in (ours, low))
        assert ours.dtype == torch.float32 and error <= 2 * allowed + 3e-7, (float(error), float(allowed))
    return result


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("sizes, D", [((4,), 384), ((1, 4, 3, 2), 133), ((2,), 1), ((1,), 5), ((5, 16, 1), 70)])
def test_jobs(sizes: tuple[int, ...], D: int, half: bool) -> None:
    compare(torch.randn(sum(sizes), D, device=DEVICE, dtype=torch.float16 if half else torch.float32), sizes)


@pytest.mark.parametrize("sizes, D", [((20, 3), 37), ((64,), 3)])
def test_jobs_of_several_tiles(sizes: tuple[int, ...], D: int) -> None:
    compare(torch.randn(sum(sizes), D, device=DEVICE), sizes)


@pytest.mark.parametrize("path", ["large"], indirect=True)
def test_one_strip_and_many(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "STRIP", 16)
    monkeypatch.setattr(launch, "_large_split", lambda D, tiles: (2, 32))
    sizes = (18, 1)
    phi = torch.randn(sum(sizes), 40, device=DEVICE)
    whole, strips = compare(phi, sizes), kernels(phi, sizes, scratch=1)
    assert all(torch.equal(a, b) for a, b in zip(whole, strips))


@pytest.mark.parametrize("path", ["large"], indirect=True)
def test_a_row_in_several_parts(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ROW", 16)
    compare(torch.randn(41, 5, device=DEVICE), (37, 4))


@pytest.mark.parametrize("n, rows", [(4, 0), (16, 0), (64, 0), (65, 96), (96, 96), (200, 64)])
def test_launches_and_scratch(monkeypatch: pytest.MonkeyPatch, n: int, rows: int) -> None:
    """Two launches up to 64 particles; beyond, three for each strip of rows that fits into the scratch."""
    seen: list = []
    for name in ("distances", "crowd", "bandwidths", "gradient"):
        kernel = functools.partial(lambda name, *arguments, **_: seen.append((name, arguments)), name)
        monkeypatch.setattr(launch, name, collections.defaultdict(lambda kernel=kernel: kernel))
    tiles = -(-n // 16)
    strip = rows * tiles * 16 * launch._large_split(16384, tiles)[0]
    launch.repulsion(torch.zeros(n, 16384), *addresses((n,)), n, 4 * strip)
    expected = ["distances", "bandwidths", "gradient"] * -(-n // rows) if rows else ["distances", "crowd"]
    assert [name for name, _ in seen] == expected
    assert all(arguments[2].numel() == strip for name, arguments in seen if rows and name == "distances")


@pytest.mark.parametrize("sizes", [(4, 3, 2), (17,)])
def test_coincident_particles(path: str, sizes: tuple[int, ...]) -> None:
    phi = torch.randn(sum(sizes), 11, device=DEVICE)
    phi[1] = phi[0]
    phi[2] = phi[0] * (1 + 1e-7)  # closer than 1e-6 of the scale
    phi[-1] = phi[-2]
    R, _ = compare(phi, sizes)
    assert (R[1] - R[0]).norm() > 0.01 * R[0].norm() > 0


def test_all_particles_are_zero(path: str) -> None:
    phi = torch.zeros(3, 300, device=DEVICE)  # longer than a cut, longer than a block of random numbers
    assert compare(phi, (3,))[0].norm(dim=1).min() > 1e-3


def test_particles_that_are_close_and_far_from_the_origin(path: str) -> None:
    """Where the Gram form would lose every digit."""
    phi = 1000 + 1e-3 * torch.randn(5, 24, device=DEVICE)
    compare(phi, (5,))
    exact = naive.squared_distances(phi.double())
    assert (launch.squared_distances(phi) - exact).abs().max() < 1e-6 * exact.max()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 17])
def test_median_is_the_lower_middle(path: str, n: int) -> None:
    """Distances are whole numbers, some of them several times: the bandwidth is right to rounding, or off by far."""
    phi = torch.randperm(n).to(DEVICE).float().square()[:, None]
    h = kernels(phi, (n,))[1]
    exact = naive.repulsion(phi.double(), *addresses((n,)))[1]
    assert torch.allclose(h.double(), exact, rtol=1e-6, atol=0)


def test_a_job_does_not_depend_on_its_neighbours() -> None:
    sizes = (3, 4, 2)
    phi = torch.randn(9, 140, device=DEVICE)
    offsets, *rest = addresses(sizes)
    together = launch.repulsion(phi, offsets, *rest, 4, ops.SCRATCH)
    again = launch.repulsion(phi, offsets, *rest, 4, ops.SCRATCH)
    assert all(torch.equal(a, b) for a, b in zip(together, again))
    alone = launch.repulsion(phi[3:7], offsets[1:3] - 3, *(v[1:2] for v in rest), 4, ops.SCRATCH)
    assert torch.equal(alone[0], together[0][3:7]) and torch.equal(alone[1], together[1][3:7])


def test_what_is_not_a_number_stays_in_its_job(path: str) -> None:
    sizes, n = (3, 4), 3
    phi = torch.randn(7, 9, device=DEVICE)
    phi[1, 2] = float("nan")
    R = kernels(phi, sizes)[0]
    assert not R[:n].any() and not native.repulsion(phi[:n].cpu().numpy())[0].any()
    assert torch.allclose(R, naive.repulsion(phi, *addresses(sizes))[0], rtol=1e-4) and R[n:].any()


def test_rows_may_be_strided() -> None:
    wide = torch.full((5, 60), float("nan"), device=DEVICE)
    wide[:, 7:47] = torch.randn(5, 40, device=DEVICE)
    phi = wide[:, 7:47]
    assert all(torch.equal(a, b) for a, b in zip(kernels(phi, (5,)), kernels(phi.contiguous(), (5,))))


@pytest.mark.parametrize("n, D", [(1, 1), (5, 40), (17, 130), (64, 3)])
def test_building_blocks(n: int, D: int) -> None:
    x, weights = torch.randn(n, D, device=DEVICE) + 50, torch.randn(n, n, device=DEVICE)
    for name, arguments in (("squared_distances", (x,)), ("weighted_differences", (weights, x))):
        exact = getattr(naive, name)(*(argument.double() for argument in arguments))
        ours, plain = (getattr(room, name)(*arguments) for room in (launch, naive))
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 3e-7 * exact.abs().max()


@pytest.mark.parametrize("n, D, ties", [(1, 3, 0), (2, 5, 0), (5, 40, 0), (9, 6, 3), (70, 8, 2)])
def test_plain_definition_is_the_engines(n: int, D: int, ties: int) -> None:
    phi = torch.randn(n, D)
    phi[1 : 1 + ties] = phi[0]
    R, h = naive.crowd(phi.double(), 12, 3, 4)
    assert np.allclose(R, reference.repulsion(phi.double().numpy(), 12, 3, 4), rtol=1e-11, atol=1e-13)
    core = native.repulsion(phi.numpy(), 12, 3, 4)
    assert np.allclose(R, core[0], rtol=1e-4, atol=1e-6) and np.allclose(h, core[1], rtol=1e-5)


def test_operators_and_gradients() -> None:
    x, weights = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((5, 3), (5, 5)))
    torch.library.opcheck(ops.squared_distances, (x,))
    torch.library.opcheck(ops.weighted_differences, (weights, x))
    torch.library.opcheck(ops._repulsion, (torch.randn(5, 3), *(v.cpu() for v in addresses((3, 2))), 3, 1000))
    torch.autograd.gradcheck(ops.squared_distances, (x,))
    torch.autograd.gradcheck(ops.weighted_differences, (weights, x))
    torch.autograd.gradgradcheck(ops.squared_distances, (x,))
    torch.autograd.gradcheck(lambda x: rbf(x, 0.7), (x,))
    torch.autograd.gradcheck(lambda x: rbf(x, torch.tensor([0.5, 1, 2, 3, 4])), (x,))


def test_rbf() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    K, gradient = rbf(x)
    h = np.sort([(x[i] - x[j]).square().sum().item() for i in range(6) for j in range(i)])[7] / np.log(5)
    assert np.isclose(float(median_bandwidth(ops.squared_distances(x.detach()))), h)
    assert torch.allclose(K, (-(torch.cdist(x, x) ** 2) / h).exp())
    for i in range(6):  # x_i itself held still
        of_others = torch.autograd.grad((-(x[i].detach() - x).square().sum(1) / h).exp().sum(), x)[0]
        assert torch.allclose(gradient[i], of_others.sum(0))


def test_svgd_finds_a_gaussian() -> None:
    mean, precision = torch.tensor([1.0, -2.0]), torch.linalg.inv(torch.tensor([[1.0, 0.3], [0.3, 0.5]]))
    x = torch.randn(100, 2)
    for _ in range(500):
        K, gradient = rbf(x)
        x = x + 0.5 * (K @ ((mean - x) @ precision) + gradient) / len(x)
    assert (x.mean(0) - mean).abs().max() < 0.05
    assert (x.T.cov() - torch.linalg.inv(precision)).abs().max() < 0.15


def test_defaults_are_one_job() -> None:
    phi = torch.randn(5, 7, device=DEVICE)
    phi[1] = phi[0]
    R, h = repulsion(phi, seeds=7, items=2, steps=1)
    exact = naive.crowd(phi.double(), 7, 2, 1)
    assert torch.allclose(R.double(), exact[0], rtol=1e-4, atol=1e-6) and torch.allclose(h.double(), exact[1])
    assert repulsion(phi.half())[0].dtype == torch.float32


@pytest.mark.parametrize(
    "change, kind, words",
    [
        (dict(phi=torch.zeros(4, 2, dtype=torch.float64)), TypeError, "phi is float64"),
        (dict(phi=torch.zeros(4)), ValueError, r"phi is float32 \[4\]"),
        (dict(offsets=torch.tensor([0, 4])), ValueError, "offsets is int64"),
        (dict(seeds=torch.zeros(3, dtype=torch.int64)), ValueError, r"seeds is int64 \[3\].*\[2\]"),
        (dict(largest=0), ValueError, "largest of 0"),
        (dict(largest=10**6 + 1), ValueError, "largest of 1000001"),  # ranks are counted in 20 bits
        (dict(largest=None), ValueError, "largest is missing"),
    ],
)
def test_bad_input(change: dict, kind: type[Exception], words: str) -> None:
    arguments = dict(phi=torch.zeros(4, 2), offsets=torch.tensor([0, 1, 4], dtype=torch.int32), largest=3)
    with pytest.raises(kind, match=words):
        repulsion(**(arguments | change))
    with pytest.raises(ValueError, match="weights is float32"):
        ops.weighted_differences(torch.zeros(2, 3), torch.zeros(3, 1))


def test_kernels_compile_for_sm_90() -> None:
    code = """if True:
    from rlsd.kernels import aot, repulsion
    from rlsd.kernels.repulsion.gradient import differences
    given = {"x": "*fp32", "weights": "*fp32", "out": "*fp32", "n": "i32", "D": "i32", "stride": "i32", "width": "i32"}
    apart = aot.Kernel("differences", differences, given, {"BI": 32, "BD": 64})  # in no bundle, but in an operator
    print([aot.compile_kernel(kernel, 90).shared for kernel in [*repulsion.KERNELS, apart]])"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)
    assert len(shared) == len(KERNELS) + 1 == 8 and max(shared) <= 48 * 1024
