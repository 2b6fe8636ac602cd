"""The plain definitions: what is done between the networks, in torch and in any floating-point type.

They change nothing and return everything; the kernels update the state in place. The state (z, m, v [S, size]) is in
NCHW order. Tensors of the denoiser and the decoder ([B, size]) are channels last where `channels` > 1, and in NCHW
order where it is 1. `lanes`: see lanes.py. `flag` [B]: 1 where something is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsd.kernels.naive import normal
from rlsd.kernels.step.lanes import AUGMENTED, GRADIENT, MOVE_Z, PULLED, Lanes


def noise_zt(lanes: Lanes, z: Tensor, network: torch.dtype, channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Noise at this step's address: eps (in state order), z_t = signal z + noise eps, and z, both for the networks."""
    live, value = lanes["slot"] >= 0, _rows(z, lanes["slot"])
    eps = _eps(lanes, lanes["step"], value)
    z_t = torch.where(live, lanes["signal"] * value + lanes["noise"] * eps, 0)
    return eps, _to_network(z_t, channels).to(network), _to_network(value, channels).to(network)


def step_z(
    lanes: Lanes,
    z: Tensor,
    m: Tensor,
    v: Tensor,
    eps: Tensor,
    eps_theta: Tensor,
    cotangent: Tensor,
    null: Tensor | None = None,
    repulsion: Tensor | None = None,
    channels: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adam on z along the pulled-back cotangent, the score and the repulsion; then the next step's noise and z_t.

    eps_theta, cotangent, null (the prediction without context): [B, M], the networks'. repulsion: [*, M], state order.
    Returns z, m, v, eps, z_t, z for the decoder, flag.
    """
    live, moves = lanes["slot"] >= 0, lanes.has(MOVE_Z)
    value = _rows(z, lanes["slot"])
    prediction = _from_network(eps_theta, channels).to(z.dtype)
    if null is not None:
        guided, free = lanes["guidance"] != 1, _from_network(null, channels).to(z.dtype)
        prediction = torch.where(guided, free + lanes["guidance"] * (prediction - free), prediction)
    g = lanes["unscale"] * _from_network(cotangent, channels).to(z.dtype) + lanes["score"] * (prediction - eps)
    if repulsion is not None:
        row = lanes["repulsion_row"]
        g = torch.where(row >= 0, g - lanes["repulsion"] * _rows(repulsion, row), g)
    new, new_m, new_v = _adam(lanes, "z", value, _rows(m, lanes["slot"]), _rows(v, lanes["slot"]), g)
    value = torch.where(moves, new, value)
    eps = _eps(lanes, lanes["step"] + 1, value)
    z_t = torch.where(live, lanes["next_signal"] * value + lanes["next_noise"] * eps, 0)
    outputs = [_to_network(each, channels).to(eps_theta.dtype) for each in (z_t, value)]
    state = [_put(old, lanes, moves, rows) for old, rows in ((z, value), (m, new_m), (v, new_v))]
    return (*state, eps, *outputs, _flag(*outputs, torch.where(moves, new_v, 0)))  # type: ignore[return-value]


def step_x(
    lanes: Lanes,
    x: Tensor,
    m: Tensor,
    v: Tensor,
    gradient: Tensor,
    image: Tensor,
    image_cotangent: Tensor | None = None,
    channels: int = 1,
    image_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adam on x along its data gradient and towards D(z), and the cotangent of D(z).

    gradient: [B, P], the operator's, in state order. image = D(z) and image_cotangent, the features' pull-back, which
    image_scale ([B], default 1) brings to the loss scale: [B, P], the networks'.
    Returns x, m, v, what the operator reads next (x, or D(z) where there is no x), D(z)'s cotangent, flag.
    """
    augmented, counts = lanes.has(AUGMENTED), lanes.has(GRADIENT)
    live, moves = lanes["slot"] >= 0, augmented & counts
    decoded = torch.where(live, _from_network(image, channels).to(x.dtype), 0)
    g = torch.where(counts, gradient.to(x.dtype), 0)
    value = torch.where(augmented, _rows(x, lanes["slot"]), decoded)
    new, new_m, new_v = _adam(
        lanes, "x", value, _rows(m, lanes["slot"]), _rows(v, lanes["slot"]), g + lanes["rho"] * (value - decoded)
    )
    value = torch.where(moves, new, value)
    pull = torch.where(live, lanes["cotangent"] * torch.where(augmented, decoded - value, g), 0)
    if image_cotangent is not None:
        seen = _from_network(image_cotangent, channels).to(x.dtype)
        seen = seen if image_scale is None else image_scale[:, None].to(x.dtype) * seen
        pull = torch.where(lanes.has(PULLED), pull + seen, pull)
    pull = _to_network(pull, channels).to(image.dtype)
    state = [_put(old, lanes, moves, rows) for old, rows in ((x, value), (m, new_m), (v, new_v))]
    flag = _flag(value, pull, torch.where(moves, new_v, 0))
    return (*state, value.to(gradient.dtype), pull, flag)  # type: ignore[return-value]


def operator_input(lanes: Lanes, x: Tensor, image: Tensor, dtype: torch.dtype, channels: int = 1) -> Tensor:
    """What the operator reads, [B, P] in state order: x of augmented lanes, D(z) of the others."""
    decoded = torch.where(lanes["slot"] >= 0, _from_network(image, channels).to(x.dtype), 0)
    return torch.where(lanes.has(AUGMENTED), _rows(x, lanes["slot"]), decoded).to(dtype)


def gather_features(lanes: Lanes, phi: Tensor, rows: Tensor) -> Tensor:
    """A copy of rows [*, stride] with the features [B, D] of each lane in its feature_row, zeros behind them."""
    wide = torch.nn.functional.pad(phi.to(rows.dtype), (0, rows.shape[1] - phi.shape[1]))
    return _put_rows(rows, lanes["feature_row"], torch.ones_like(lanes["slot"], dtype=torch.bool), wide)


def spread_repulsion(
    lanes: Lanes, repulsion: Tensor, D: int, level: float, network: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What the features' pull-back is given: R of each lane, [*, stride], brought to the root mean square `level`.

    Returns it [B, D] for the network, and image_scale [B]: what makes of its pull-back the repulsion's share of D(z)'s
    cotangent, loss scale included. Zeros in lanes that have no row or whose R is zero.
    """
    r = _rows(repulsion, lanes["feature_row"])[:, :D].to(lanes.real.dtype)
    rms = r.square().mean(1, keepdim=True).sqrt()
    scale = torch.where(rms > 0, -lanes["repulsion"] * (rms / level) / lanes["unscale"], 0)
    return torch.where(rms > 0, r * (level / rms), 0).to(network), scale[:, 0]


def start(lanes: Lanes, value: Tensor, m: Tensor, v: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first values of a variable, standard normal numbers of this stream, and moments of zero."""
    live, addressed = lanes["slot"] >= 0, torch.full_like(lanes["step"], stream)
    drawn = _eps(lanes, addressed, _rows(value, lanes["slot"]))
    zero = torch.zeros_like(drawn)
    return _put(value, lanes, live, drawn), _put(m, lanes, live, zero), _put(v, lanes, live, zero)


def _eps(lanes: Lanes, stream: Tensor, like: Tensor) -> Tensor:
    """Noise like the given rows [B, size], zero in empty lanes."""
    address = [lanes[name] for name in ("seed_low", "seed_high", "item", "particle")]
    drawn = normal(torch.cat((*address, stream & 0xFFFFFFFF), 1), like.shape[1])
    return torch.where(lanes["slot"] >= 0, drawn, 0).to(like.dtype)


def _adam(lanes: Lanes, name: str, value: Tensor, m: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adam (Kingma and Ba, 2015) with bias correction."""
    m = lanes["beta1"] * m + (1 - lanes["beta1"]) * g
    v = lanes["beta2"] * v + (1 - lanes["beta2"]) * g * g
    m_hat, v_hat = m * lanes[f"correction1_{name}"], v * lanes[f"correction2_{name}"]
    return value - lanes[f"rate_{name}"] * m_hat / (v_hat.sqrt() + lanes["epsilon"]), m, v


def _rows(state: Tensor, slot: Tensor) -> Tensor:
    """The lanes' rows [B, size] of a state [S, size], zero in empty lanes."""
    return torch.where(slot >= 0, state[slot.squeeze(1).clamp(min=0)], 0)


def _put(state: Tensor, lanes: Lanes, where: Tensor, rows: Tensor) -> Tensor:
    """A copy of the state with these lanes' rows in their slots."""
    return _put_rows(state, lanes["slot"], where, rows)


def _put_rows(state: Tensor, slot: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    writes = (slot == torch.arange(len(state), device=state.device)) & where  # [B, S]
    return torch.where(writes.any(0)[:, None], rows[writes.int().argmax(0)], state)


def _from_network(t: Tensor, channels: int) -> Tensor:
    return t.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1)


def _to_network(t: Tensor, channels: int) -> Tensor:
    return t.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1)


def _flag(*values: Tensor) -> Tensor:
    return torch.stack([~each.isfinite().all(1) for each in values]).any(0).to(torch.int32)
