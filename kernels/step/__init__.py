"""What is done between the networks: addressed noise, Adam on latents and images, and the networks' next inputs.

`lanes` documents the tables of per-lane numbers, `launch` the launchers, `naive` the plain definitions.
"""

from __future__ import annotations

from typing import Any

from rlsd.kernels.aot import Kernel
from rlsd.kernels.step import triton_kernels
from rlsd.kernels.step.lanes import Lanes
from rlsd.kernels.step.launch import (
    IMAGE,
    LATENT,
    constants_of,
    gather_features,
    noise_zt,
    operator_input,
    spread_repulsion,
    start,
    step_x,
    step_z,
)
from rlsd.kernels.step.ops import philox_normal

__all__ = [
    "KERNELS",
    "Lanes",
    "gather_features",
    "noise_zt",
    "operator_input",
    "philox_normal",
    "spread_repulsion",
    "start",
    "step_x",
    "step_z",
]

_NETWORK = ("eps_theta", "null", "cotangent", "z_t", "z_network", "image", "image_cotangent", "phi", "phi_cotangent")
_TYPES = dict.fromkeys(_NETWORK, "*fp16") | dict.fromkeys(("whole", "flag"), "*i32")
_TYPES |= {"pixels": "i32:16", "size": "i32:16", "stream": "i32", "D": "i32", "stride": "i32:16", "level": "fp32"}


def _variant(name: str, function: Any, constants: dict[str, int], warps: int) -> Kernel:
    """State, noise, repulsion and what operators read and write are float32."""
    signature = {each: _TYPES.get(each, "*fp32") for each in function.arg_names if each not in constants}
    return Kernel(name, function, signature, constants, warps)


def _variants() -> list[Kernel]:
    """What the engine launches on a GPU: for networks in float16, tensors in NCHW order."""
    kernels = [_variant("start", triton_kernels.start_kernel, {"BLOCK": IMAGE[0]}, IMAGE[1])]
    for name in ("gather_features", "spread_repulsion"):
        function = getattr(triton_kernels, f"{name}_kernel")
        kernels.append(_variant(f"{name}_fp16", function, {"BLOCK": IMAGE[0]}, IMAGE[1]))
    for name, (values, warps) in (
        ("noise_zt", LATENT), ("step_z", LATENT), ("step_x", IMAGE), ("operator_input", IMAGE),
    ):  # fmt: skip
        function = getattr(triton_kernels, f"{name}_kernel")
        kernels.append(_variant(f"{name}_fp16_nchw", function, constants_of(1, values), warps))
    return kernels


KERNELS = _variants()
