# mypy: disallow-untyped-defs=False
"""The kernels between the networks; plain definitions in naive.py, columns of the tables `whole`, `real` in lanes.py.

State is updated in place. Two threads may own one element where it is read and where it is written, so that a barrier
keeps a program's loads before its first store.

`step_z` reads this step's eps instead of drawing it again: 8 bytes, against 35 float64 instructions a number. For a
latent of 16384 both take 0.04 us on an H100 (64 float64 units a processor, 3.35 TB/s), but 1 us and 0.1 us where a
processor has two float64 units (RTX 4090).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlsd.kernels.philox import normals
from rlsd.kernels.step import tiles
from rlsd.kernels.step.tiles import AUGMENTED, GRADIENT, MOVE_Z, PULLED, bits, only


@triton.jit
def noise_zt_kernel(
    whole, real, z, eps, z_t, z_network, pixels, CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """naive.noise_zt. z [S, M] fp32; eps [B, M] fp32; z_t, z_network [B, M], the networks'."""
    ours, theirs, inside = tiles.tile(pixels, CHANNELS, PADDED, BLOCK)
    size, lane = pixels * CHANNELS, tl.program_id(1).to(tl.int64)
    slot = tiles.whole(whole, "slot")
    live = slot >= 0
    value = tl.load(z + slot.to(tl.int64) * size + ours, mask=only(inside, live), other=0.0)
    drawn = tl.where(live, tiles.noise(whole, tiles.whole(whole, "step"), pixels, PADDED, BLOCK), 0.0)
    mixed = tl.where(live, tiles.mix(tiles.real(real, "signal"), value, tiles.real(real, "noise"), drawn), 0.0)
    tl.store(eps + lane * size + ours, drawn, mask=inside)
    tl.store(z_t + lane * size + theirs, mixed.to(z_t.dtype.element_ty), mask=inside)
    tl.store(z_network + lane * size + theirs, value.to(z_network.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_z(whole, real, eps, eps_theta, null, cotangent, repulsion, size, ours, theirs, mask):
    """What z descends along: [PADDED, BLOCK]."""
    lane, row = tl.program_id(1).to(tl.int64), tiles.whole(whole, "repulsion_row")
    guidance = tiles.real(real, "guidance")
    drawn = tl.load(eps + lane * size + ours, mask=mask, other=0.0)
    predicted = tl.load(eps_theta + lane * size + theirs, mask=mask, other=0.0).to(tl.float32)
    free = tl.load(null + lane * size + theirs, mask=only(mask, guidance != 1), other=0.0).to(tl.float32)
    predicted = tl.where(guidance != 1, free + guidance * (predicted - free), predicted)
    pulled = tl.load(cotangent + lane * size + theirs, mask=mask, other=0.0).to(tl.float32)
    apart = tl.load(repulsion + row.to(tl.int64) * size + ours, mask=only(mask, row >= 0), other=0.0)
    g = tiles.real(real, "unscale") * pulled + tiles.real(real, "score") * (predicted - drawn)
    return g - tl.where(row >= 0, tiles.real(real, "repulsion") * apart, 0.0)


@triton.jit
def step_z_kernel(
    whole, real, z, m, v, eps, eps_theta, null, cotangent, repulsion, z_t, z_network, flag, pixels,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """naive.step_z. z, m, v [S, M] fp32; eps [B, M] fp32, replaced by the next; repulsion [*, M] fp32; flag [B] int32.

    eps_theta, null, cotangent, z_t, z_network: [B, M], the networks'. null and repulsion are not read in lanes without
    guidance and repulsion_row: any pointer will do.
    """
    ours, theirs, inside = tiles.tile(pixels, CHANNELS, PADDED, BLOCK)
    size, lane = pixels * CHANNELS, tl.program_id(1).to(tl.int64)
    slot = tiles.whole(whole, "slot")
    live = slot >= 0
    moves = live & (tiles.whole(whole, "mode") & MOVE_Z != 0)
    state, mask = slot.to(tl.int64) * size + ours, only(inside, moves)
    old = tl.load(z + state, mask=only(inside, live), other=0.0)
    old_m, old_v = tl.load(m + state, mask=mask, other=0.0), tl.load(v + state, mask=mask, other=0.0)
    g = _gradient_z(whole, real, eps, eps_theta, null, cotangent, repulsion, size, ours, theirs, mask)
    tl.debug_barrier()
    new, new_m, new_v = tiles.adam(g, old, old_m, old_v, real, "rate_z", "correction1_z", "correction2_z")
    tl.store(z + state, new, mask=mask)
    tl.store(m + state, new_m, mask=mask)
    tl.store(v + state, new_v, mask=mask)
    value = tl.where(moves, new, old)
    drawn = tl.where(live, tiles.noise(whole, tiles.whole(whole, "step") + 1, pixels, PADDED, BLOCK), 0.0)
    tl.store(eps + lane * size + ours, drawn, mask=inside)
    signal, weight = tiles.real(real, "next_signal"), tiles.real(real, "next_noise")
    mixed = tl.where(live, tiles.mix(signal, value, weight, drawn), 0.0)
    mixed, value = mixed.to(z_t.dtype.element_ty), value.to(z_network.dtype.element_ty)
    tl.store(z_t + lane * size + theirs, mixed, mask=inside)
    tl.store(z_network + lane * size + theirs, value, mask=inside)
    bad = tiles.spoilt(mixed) | tiles.spoilt(value) | tl.where(moves, tiles.spoilt(new_v), 0)
    tiles.raise_flag(flag, bad, inside)


@triton.jit
def step_x_kernel(
    whole, real, x, m, v, gradient, image, image_cotangent, image_scale, x_operator, cotangent, flag, pixels,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """naive.step_x. x, m, v [S, P] fp32; gradient, x_operator [B, P], the operator's, in state order; flag [B] int32.

    image, image_cotangent, cotangent: [B, P], the networks'. image_scale: fp32 [B]. image_cotangent and image_scale are
    not read in lanes without PULLED.
    """
    ours, theirs, inside = tiles.tile(pixels, CHANNELS, PADDED, BLOCK)
    size, lane = pixels * CHANNELS, tl.program_id(1).to(tl.int64)
    slot, mode = tiles.whole(whole, "slot"), tiles.whole(whole, "mode")
    live = slot >= 0
    augmented, counts = live & (mode & AUGMENTED != 0), live & (mode & GRADIENT != 0)
    moves = augmented & counts
    state, mask = slot.to(tl.int64) * size + ours, only(inside, moves)
    decoded = tl.load(image + lane * size + theirs, mask=only(inside, live), other=0.0).to(tl.float32)
    old = tl.load(x + state, mask=only(inside, augmented), other=0.0)
    old_m, old_v = tl.load(m + state, mask=mask, other=0.0), tl.load(v + state, mask=mask, other=0.0)
    g = tl.load(gradient + lane * size + ours, mask=only(inside, counts), other=0.0).to(tl.float32)
    pulled = live & (mode & PULLED != 0)
    seen = tl.load(image_cotangent + lane * size + theirs, mask=only(inside, pulled), other=0.0).to(tl.float32)
    seen *= tl.load(image_scale + lane, mask=pulled, other=0.0)
    tl.debug_barrier()
    slope = g + tiles.real(real, "rho") * (old - decoded)
    new, new_m, new_v = tiles.adam(slope, old, old_m, old_v, real, "rate_x", "correction1_x", "correction2_x")
    tl.store(x + state, new, mask=mask)
    tl.store(m + state, new_m, mask=mask)
    tl.store(v + state, new_v, mask=mask)
    value = tl.where(moves, new, tl.where(augmented, old, decoded))
    tl.store(x_operator + lane * size + ours, value.to(x_operator.dtype.element_ty), mask=inside)
    pull = tl.where(live, tiles.real(real, "cotangent") * tl.where(augmented, decoded - value, g), 0.0) + seen
    pull = pull.to(cotangent.dtype.element_ty)
    tl.store(cotangent + lane * size + theirs, pull, mask=inside)
    # A D(z) that is not finite shows: in the cotangent where there is x, else as the value.
    tiles.raise_flag(flag, tiles.spoilt(value) | tl.where(moves, tiles.spoilt(new_v), 0), inside)
    tiles.raise_flag(flag, tiles.spoilt(pull), inside)


@triton.jit
def operator_input_kernel(
    whole, x, image, x_operator, pixels, CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """naive.operator_input. x [S, P] fp32; image [B, P], the networks'; x_operator [B, P] in state order."""
    ours, theirs, inside = tiles.tile(pixels, CHANNELS, PADDED, BLOCK)
    size, lane = pixels * CHANNELS, tl.program_id(1).to(tl.int64)
    slot = tiles.whole(whole, "slot")
    live = slot >= 0
    augmented = live & (tiles.whole(whole, "mode") & AUGMENTED != 0)
    value = tl.load(x + slot.to(tl.int64) * size + ours, mask=only(inside, augmented), other=0.0)
    decoded = tl.load(image + lane * size + theirs, mask=only(inside, live & (augmented == 0)), other=0.0)
    value = tl.where(augmented, value, decoded.to(tl.float32))
    tl.store(x_operator + lane * size + ours, value.to(x_operator.dtype.element_ty), mask=inside)


@triton.jit
def gather_features_kernel(whole, phi, rows, D, stride, BLOCK: tl.constexpr):
    """naive.gather_features. phi [B, D], the networks'; rows [*, stride] fp32. Grid (stride / BLOCK, B)."""
    column, lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    row = tiles.whole(whole, "feature_row")
    value = tl.load(phi + lane * D + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(rows + row.to(tl.int64) * stride + column, value, mask=only(column < stride, row >= 0))


@triton.jit
def spread_repulsion_kernel(whole, real, repulsion, phi_cotangent, image_scale, D, stride, level, BLOCK: tl.constexpr):
    """naive.spread_repulsion. repulsion [*, stride] fp32; phi_cotangent [B, D]; image_scale fp32 [B]. Grid (1, B)."""
    lane, row = tl.program_id(1).to(tl.int64), tiles.whole(whole, "feature_row")
    ours = repulsion + row.to(tl.int64) * stride
    squares = tl.zeros([BLOCK], tl.float32)
    for at in range(0, D, BLOCK):
        column = at + tl.arange(0, BLOCK)
        value = tl.load(ours + column, mask=only(column < D, row >= 0), other=0.0)
        squares += value * value
    rms = tl.sqrt(tl.sum(squares) / D)
    factor = tl.where(rms > 0, level / rms, 0.0)
    for at in range(0, D, BLOCK):
        column = at + tl.arange(0, BLOCK)
        value = tl.load(ours + column, mask=only(column < D, row >= 0), other=0.0) * factor
        tl.store(phi_cotangent + lane * D + column, value.to(phi_cotangent.dtype.element_ty), mask=column < D)
    scale = -tiles.real(real, "repulsion") * (rms / level) / tiles.real(real, "unscale")
    tl.store(image_scale + lane, tl.where(rms > 0, scale, 0.0))


@triton.jit(do_not_specialize=["stream"])
def start_kernel(whole, value, m, v, stream, size, BLOCK: tl.constexpr):
    """naive.start. value, m, v: [S, size] fp32. stream: int32, by its bits."""
    ours, _, inside = tiles.tile(size, 1, 1, BLOCK)
    slot = tiles.whole(whole, "slot")
    state, mask = slot.to(tl.int64) * size + ours, only(inside, slot >= 0)
    drawn = tiles.noise(whole, stream, size, 1, BLOCK)
    tl.store(value + state, drawn, mask=mask)
    tl.store(m + state, drawn * 0, mask=mask)
    tl.store(v + state, drawn * 0, mask=mask)


@triton.jit(do_not_specialize=["k0", "k1", "item", "particle", "stream"])
def normal_kernel(out, k0, k1, item, particle, stream, count, BLOCK: tl.constexpr):
    """naive.normal at one address, whose numbers are int32 by their bits. out: fp32 [count]."""
    four = tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    a, b, c, d = normals(four, bits(stream), bits(particle), bits(item), bits(k0), bits(k1))
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,)), mask=place < count)
