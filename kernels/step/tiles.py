# mypy: disallow-untyped-defs=False
"""What the kernels share: tiles, the lanes' tables, noise, Adam.

A launch has the grid (tiles, lanes). A program works on a tile [PADDED, BLOCK] of one lane: CHANNELS rows, padded to a
power of two, of BLOCK pixels. In state order (NCHW) pixels are neighbours, in a channels-last network tensor channels
are; Triton reads and writes each the way it lies, and turns tiles in shared memory. With CHANNELS = 1 both orders are
one, and a tile is a flat piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlsd.kernels.philox import normals
from rlsd.kernels.step import lanes

AUGMENTED, MOVE_Z = tl.constexpr(lanes.AUGMENTED), tl.constexpr(lanes.MOVE_Z)
GRADIENT, PULLED = tl.constexpr(lanes.GRADIENT), tl.constexpr(lanes.PULLED)
_WHOLE, _REAL = tl.constexpr(lanes.WHOLE), tl.constexpr(lanes.REAL)
_WHOLES, _REALS = tl.constexpr(len(lanes.WHOLE)), tl.constexpr(len(lanes.REAL))


@triton.constexpr_function
def _column(names, name):
    return names.index(name)


@triton.jit
def whole(table, NAME: tl.constexpr):
    """This lane's number in the int32 table."""
    return tl.load(table + tl.program_id(1) * _WHOLES + _column(_WHOLE, NAME))


@triton.jit
def real(table, NAME: tl.constexpr):
    """This lane's number in the float32 table."""
    return tl.load(table + tl.program_id(1) * _REALS + _column(_REAL, NAME))


@triton.jit
def tile(pixels, CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets in state order and in the network's order, and which are inside: [PADDED, BLOCK] each."""
    channel = tl.arange(0, PADDED)[:, None]
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return channel * pixels + pixel, pixel * CHANNELS + channel, (channel < CHANNELS) & (pixel < pixels)


@triton.jit
def only(inside, condition):
    """The mask `inside` where a lane's condition holds, else nothing.

    `inside & condition` says the same, but Triton 3.9's interpreter makes that a mask of int32, which it then refuses.
    """
    return tl.where(condition, inside, False)


@triton.jit
def noise(table, stream, pixels, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """This lane's standard normal numbers on a tile: float32 [PADDED, BLOCK].

    A Philox block is four neighbours in state order, so pixels % 4 must be 0 where there are several channels.
    """
    four = tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    block = tl.arange(0, PADDED)[:, None] * (pixels // 4) + four
    k0, k1 = bits(whole(table, "seed_low")), bits(whole(table, "seed_high"))
    item, particle = bits(whole(table, "item")), bits(whole(table, "particle"))
    a, b, c, d = normals(block, bits(stream), particle, item, k0, k1)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (PADDED, BLOCK))


@triton.jit
def bits(number):
    """int32 -> uint32 of the same bits."""
    return number.to(tl.uint32, bitcast=True)


@triton.jit
def mix(signal, value, weight, drawn):
    """signal value + weight drawn, contracted in one way: a particle's z_t is the same from `noise_zt` and `step_z`."""
    return tl.fma(value, signal, weight * drawn)


@triton.jit
def adam(g, value, m, v, table, RATE: tl.constexpr, CORRECTION1: tl.constexpr, CORRECTION2: tl.constexpr):
    """One step of Adam (Kingma and Ba, 2015) with bias correction: the new value, m and v.

    Division and root are the rounded ones: memory bounds these kernels, so that accuracy is free.
    """
    beta1, beta2 = real(table, "beta1"), real(table, "beta2")
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    root = tl.sqrt_rn(v * real(table, CORRECTION2)) + real(table, "epsilon")
    return value - tl.div_rn(real(table, RATE) * (m * real(table, CORRECTION1)), root), m, v


@triton.jit
def spoilt(x):
    """1 where x is not finite, else 0: int32."""
    return 1 - (tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32)


@triton.jit
def raise_flag(flag, bad, inside):
    """Sets this lane's flag if `bad` is not 0 anywhere inside. Every program that writes writes 1: no atomic needed."""
    tl.store(flag + tl.program_id(1), 1, mask=tl.max(tl.where(inside, bad, 0)) > 0)
