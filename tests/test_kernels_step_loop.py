"""kernels/step tick by tick, as an engine calls it, against engine/reference.py."""

from dataclasses import dataclass, field

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from fused_step import DEVICE, SINGLE, Fused

from rlsd.engine import Params
from rlsd.engine.reference import repulsion, rlsd
from rlsd.kernels.step import naive
from rlsd.kernels.step.lanes import AUGMENTED, GRADIENT, MOVE_Z, PULLED, Lanes

DOUBLE = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, which interprets the kernels

# Three jobs that come and go at different ticks in one batch, one lane of it empty.
M, P, TIMESTEPS, SCALE = 16, 24, 40, 256.0
ABAR = np.linspace(0.999, 0.05, TIMESTEPS)


class Linear:
    """Networks of rlsd.engine.reference; float64, in NCHW order."""

    def __init__(self):
        rng = np.random.default_rng(1)
        self.a, self.v, self.f = (rng.standard_normal(shape) / shape[0] ** 0.5 for shape in ((M, M), (M, P), (P, 5)))
        self.mask, self.y = rng.uniform(size=P) < 0.6, rng.standard_normal(P)

    def denoise(self, z_t, t):
        return z_t @ self.a + 0.02 * t

    def decode(self, z):
        return z @ self.v

    def decode_pull(self, z, cotangent):
        return cotangent @ self.v.T

    def features(self, image):
        return image @ self.f

    def features_pull(self, image, cotangent):
        return cotangent @ self.f.T

    def data_gradient(self, x):
        return self.mask * (x - self.y) / P


@dataclass
class Task:
    """A job of the simulation, which joins at a tick; lanes: its particles' places in the batch."""

    params: Params
    space: str
    joins: int
    lanes: list[int]
    seed: int = 2**33 + 1
    result: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def coefficients(self, k):
        p = self.params
        t = min((p.steps - 1 - min(k, p.steps - 2)) * (TIMESTEPS // p.steps) + 1, TIMESTEPS - 1)
        return t, np.sqrt(ABAR[t]), np.sqrt(1 - ABAR[t]), p.lambda_ * np.sqrt((1 - ABAR[t]) / ABAR[t]) / M

    def repels(self, k, space):
        last = self.params.steps - 1
        return space == self.space and len(self.lanes) > 1 and k < self.params.repulsion_until * last

    def row(self, lane, slot, k):
        p, last, augmented = self.params, self.params.steps - 1, self.params.variant == "rlsd"
        (_, signal, noise, score), (_, next_signal, next_noise, _) = self.coefficients(k), self.coefficients(k + 1)
        row = {"slot": slot, "seed": self.seed, "item": 7, "particle": self.lanes.index(lane), "step": k}
        row |= {"repulsion_row": lane if self.repels(k, "latent") else -1, "guidance": 1}
        row["mode"] = AUGMENTED * augmented + MOVE_Z * (k < last) + PULLED * self.repels(k, "features")
        row["mode"] += GRADIENT * (k > 0 if augmented else k < last)
        row |= {"signal": signal, "noise": noise, "next_signal": next_signal, "next_noise": next_noise, "score": score}
        row |= {"repulsion": score * p.gamma * noise, "unscale": 1 / SCALE, "rho": p.rho / P}
        row["cotangent"] = SCALE / P if augmented else SCALE
        row |= {"beta1": p.beta1, "beta2": p.beta2, "epsilon": p.adam_eps}
        for name, rate, n in (("z", p.lr_z, k + 1), ("x", p.lr_x, max(k, 1))):
            row |= {f"rate_{name}": rate, f"correction1_{name}": 1 / (1 - p.beta1**n)}
            row[f"correction2_{name}"] = 1 / (1 - p.beta2**n)
        return row


def tasks():
    slow = {"lr_x": 0.1, "lr_z": 0.1, "adam_eps": 1e-3, "lambda_": 0.3, "rho": 0.2}
    return [
        Task(Params(steps=11, gamma=2.0, repulsion_until=0.6, **slow), "features", 0, [4, 0, 2]),
        Task(Params("rlsd-nonaug", steps=11, gamma=2.0, beta1=0.8, beta2=0.95, **slow), "latent", 2, [3, 6], seed=3),
        Task(Params(steps=6, beta1=0.5, **slow), "features", 1, [5], seed=2**64 - 1),
    ]


class Simulation:
    """The engine's ticks, by the kernels of a room; networks in float64."""

    def __init__(self, room, dtype, channels):
        self.room, self.dtype, (self.of_z, self.of_x) = room, dtype, channels
        self.net, self.tasks, self.slots = Linear(), tasks(), [3, 8, 0, 5, 1, 7, 2]
        full = lambda size: torch.full((9, size), 9.0, dtype=dtype, device=DEVICE)  # noqa: E731
        self.z, self.x = (tuple(full(size) for _ in range(3)) for size in (M, P))

    def read(self, tensor, channels):
        rows = tensor.double().cpu().numpy()
        return rows.reshape(len(rows), -1, channels).swapaxes(1, 2).reshape(len(rows), -1)

    def write(self, rows, channels):
        turned = rows.reshape(len(rows), channels, -1).swapaxes(1, 2).reshape(len(rows), -1)
        return torch.from_numpy(turned.copy()).to(self.dtype).to(DEVICE)

    def lanes(self, tick, chosen=lambda task: True):
        rows = [{} for _ in self.slots]
        for task in self.tasks:
            for lane in task.lanes:
                if 0 <= tick - task.joins < task.params.steps and chosen(task):
                    rows[lane] = task.row(lane, self.slots[lane], tick - task.joins)
        return Lanes.pack(rows, DEVICE, self.dtype)

    def push(self, rows, tick, space):
        """R of the tasks that repel each other in this space, zero elsewhere, and each lane's weight."""
        pushed, weight = np.zeros_like(rows), np.zeros((len(rows), 1))
        for task in self.tasks:
            k = tick - task.joins
            if 0 <= k < task.params.steps - 1 and task.repels(k, space):
                pushed[task.lanes] = repulsion(rows[task.lanes], task.seed, 7, k)
                _, _, noise, score = task.coefficients(k)
                weight[task.lanes] = score * task.params.gamma * noise
        return pushed, weight

    def join(self, tick, lanes):
        new = self.lanes(tick, lambda task: task.joins == tick)
        self.z = self.room.start(new, *self.z, 0xFFFFFFFF)
        self.x = self.room.start(new, *self.x, 0xFFFFFFFE)
        self.eps, self.z_t, self.z_network = self.room.noise_zt(lanes, self.z[0], self.dtype, self.of_z)

    def predict(self, tick):
        z_t = self.read(self.z_t, self.of_z)
        for task in self.tasks:
            for lane in task.lanes:
                z_t[lane] = self.net.denoise(z_t[lane], task.coefficients(max(tick - task.joins, 0))[0])
        return self.write(z_t, self.of_z)

    def tick(self, tick):
        net, room, lanes = self.net, self.room, self.lanes(tick)
        if any(task.joins == tick for task in self.tasks):
            self.join(tick, lanes)
        decoded = net.decode(self.read(self.z_network, self.of_z))
        image = self.write(decoded, self.of_x)
        x_operator = room.operator_input(lanes, self.x[0], image, self.dtype, self.of_x)
        if tick and all(task.joins != tick for task in self.tasks):  # then step_x had left it
            augmented = lanes.has(AUGMENTED)[:, 0].cpu()
            assert torch.equal(x_operator[augmented], self.x_operator[augmented])
        gradient = self.write(net.data_gradient(self.read(x_operator, 1)), 1)
        pushed, weight = self.push(net.features(decoded), tick, "features")
        seen = self.write(SCALE * net.features_pull(decoded, -weight * pushed), self.of_x)
        *state, self.x_operator, cotangent, flag = room.step_x(lanes, *self.x, gradient, image, seen, self.of_x)
        self.x = tuple(state)
        pulled = self.write(net.decode_pull(None, self.read(cotangent, self.of_x)), self.of_z)
        latents = np.zeros((len(self.slots), M))
        latents[:] = self.z[0].double().cpu().numpy()[self.slots]
        apart = self.write(self.push(latents, tick, "latent")[0], 1)
        *state, self.eps, self.z_t, self.z_network, bad = room.step_z(
            lanes, *self.z, self.eps, self.predict(tick), pulled, repulsion=apart, channels=self.of_z
        )
        self.z = tuple(state)
        assert not flag.any() and not bad.any()
        for task in self.tasks:
            if tick - task.joins == task.params.steps - 1:
                task.result = self.read(self.x_operator, 1)[task.lanes]


@pytest.mark.parametrize(
    "room, dtype, tolerance, channels",
    [(naive, DOUBLE, 1e-10, (1, 1)), (naive, DOUBLE, 1e-10, (4, 3)), (Fused, SINGLE, 1e-4, (4, 3))],
)
def test_ten_steps_are_the_references(room, dtype, tolerance, channels):
    simulation = Simulation(room, dtype, channels)
    for tick in range(13):
        simulation.tick(tick)
    for task in simulation.tasks:
        wanted = rlsd(Linear(), ABAR, M, P, len(task.lanes), task.params, task.seed, 7, 1, task.space)
        np.testing.assert_allclose(task.result, wanted, rtol=tolerance, atol=tolerance)
