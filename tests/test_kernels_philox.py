"""kernels/philox.py and rlsd::philox_normal against the engine's random numbers and Random123's known answers."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from test_reference import KNOWN

from rlsd.engine import normal
from rlsd.kernels import naive
from rlsd.kernels.philox import normals, philox
from rlsd.kernels.step import launch, philox_normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# glibc and CUDA may differ in the last bit of a float64 logarithm, which once in 1e8 numbers shows in the float32.
ULPS = 1 if DEVICE == "cuda" else 0
ADDRESSES = [  # seed, item, particle, stream
    (0, 0, 0, 0),
    (1, 2, 3, 4),
    (5, 0, 1, 0xFFFFFFFF),
    (2**32 + 7, 3, 0, 0xFFFFFFFE),
    (2**63 + 5, 2**32 - 1, 2**31 + 3, 0x80000000),
    (2**64 - 1, 2**31, 2**32 - 1, 0x80000000 + 998),
    (16, 1, 1, 1),
]


def signed(words):
    """int32 [*] of the same bits."""
    return torch.tensor(np.array(words, np.uint32).view(np.int32), device=DEVICE)


@triton.jit
def philox_kernel(words, out):
    w = tl.arange(0, 4) * 0
    c0, c1, c2, c3 = tl.load(words + w), tl.load(words + 1 + w), tl.load(words + 2 + w), tl.load(words + 3 + w)
    k0, k1 = tl.load(words + 4 + w), tl.load(words + 5 + w)
    a, b, c, d = philox(
        c0.to(tl.uint32, bitcast=True), c1.to(tl.uint32, bitcast=True), c2.to(tl.uint32, bitcast=True),
        c3.to(tl.uint32, bitcast=True), k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True),
    )  # fmt: skip
    e = tl.arange(0, 4)
    bits = tl.where(e == 0, a, tl.where(e == 1, b, tl.where(e == 2, c, d)))
    tl.store(out + e, bits.to(tl.int32, bitcast=True))


@triton.jit
def normals_kernel(address, out, LANES: tl.constexpr):
    """Block `lane` of LANES different addresses at once: address int32 [5, LANES], out fp32 [LANES, 4]."""
    lane = tl.arange(0, LANES)
    k0 = tl.load(address + lane).to(tl.uint32, bitcast=True)
    k1 = tl.load(address + LANES + lane).to(tl.uint32, bitcast=True)
    item = tl.load(address + 2 * LANES + lane).to(tl.uint32, bitcast=True)
    particle = tl.load(address + 3 * LANES + lane).to(tl.uint32, bitcast=True)
    stream = tl.load(address + 4 * LANES + lane).to(tl.uint32, bitcast=True)
    a, b, c, d = normals(lane, stream, particle, item, k0, k1)
    tl.store(out + lane * 4, a)
    tl.store(out + lane * 4 + 1, b)
    tl.store(out + lane * 4 + 2, c)
    tl.store(out + lane * 4 + 3, d)


@pytest.mark.parametrize("counter, key, wanted", KNOWN)
def test_known_answers(counter, key, wanted):
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    philox_kernel[(1,)](signed(counter + key), out)
    assert out.cpu().numpy().view(np.uint32).tolist() == wanted
    plain = naive.philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert [int(word) for word in plain] == wanted


def test_one_call_for_many_addresses():
    lanes = [*ADDRESSES, (3, 3, 3, 3)]
    words = [[seed & 0xFFFFFFFF, seed >> 32, item, particle, stream] for seed, item, particle, stream in lanes]
    out = torch.full((len(lanes), 4), torch.nan, device=DEVICE)
    normals_kernel[(1,)](signed(np.array(words).T.copy()), out, LANES=len(lanes))
    wanted = np.stack([normal(*address, 4 * len(lanes))[4 * lane :][:4] for lane, address in enumerate(lanes)])
    np.testing.assert_array_max_ulp(out.cpu().numpy(), wanted, maxulp=ULPS)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("count", [1, 3, 513, 2050])
def test_the_kernel_draws_the_engines_numbers(address, count):
    seed, item, particle, stream = address
    out = torch.full((count,), torch.nan, device=DEVICE)
    launch.normal(out, seed, item, particle, stream)
    np.testing.assert_array_max_ulp(out.cpu().numpy(), normal(*address, count), maxulp=ULPS)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("count", [0, 1, 2, 5, 4099])
def test_the_operator_draws_the_engines_numbers(address, count):
    for device in {"cpu", DEVICE}:
        drawn = philox_normal(*address, count, device)
        assert drawn.dtype == torch.float32 and drawn.device.type == device
        np.testing.assert_array_max_ulp(drawn.cpu().numpy(), normal(*address, count), maxulp=ULPS)


def test_the_operator_is_one():
    torch.library.opcheck(torch.ops.rlsd.philox_normal.default, (-5, 1, 2, 2**32 - 1, 7, torch.device(DEVICE)))


@pytest.mark.parametrize(
    "name, bad",
    [("seed", -1), ("seed", 2**64), ("item", 2**32), ("particle", -1), ("stream", 2**32), ("count", -1)],
)
def test_what_is_out_of_range_is_named(name, bad):
    with pytest.raises(ValueError, match=f"{name} is {bad}"):
        philox_normal(**{**{"seed": 0, "item": 0, "particle": 0, "stream": 0, "count": 4}, name: bad})
