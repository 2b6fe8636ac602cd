"""3x3 convolutions with few channels on one side: kernels against float64 of their definitions, those against torch.

Without a CUDA device the kernels run in Triton's interpreter. A result in low precision may err at most twice as much
as the plain definition in the same precision.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from norm_case import DEVICE, affine, check, double, launching_fixture, normal  # noqa: E402, F401

from rlsd.kernels import narrow  # noqa: E402
from rlsd.kernels.narrow import naive, triton_kernels  # noqa: E402

# The interpreter multiplies the bits of bfloat16 as if they were whole numbers.
TYPES = [torch.float16, torch.float32, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
kernels = pytest.mark.usefixtures("launching")
FROM_FEW = [  # B, H, W, channels, channels of the result
    (2, 5, 7, 3, 144),  # two blocks of channels, a last tile of pixels that is not full
    (1, 9, 8, 4, 16),
    (3, 1, 1, 1, 20),  # one pixel
    (1, 1, 70, 7, 128),  # two tiles of one row
]
TO_FEW = [  # B, H, W, channels, groups, planes
    (2, 5, 7, 64, 16, 3),
    (1, 12, 12, 144, 8, 4),  # a last block of channels that is not full, two tiles of pixels
    (2, 1, 1, 20, 2, 1),
    (1, 3, 50, 32, 32, 7),
]


def of_image(weight):
    """[O, I, 3, 3] -> the matrix of narrow_conv."""
    return filled(weight.permute(2, 3, 1, 0).flatten(0, 2), weight.shape[1], 0)


def of_taps(weight):
    """[P, C, 3, 3] -> the matrix of group_norm_taps."""
    return filled(weight.permute(1, 2, 3, 0).flatten(1), weight.shape[0], 1)


def filled(matrix, few, axis):
    """With rows or columns of zeros, up to the number that the kernels take."""
    shape = list(matrix.shape)
    shape[axis] = narrow.columns(few) - matrix.shape[axis]
    return torch.cat([matrix, matrix.new_zeros(shape)], axis).contiguous()


def convolved(x, weight, bias):
    """A convolution, channels first."""
    return torch.nn.functional.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("size", FROM_FEW)
def test_the_definition_from_few_channels_is_a_convolution(size):
    batch, height, width, few, many = size
    x, weight, bias = (normal(shape).double() for shape in ((batch, few, height, width), (many, few, 3, 3), (many,)))
    want = convolved(x, weight, bias).permute(0, 2, 3, 1)
    last = x.permute(0, 2, 3, 1).contiguous()
    for got in (narrow.narrow_conv(x, of_image(weight), bias, True), narrow.narrow_conv(last, of_image(weight), bias)):
        assert torch.allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("size", TO_FEW)
def test_the_definition_to_few_channels_is_a_normalisation_and_a_convolution(size, silu):
    batch, height, width, channels, groups, planes = size
    x, residual = (normal((batch, height, width, channels), seed=seed).double() for seed in (0, 1))
    row, weight = normal((batch, 1, 1, channels)).double(), normal((planes, channels, 3, 3)).double()
    scale, shift = double(affine(channels))
    bias = normal((planes,)).double()
    for added in (None, residual):
        total = x + row if added is None else x + added + row
        y = torch.nn.functional.group_norm(total.permute(0, 3, 1, 2), groups, scale, shift, 1e-5)
        want = convolved(torch.nn.functional.silu(y) if silu else y, weight, bias)
        given = (scale, shift, of_taps(weight), planes, groups, 1e-5, silu, row)
        taps, *_ = narrow.group_norm_taps(x, *given) if added is None else narrow.add_group_norm_taps(x, added, *given)
        assert torch.allclose(narrow.sum_taps(taps, bias), want, rtol=0, atol=1e-11)


@kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("size", FROM_FEW)
def test_from_few_channels(size, first, kind):
    batch, height, width, few, many = size
    x = normal((batch, few, height, width) if first else (batch, height, width, few), kind)
    weight = of_image(normal((many, few, 3, 3), kind, seed=1))
    for bias in (None, normal((many,), seed=2)):
        given = (x, weight, bias)
        ours, plain = triton_kernels.narrow_conv(*given, first), naive.narrow_conv(*given, first)
        check([ours], [plain], [naive.narrow_conv(*double(given), first)])


@kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("size", TO_FEW)
def test_to_few_channels(size, kind):
    batch, height, width, channels, groups, planes = size
    x, residual = (normal((batch, height, width, channels), kind, 0.5, seed) for seed in (0, 1))
    kernel, bias = of_taps(normal((planes, channels, 3, 3), kind, seed=2)), normal((planes,), kind, seed=3)
    norm = affine(channels)
    for silu, rows, added in ((True, 0, None), (False, batch, None), (True, 1, residual)):
        row = normal((rows, 1, 1, channels), kind, seed=4) if rows else None
        given = (*norm, kernel, planes, groups, 1e-5, silu, row)
        ours = triton_kernels.group_norm_taps(x, *given, added)
        if added is None:
            assert ours[3] is x
            plain = naive.group_norm_taps(x, *given)
            exact = naive.group_norm_taps(*double((x, *given)))
        else:
            plain = naive.add_group_norm_taps(x, added, *given)
            assert torch.equal(ours[3], plain[3])
            exact = naive.group_norm_taps(*double((plain[3], *given[:-1])))
        # y is rounded to halves both times: where float32 differs by its last bit, to the next one, in some places.
        check(ours[:3], plain[:3], exact, tiny=2e-4 if kind == torch.float16 else 1e-6)
        taps = plain[0]
        check(
            [triton_kernels.sum_taps(taps, bias)], [naive.sum_taps(taps, bias)], [naive.sum_taps(*double((taps, bias)))]
        )


@kernels
def test_a_samples_bytes_do_not_depend_on_the_others():
    x, weight, (scale, shift) = normal((3, 6, 9, 32), torch.float16), normal((2, 32, 3, 3), torch.float16), affine(32)
    given = (scale, shift, of_taps(weight), 2, 8, 1e-5, True)
    whole = triton_kernels.group_norm_taps(x, *given)[0]
    image, kernel = normal((3, 2, 6, 9), torch.float16), of_image(normal((32, 2, 3, 3), torch.float16))
    wide = triton_kernels.narrow_conv(image, kernel, None, True)
    for i in range(3):
        assert torch.equal(triton_kernels.group_norm_taps(x[i : i + 1], *given)[0], whole[i : i + 1])
        assert torch.equal(triton_kernels.narrow_conv(image[i : i + 1], kernel, None, True), wide[i : i + 1])


@kernels
def test_what_is_not_finite_reaches_its_neighbours_alone():
    """The rows of zeros behind the 27 of a kernel stand for no pixel: nothing is multiplied with them."""
    image, kernel = normal((1, 3, 6, 9)), of_image(normal((16, 3, 3, 3)))
    image[0, 1, 4, 5] = torch.inf
    y = triton_kernels.narrow_conv(image, kernel, None, True)
    spoilt = torch.zeros(1, 6, 9, 16, dtype=torch.bool)
    spoilt[:, 3:6, 4:7] = True
    assert torch.equal(~y.isfinite().cpu(), spoilt)


def test_operators_are_what_they_register():
    x, image = normal((2, 3, 2, 32), torch.float16), normal((2, 3, 4, 5), torch.float16)
    norm, kernel = affine(32), of_taps(normal((4, 32, 3, 3), torch.float16))
    ops, tests = torch.ops.rlsd, ("test_schema", "test_faketensor")
    for operator, given in (
        (ops.narrow_conv, (image, of_image(normal((16, 3, 3, 3), torch.float16)), normal((16,)), True)),
        (ops.narrow_conv, (image, of_image(normal((16, 5, 3, 3), torch.float16)))),
        (ops.group_norm_taps, (x, *norm, kernel, 4, 8, 1e-5, True)),
        (ops.add_group_norm_taps, (x, x + 1, *norm, kernel, 4, 8, 1e-5, True, x[:, :1, :1].contiguous())),
        (ops.sum_taps, (normal((2, 18, 3, 4)), normal((2,), torch.float16))),
    ):
        torch.library.opcheck(operator.default, given, test_utils=tests)


X, V, K = torch.zeros(2, 3, 2, 32), torch.zeros(32), torch.zeros(32, 32)


@pytest.mark.parametrize(
    "name, call",
    [
        ("x", lambda: narrow.narrow_conv(X[0], K)),
        ("x", lambda: narrow.narrow_conv(X[..., :3].int(), K)),
        ("x or planes", lambda: narrow.narrow_conv(X[..., :8], K)),
        ("weight", lambda: narrow.narrow_conv(X[..., :3], K[:27])),
        ("weight", lambda: narrow.narrow_conv(X[..., :4], K)),
        ("weight", lambda: narrow.narrow_conv(X[..., :3], K.half())),
        ("bias", lambda: narrow.narrow_conv(X[..., :3], K, V[:3])),
        ("weight", lambda: narrow.group_norm_taps(X, V[:3], V, K, 3, 2, 1e-5, True)),
        ("kernel", lambda: narrow.group_norm_taps(X, V, V, K[:, :27], 3, 2, 1e-5, True)),
        ("kernel", lambda: narrow.group_norm_taps(X, V, V, K, 4, 2, 1e-5, True)),
        ("x or planes", lambda: narrow.group_norm_taps(X, V, V, K, 0, 2, 1e-5, True)),
        ("x_bias", lambda: narrow.group_norm_taps(X, V, V, K, 3, 2, 1e-5, True, V)),
        ("groups", lambda: narrow.group_norm_taps(X, V, V, K, 3, 5, 1e-5, True)),
        ("residual", lambda: narrow.add_group_norm_taps(X, X[:1], V, V, K, 3, 2, 1e-5, True)),
        ("taps", lambda: narrow.sum_taps(X.half(), V)),
        ("bias", lambda: narrow.sum_taps(X, V[:2])),
        ("bias", lambda: narrow.sum_taps(normal((1, 18, 4, 4)), normal((4,))[::2])),
        ("bias", lambda: narrow.sum_taps(normal((1, 18, 4, 4)), torch.ones(2, dtype=torch.int64))),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=f"^{name}( |:)"):
        call()


COMPILE = """
from rlsd.bench.kernels.machine_code import machine_code
from rlsd.kernels.aot import compile_kernel
from rlsd.kernels.narrow import KERNELS
for kernel in KERNELS:
    cubin, code = compile_kernel(kernel, 90), machine_code(kernel, 90)
    assert cubin.binary and cubin.shared <= 96 << 10 and code.spilled == 0, (cubin.line, code)
    # What is large passes 16 bytes at a time: the result from few channels, x to few.
    wide = {name.split(".")[0]: count for name, count in code.accesses.items() if ".128" in name}
    large = {"narrow_conv": "STG", "group_norm_taps": "LDG"}.get(kernel.name.rsplit("_", 2)[0])
    assert large is None or wide[large] >= 8, (kernel.name, code)
    assert code.loop is None or code.values is None or code.loop / code.values < 20, (kernel.name, code)
    print(kernel.name)
"""


def test_every_kernel_compiles_without_a_gpu():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [kernel.name for kernel in narrow.KERNELS]
