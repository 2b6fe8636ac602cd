"""Tiny networks in NumPy: the weights of the hand-made bundles, and what engine/reference.py is run on.

Latent [4, 2, 2], image [1, 4, 4], context [2, 3], 5 features.

    denoiser   eps   = tanh(z_t W1 + context Wc + bias[t]) W2 + slope[t] * z_t + offset[t]
    decoder    image = act(act(z V1 + b1) V2 + b2)          act = tanh, or the identity if `linear`
    features   phi   = tanh(image F)
    operators  inpainting: mask * x;  saturate: tanh(gain * x A), a measurement of 6 values
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlsd.engine import Engine, Job, Params
from rlsd.engine.core import Handle
from rlsd.engine.reference import rlsd

Array = np.ndarray
LATENT, IMAGE, CONTEXT, FEATURES, HIDDEN = (4, 2, 2), (1, 4, 4), (2, 3), 5, 12
M, P, C, SATURATED = 16, 16, 6, 6
TIMESTEPS = 120
OPERATORS: dict[str, tuple[tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "inpainting": (IMAGE, {"mask": IMAGE}),
    "saturate": ((SATURATED,), {"gain": (1,)}),
}


@dataclass
class Nets:
    """The weights, float32, and the table abar [T]."""

    weights: dict[str, Array]
    abar: Array
    linear: bool = False


class Twin:
    """The networks of rlsd.engine.reference on one measurement, in float64; all arrays flat, particles first."""

    def __init__(self, nets: Nets, job: Job):
        self.linear = nets.linear
        self.w = {name: values.astype(np.float64) for name, values in nets.weights.items()}
        self.operator, self.guidance = job.operator, job.params.guidance
        self.y = np.asarray(job.y, np.float64).reshape(1, -1)
        self.given = {name: np.asarray(value, np.float64).reshape(1, -1) for name, value in job.operator_params.items()}
        self.null = null_context().reshape(1, -1).astype(np.float64)
        self.context = self.null if job.context is None else np.asarray(job.context, np.float64).reshape(1, -1)

    def act(self, x: Array) -> Array:
        return x if self.linear else np.tanh(x)

    def slope(self, y: Array) -> Array:
        """Derivative of `act` where its value is y."""
        return np.ones_like(y) if self.linear else 1 - y * y

    def denoise(self, z_t: Array, t: int) -> Array:
        eps = self.eps(z_t, t, self.context)
        free = self.eps(z_t, t, self.null)
        return free + self.guidance * (eps - free)

    def eps(self, z_t: Array, t: int, context: Array) -> Array:
        w = self.w
        hidden = np.tanh(z_t @ w["W1"] + context @ w["Wc"] + w["bias"][t])
        return hidden @ w["W2"] + w["slope"][t] * z_t + w["offset"][t]

    def layers(self, z: Array) -> tuple[Array, Array]:
        hidden = self.act(z @ self.w["V1"] + self.w["b1"])
        return hidden, self.act(hidden @ self.w["V2"] + self.w["b2"])

    def decode(self, z: Array) -> Array:
        return self.layers(z)[1]

    def decode_pull(self, z: Array, cotangent: Array) -> Array:
        hidden, image = self.layers(z)
        return ((cotangent * self.slope(image)) @ self.w["V2"].T * self.slope(hidden)) @ self.w["V1"].T

    def features(self, image: Array) -> Array:
        return np.tanh(image @ self.w["F"])

    def features_pull(self, image: Array, cotangent: Array) -> Array:
        return (cotangent * (1 - self.features(image) ** 2)) @ self.w["F"].T

    def measure(self, x: Array) -> Array:
        if self.operator == "inpainting":
            return self.given["mask"] * x
        return self.act(self.given["gain"] * (x @ self.w["A"]))

    def data_gradient(self, x: Array) -> Array:
        """Of half the mean squared residual, in x."""
        f = self.measure(x)
        residual = (f - self.y) / f.shape[1]
        if self.operator == "inpainting":
            return residual * self.given["mask"]
        return (residual * self.slope(f) * self.given["gain"]) @ self.w["A"].T


def make_nets(seed: int = 0, linear: bool = False) -> Nets:
    """Random smooth networks of moderate gain, and a schedule from nearly clean to nearly noise."""
    rng = np.random.default_rng(seed)

    def normal(rows: int, columns: int, gain: float = 1.0) -> Array:
        return (gain / np.sqrt(rows) * rng.standard_normal((rows, columns))).astype(np.float32)

    weights = {
        "W1": normal(M, HIDDEN), "Wc": normal(C, HIDDEN), "W2": normal(HIDDEN, M, 0.5),
        "bias": normal(TIMESTEPS, HIDDEN), "slope": (0.8 + 0 * normal(TIMESTEPS, M)), "offset": normal(TIMESTEPS, M),
        "V1": normal(M, HIDDEN), "b1": normal(1, HIDDEN, 0.1)[0], "V2": normal(HIDDEN, P), "b2": normal(1, P, 0.1)[0],
        "F": normal(P, FEATURES), "A": normal(P, SATURATED),
    }  # fmt: skip
    return Nets(weights, np.linspace(0.999, 0.02, TIMESTEPS), linear)


def null_context() -> Array:
    """Not zeros, so that a test notices when it is forgotten."""
    return np.linspace(-0.3, 0.4, C, dtype=np.float32).reshape(CONTEXT)


def make_job(nets: Nets, operator: str = "inpainting", **changes: Any) -> Job:
    """A job on a measurement of a picture that the decoder can make; `changes`: fields of Job."""
    given = {"gain": np.array([1.5], np.float32)}
    if operator == "inpainting":
        given = {"mask": (np.arange(P) % 4 < 2).astype(np.float32).reshape(IMAGE)}
    y = np.zeros(OPERATORS[operator][0], np.float32)
    blank = Job(y=y, operator=operator, operator_params=given, params=Params(steps=21, lr_x=0.05, lr_z=0.05))
    twin = Twin(nets, blank)
    truth = twin.decode(np.random.default_rng(5).standard_normal((1, M)))
    return replace(blank, y=twin.measure(truth).astype(np.float32).reshape(blank.y.shape), **changes)


def submit_zeros(engine: Engine, operator: str) -> Handle:
    """A job of zeros in the shapes that the engine names."""
    info = engine.operators[operator]
    given = {name: np.zeros(shape, np.float32) for name, shape in info.params.items()}
    y = np.zeros(info.measurement_shape, np.float32)
    return engine.submit(Job(y=y, operator=operator, operator_params=given, params=Params(steps=3)))


def reference(nets: Nets, job: Job, with_features: bool = True) -> Array:
    """What the engine must return for the job: [N, C, H, W]."""
    space = "features" if with_features and job.params.repulsion != "latent" else "latent"
    found = rlsd(Twin(nets, job), nets.abar, M, P, job.particles, job.params, job.seed, job.item, 1, space)
    return found.reshape(-1, *IMAGE)
