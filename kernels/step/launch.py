"""Launchers: the kernels on torch tensors.

State z, m, v [S, M] and x, m, v [S, P]: float32, contiguous, NCHW order, updated in place. Everything else has one row
per lane and is written whole, zeros in empty lanes. "Network" tensors, float16 or float32, are channels last where
`channels` > 1 and in NCHW order where it is 1; then pixels = size / channels must be a multiple of 4. A flag, int32
[B], is set to 1 where a number is not finite, and never cleared here. Wrong shapes, types or strides: ValueError.

One tick: denoiser(z_t) and decoder(z); the operator at x_operator; features, repulsion and the features' pull-back;
`step_x`; the decoder's pull-back; `step_z`, which leaves z_t and z for the next tick as `step_x` left x_operator. If
the lanes are not those of the tick before, `noise_zt` comes first, and `operator_input` after the decoder; this one
also in every tick with a lane that has no x, since its operator reads this tick's D(z).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, float16, float32, int32

from rlsd.kernels.step import triton_kernels as kernels
from rlsd.kernels.step.lanes import REAL, WHOLE, Lanes

# Four values to a thread: 16 bytes of float32, and 8 of float16 that lie in the same threads. A latent is small: one
# warp to a tile, so that M = 16384 fills an H100 at batch 1 (128 programs, 132 processors).
LATENT, IMAGE = (128, 1), (512, 4)  # values of a tile, warps
NETWORK = (float16, float32)


def noise_zt(lanes: Lanes, z: Tensor, eps: Tensor, z_t: Tensor, z_network: Tensor, channels: int = 1) -> None:
    """Draw this step's noise eps (float32 [B, M], state order); write z_t and z for the networks (network [B, M])."""
    shape = _shape(lanes, channels, z=z)
    _check(shape, (float32,), eps=eps)
    _check(shape, NETWORK, z_t=z_t, z_network=z_network)
    _launch(kernels.noise_zt_kernel, (lanes.whole, lanes.real, z, eps, z_t, z_network), shape, channels, LATENT)


def step_z(
    lanes: Lanes,
    state: tuple[Tensor, Tensor, Tensor],
    eps: Tensor,
    eps_theta: Tensor,
    cotangent: Tensor,
    z_t: Tensor,
    z_network: Tensor,
    flag: Tensor,
    null: Tensor | None = None,
    repulsion: Tensor | None = None,
    channels: int = 1,
) -> None:
    """Step state = (z, m, v); write the next step's eps (in place) and z_t, and z for the decoder.

    eps: float32 [B, M], state order. eps_theta, cotangent (of z, from the decoder), null (eps_theta without context,
    for lanes with guidance), z_t, z_network: network [B, M]. repulsion: R, float32 [*, M], state order.
    """
    free, apart = eps_theta if null is None else null, eps if repulsion is None else repulsion
    shape = _shape(lanes, channels, **dict(zip("zmv", state)))
    _check(shape, (float32,), eps=eps)
    _check((len(apart), shape[1]), (float32,), repulsion=apart)
    _check(shape, NETWORK, eps_theta=eps_theta, cotangent=cotangent, null=free, z_t=z_t, z_network=z_network)
    _check(shape[:1], (int32,), flag=flag)
    arguments = (lanes.whole, lanes.real, *state, eps, eps_theta, free, cotangent, apart, z_t, z_network, flag)
    _launch(kernels.step_z_kernel, arguments, shape, channels, LATENT)


def step_x(
    lanes: Lanes,
    state: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor,
    image: Tensor,
    x_operator: Tensor,
    cotangent: Tensor,
    flag: Tensor,
    image_cotangent: Tensor | None = None,
    channels: int = 1,
    image_scale: Tensor | None = None,
) -> None:
    """Step state = (x, m, v); write what the operator reads next and the cotangent of D(z).

    gradient, x_operator: float16 or float32 [B, P], state order. image = D(z), cotangent, image_cotangent (the
    features' pull-back, for lanes with PULLED): network [B, P]. image_scale: float32 [B], what brings it to the loss
    scale, default 1.
    """
    scale = torch.ones(len(image), device=image.device) if image_scale is None else image_scale
    seen = image if image_cotangent is None else image_cotangent
    shape = _shape(lanes, channels, **dict(zip("xmv", state)))
    _check(shape, NETWORK, gradient=gradient, image=image, image_cotangent=seen, x_operator=x_operator)
    _check(shape, NETWORK, cotangent=cotangent)
    _check(shape[:1], (int32,), flag=flag)
    _check(shape[:1], (float32,), image_scale=scale)
    arguments = (lanes.whole, lanes.real, *state, gradient, image, seen, scale, x_operator, cotangent, flag)
    _launch(kernels.step_x_kernel, arguments, shape, channels, IMAGE)


def operator_input(lanes: Lanes, x: Tensor, image: Tensor, x_operator: Tensor, channels: int = 1) -> None:
    """Write what the operator reads ([B, P], state order): x, or D(z) (image, network [B, P]) where there is no x."""
    shape = _shape(lanes, channels, x=x)
    _check(shape, NETWORK, image=image, x_operator=x_operator)
    _launch(kernels.operator_input_kernel, (lanes.whole, x, image, x_operator), shape, channels, IMAGE)


def gather_features(lanes: Lanes, phi: Tensor, rows: Tensor) -> None:
    """Put the features phi (network [B, D]) of each lane into its feature_row of rows: float32 [*, stride]."""
    D, stride = phi.shape[1], rows.shape[1]
    _check((len(lanes.whole), D), NETWORK, phi=phi)
    _check((len(rows), max(stride, D)), (float32,), rows=rows)
    grid = (triton.cdiv(stride, IMAGE[0]), len(phi))
    kernels.gather_features_kernel[grid](lanes.whole, phi, rows, D, stride, BLOCK=IMAGE[0], num_warps=IMAGE[1])


def spread_repulsion(lanes: Lanes, repulsion: Tensor, phi_cotangent: Tensor, image_scale: Tensor, level: float) -> None:
    """Write R (float32 [*, stride]) as the features' cotangent of root mean square `level`, and image_scale.

    phi_cotangent: network [B, D]. image_scale: float32 [B]. See naive.spread_repulsion.
    """
    D, stride = phi_cotangent.shape[1], repulsion.shape[1]
    _check((len(lanes.whole), D), NETWORK, phi_cotangent=phi_cotangent)
    _check((len(repulsion), max(stride, D)), (float32,), repulsion=repulsion)
    _check((len(phi_cotangent),), (float32,), image_scale=image_scale)
    kernels.spread_repulsion_kernel[(1, len(phi_cotangent))](
        lanes.whole, lanes.real, repulsion, phi_cotangent, image_scale, D, stride, float(level), BLOCK=IMAGE[0],
        num_warps=IMAGE[1],
    )  # fmt: skip


def start(lanes: Lanes, state: tuple[Tensor, Tensor, Tensor], stream: int) -> None:
    """Draw the first values of state = (value, m, v) from this stream of the lanes' particles; zero the moments."""
    batch, size = _shape(lanes, 1, **dict(zip(("value", "m", "v"), state)))
    values, warps = IMAGE
    grid = (triton.cdiv(size, values), batch)
    kernels.start_kernel[grid](lanes.whole, *state, _signed(stream), size, BLOCK=values, num_warps=warps)


def normal(out: Tensor, seed: int, item: int, particle: int, stream: int) -> None:
    """Write the standard normal numbers at this address to out: float32 [count], contiguous."""
    _check((len(out),), (float32,), out=out)
    address = [_signed(word) for word in (seed, seed >> 32, item, particle, stream)]
    kernels.normal_kernel[(triton.cdiv(len(out), 512),)](out, *address, len(out), BLOCK=512)


def _signed(word: int) -> int:
    """The low 32 bits as the int32 that has them."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def constants_of(channels: int, values: int) -> dict[str, int]:
    """The compile-time constants of a kernel whose tile holds so many values."""
    padded = triton.next_power_of_2(channels)
    return {"CHANNELS": channels, "PADDED": padded, "BLOCK": max(values // padded, 4)}


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], shape: tuple[int, int], channels: int, tile: tuple[int, int]
) -> None:
    constants, pixels = constants_of(channels, tile[0]), shape[1] // channels
    kernel[(triton.cdiv(pixels, constants["BLOCK"]), shape[0])](*tensors, pixels, **constants, num_warps=tile[1])


def _shape(lanes: Lanes, channels: int, **state: Tensor) -> tuple[int, int]:
    """(B, size of a row), the tables and the state checked."""
    first, batch = next(iter(state.values())), len(lanes.whole)
    size = first.shape[-1]
    _check((batch, len(WHOLE)), (int32,), whole=lanes.whole)
    _check((batch, len(REAL)), (float32,), real=lanes.real)
    _check((len(first), size), (float32,), **state)
    if channels < 1 or size % channels or (channels > 1 and size // channels % 4):
        raise ValueError(f"channels is {channels}, allowed is 1, or what divides {size} into a multiple of 4 pixels")
    return batch, size


def _check(shape: tuple[int, ...], types: tuple[torch.dtype, ...], **tensors: Tensor) -> None:
    for name, given in tensors.items():
        if given.shape != shape or given.dtype not in types or not given.is_contiguous():
            found = f"{given.dtype} {list(given.shape)} with strides {given.stride()}"
            raise ValueError(f"{name} is {found}, allowed is {' or '.join(map(str, types))} {list(shape)}, contiguous")
