"""GroupNorm+SiLU, its pull-back, epilogues and the interleave: kernels against float64 of their definitions.

Without a CUDA device the kernels run in Triton's interpreter. A result in low precision may err at most twice as much
as the plain definition in the same precision.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from norm_case import DEVICE, affine, check, double, launching_fixture, normal  # noqa: E402, F401

from rlsd.kernels import norm  # noqa: E402
from rlsd.kernels.norm import elementwise, forward, naive, pull, tiles  # noqa: E402

TYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [  # [B, H, W, C], groups
    ((2, 5, 7, 20), 2),  # groups of 10, several chunks, a last chunk that is not full
    ((1, 3, 3, 320), 32),  # three blocks of 12, 12 and 8 groups
    ((1, 1, 1, 6), 3),  # one pixel
    ((3, 1, 5, 15), 5),  # no two accesses aligned
    ((1, 9, 8, 136), 1),  # one group wider than a block
    ((1, 3, 5, 240), 3),  # groups of 80
    ((2, 4, 3, 64), 16),  # groups of 4
    ((1, 3, 2, 64), 32),  # of 2: more than a program takes would fit into a block
]


kernels = pytest.mark.usefixtures("launching")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy's


def check_forward(x, residual, weight, bias, groups, silu, tiny=2e-7, x_bias=None):
    given = (weight, bias, groups, 1e-5, silu, x_bias)
    ours = forward.group_norm(x, *given, residual)
    if residual is None:
        assert ours[3] is x
        ours, plain = ours[:3], naive.group_norm(x, *given)
    else:
        plain = naive.add_group_norm(x, residual, *given)
        assert torch.equal(ours[3], plain[3])  # one rounding, the same
    # The reference normalises what is written.
    exact = naive.group_norm(*double((x, *given) if residual is None else (plain[3], *given[:-1])))
    check(ours[:3], plain[:3], exact, tiny)
    return ours[:3]


@kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape, groups", SHAPES)
def test_group_norm(shape, groups, kind):
    for silu in (True, False):
        check_forward(normal(shape, kind, mean=0.5), None, *affine(shape[3]), groups, silu)


@kernels
@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape, groups", SHAPES[:4])
def test_group_norm_of_a_sum(shape, groups, kind):
    check_forward(normal(shape, kind), normal(shape, kind, mean=-1.0, seed=3), *affine(shape[3], kind), groups, True)


@kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape, groups", SHAPES)
def test_what_is_added_to_every_pixel_first(shape, groups, kind):
    """One row for all samples or one each, in all three kernels; the pull-back is that at the sum."""
    x, residual, cotangent = (normal(shape, kind, seed=seed) for seed in (0, 3, 4))
    weight, bias = affine(shape[3])
    for rows in {1, shape[0]}:
        x_bias = normal((rows, 1, 1, shape[3]), kind, mean=2.0, seed=5)
        # mean - x_bias is rounded once a channel, at its own size: with two values a group, that is much for their
        # deviation.
        tiny = 1e-6
        _, mean, rstd = check_forward(x, None, weight, bias, groups, True, tiny, x_bias)
        if kind != torch.bfloat16:  # the interpreter drops the bits that a GPU rounds
            check_forward(x, residual, weight, bias, groups, False, x_bias=x_bias)
        given = (cotangent, x, mean, rstd, weight, bias, groups, True, None, x_bias)
        exact = naive.group_norm_pull(*double(given))
        check([pull.group_norm_pull(*given)], [naive.group_norm_pull(*given)], [exact], tiny)
        moved = (cotangent, x.double() + x_bias, mean, rstd, weight, bias, groups, True)
        assert torch.allclose(exact, naive.group_norm_pull(*double(moved)), rtol=1e-12, atol=1e-12)


@kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape, groups", SHAPES)
def test_group_norm_pull(shape, groups, kind):
    x, cotangent, added = (normal(shape, kind, seed=seed) for seed in (4, 5, 6))
    weight, bias = affine(shape[3])
    _, mean, rstd = naive.group_norm(x, weight, bias, groups, 1e-5, True)
    for silu, other in ((True, None), (True, added), (False, added)):
        given = (cotangent, x, mean, rstd, weight, bias, groups, silu, other)
        ours, plain = pull.group_norm_pull(*given), naive.group_norm_pull(*given)
        check([ours], [plain], [naive.group_norm_pull(*double(given))])


@kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "shape, groups", [((2, 6, 8, 20), 2), ((1, 2, 2, 240), 3), ((3, 2, 10, 15), 5), ((2, 4, 4, 64), 16)]
)
def test_group_norm_pull_to_phases(shape, groups, kind):
    """The same bytes as in two passes, zeros where no pixel is."""
    x, cotangent, added = (normal(shape, kind, seed=seed) for seed in (4, 5, 6))
    weight, bias = affine(shape[3])
    row = normal((1, 1, 1, shape[3]), kind, seed=7)
    _, mean, rstd = naive.group_norm(x, weight, bias, groups, 1e-5, True, row)
    for other in (None, added):
        given = (cotangent, x, mean, rstd, weight, bias, groups, True, other, row)
        ours = pull.group_norm_pull(*given, phases=True)
        assert torch.equal(ours, elementwise.interleave_pull(pull.group_norm_pull(*given)))
        check([ours], [naive.group_norm_pull_phases(*given)], [naive.group_norm_pull_phases(*double(given))], tiny=1e-6)


@kernels
@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("groups", [4, 8])  # blocks of 64 and of 128 lanes
def test_chunks_of_many_tiles(monkeypatch, groups, steps):
    """At most 4 chunks, so that a program walks over several tiles; the last chunk and its last tile are not full."""
    monkeypatch.setattr(tiles, "CHUNKS", 4)
    monkeypatch.setattr(tiles, "STEPS", steps)
    x, channels = normal((2, 23, 29, 80 if groups == 8 else 32), mean=3.0), 80 if groups == 8 else 32
    divided = tiles.divide(2, 23 * 29, channels, groups, 4)
    assert divided.chunk >= 3 * divided.rows and (23 * 29) % divided.chunk % divided.rows
    weight, bias = affine(channels)
    _, mean, rstd = check_forward(x, normal(x.shape, seed=7), weight, bias, groups, True)
    given = (normal(x.shape, seed=8), x, mean, rstd, weight, bias, groups, True, normal(x.shape, seed=9))
    ours, plain = pull.group_norm_pull(*given), naive.group_norm_pull(*given)
    check([ours], [plain], [naive.group_norm_pull(*double(given))])
    even = [t[:, :22, :28].contiguous() for t in (given[0], x)]
    given = (*even, *given[2:8])
    assert torch.equal(
        pull.group_norm_pull(*given, phases=True), elementwise.interleave_pull(pull.group_norm_pull(*given))
    )


@kernels
def test_programs_write_their_own_channels_only(monkeypatch):
    """The first of three blocks, alone: one after the other, as in the interpreter, they would repair each other."""
    divided = tiles.divide(1, 9, 320, 32, 4)
    monkeypatch.setattr(tiles, "divide", lambda *_: replace(divided, grid=(1, *divided.grid[1:])))
    x, (weight, bias) = normal((1, 3, 3, 320)), affine(320)
    y, mean, rstd, total = forward.group_norm(x, weight, bias, 32, 1e-5, True, None, x)
    for written in (mean, rstd):
        assert written.isfinite()[:, :12].all() and written.isnan()[:, 12:].all()
    _, mean, rstd = naive.group_norm(x, weight, bias, 32, 1e-5, True)
    for written in (y, total, pull.group_norm_pull(x, x, mean, rstd, weight, bias, 32, True)):
        assert written.isfinite()[..., :120].all() and written.isnan()[..., 120:].all()


@kernels
@pytest.mark.parametrize("kind", TYPES)
def test_a_mean_far_above_the_deviation_does_not_cancel(kind):
    x = normal((1, 20, 21, 64), kind, mean=1000.0)
    given = (x, None, *affine(64), 16, False)
    _, mean, rstd = check_forward(*given, tiny=1e-6)  # a float32 near 1000 is rounded by 3e-5 deviations
    grouped = x.double().reshape(420, 16, 4)
    assert (mean - grouped.mean((0, 2))).abs().max() <= 6.2e-5  # one unit in the last place
    assert (rstd / (grouped.var((0, 2), unbiased=False) + 1e-5).rsqrt() - 1).abs().max() <= 1e-6


@kernels
def test_constant_input():
    x = torch.full((1, 6, 6, 12), 3.0, device=DEVICE)
    y, mean, rstd, _ = forward.group_norm(x, *affine(12), 3, 1e-5, False)
    assert (mean == 3).all() and torch.allclose(rstd, torch.full_like(rstd, 1e-5**-0.5), rtol=1e-6)
    assert torch.equal(y, affine(12)[1].expand_as(y))


@kernels
def test_a_sample_is_the_same_in_every_batch_and_run():
    x, cotangent = normal((3, 9, 8, 48), torch.float16), normal((3, 9, 8, 48), torch.float16, seed=1)
    weight, bias = affine(48)

    def run(samples):
        y, mean, rstd, _ = forward.group_norm(x[samples], weight, bias, 6, 1e-5, True)
        return y, mean, rstd, pull.group_norm_pull(cotangent[samples], x[samples], mean, rstd, weight, bias, 6, True)

    all_three, again, second = run(slice(0, 3)), run(slice(0, 3)), run(slice(1, 2))
    for a, b, c in zip(all_three, again, second):
        assert torch.equal(a, b) and torch.equal(a[1:2], c)


@kernels
def test_what_is_not_finite_stays_in_its_group():
    x = normal((2, 5, 5, 24))
    x[1, 2, 3, 9] = math.inf  # the second of four groups of 6
    y, mean, rstd, _ = forward.group_norm(x, *affine(24), 4, 1e-5, True)
    pulled = pull.group_norm_pull(torch.ones_like(x), x, mean, rstd, *affine(24), 4, True)
    for result in (y, pulled):
        bad = ~result.isfinite().unflatten(-1, (4, 6)).all(-1).all(2).all(1)  # [samples, groups]
        assert bad.tolist() == [[False] * 4, [False, True, False, False]]


@kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 70), (1, 1, 1, 3), (1, 9, 11, 64), (2, 7, 70)])
def test_bias_residual(shape, kind):
    x, other, bias = normal(shape, kind), normal(shape, kind, seed=1), normal(shape[-1:])
    for silu in (True, False):
        for residual in (None, other):
            given = (x, bias, residual, silu)
            ours, plain = elementwise.bias_residual(*given), naive.bias_residual(*given)
            check([ours], [plain], [naive.bias_residual(*double(given))])


@kernels
@pytest.mark.parametrize("order", ["blocks", "shuffle"])
@pytest.mark.parametrize("shape", [(2, 4, 5, 12), (1, 2, 2, 4), (1, 3, 9, 280)])
def test_interleave(shape, order):
    for kind in TYPES:
        phases = normal(shape, kind)
        image = elementwise.interleave(phases, order)
        assert torch.equal(image, naive.interleave(phases, order))
        given = (phases, order, normal((shape[3] // 4,), seed=1))
        ours, plain = elementwise.interleave(*given), naive.interleave(*given)
        check([ours], [plain], [naive.interleave(*double(given))])
        assert torch.equal(elementwise.interleave_pull(image, order), naive.interleave_pull(image, order))


# What a bundle carries


@pytest.mark.parametrize(
    "pixels, channels",
    [
        (64**2, 512), (128**2, 512), (256**2, 512), (256**2, 256), (512**2, 256), (512**2, 128),
        (64**2, 320), (64**2, 960), (32**2, 640), (32**2, 1920), (16**2, 1280), (16**2, 2560), (8**2, 1280),
    ],
)  # fmt: skip
def test_the_bundle_has_what_a_launch_at_these_shapes_wants(pixels, channels):
    divided = tiles.divide(1, pixels, channels, 32, 2)
    assert replace(divided, grid=(*divided.grid[:2], 16)) == tiles.divide(16, pixels, channels, 32, 2)
    blocks, chunks, _ = divided.grid
    assert chunks <= tiles.CHUNKS and blocks * divided.width >= channels and chunks * divided.chunk >= pixels
    assert divided.width % (channels // 32) == 0 and divided.width // (channels // 32) <= tiles.GROUPS
    carried = {kernel.name: kernel.constants for kernel in norm.KERNELS}
    names = ["group_norm_statistics", "add_group_norm_statistics", "group_norm_apply"]
    if channels in (128, 256, 512):
        names += ["group_norm_pull_sums", "group_norm_pull_apply", "group_norm_pull_phases"]
    for name in names:
        constants = carried[f"{name}_{divided.block}_fp16"]
        assert (constants["ROWS"], constants["BLOCK"], constants["ALIGN"]) == (
            divided.rows, divided.block, divided.align,
        )  # fmt: skip


COMPILE = """
from rlsd.bench.kernels.machine_code import machine_code
from rlsd.kernels.aot import compile_kernel
from rlsd.kernels.norm import KERNELS, PRECISE_KERNELS
for kernel in [*KERNELS, *PRECISE_KERNELS]:
    cubin = compile_kernel(kernel, 90)
    assert cubin.binary and cubin.shared <= 48 << 10, cubin.line
    # What memory is to bound: an H100 issues 3e13 instructions while 3e12 bytes pass, and each value is 2 to 8 of them.
    code = machine_code(kernel, 90)
    wide = sum(count for name, count in code.accesses.items() if ".128" in name)
    narrow = sum(count for name, count in code.accesses.items() if name.startswith("STG") and ".128" not in name)
    odd = kernel.name.startswith("softmax_pull_any")  # rows of any length: value by value
    least = 8 if "ROWS" in kernel.constants else 3
    assert code.spilled == 0, (kernel.name, code)
    assert odd or (wide >= least and narrow <= 2), (kernel.name, code)  # two statistics of a group
    assert code.loop is None or code.values is None or code.loop / code.values < 32, (kernel.name, code)
    print(cubin.line)
"""


def test_every_kernel_compiles_without_a_gpu():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1] for line in lines] == [kernel.name for kernel in (*norm.KERNELS, *norm.PRECISE_KERNELS)]
    assert all("BLOCK" in {word.split("=")[0] for word in line if "=" in word} for line in lines)
