"""kernels/step against its plain definitions, and those against engine/reference.py."""

import os
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch

from rlsd.engine import Params, normal
from rlsd.engine.reference import repulsion, rlsd
from rlsd.kernels.step import launch, naive
from rlsd.kernels.step.lanes import AUGMENTED, GRADIENT, MOVE_Z, PULLED, Lanes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64
LATENTS = [(1, 1), (7, 1), (129, 1), (64, 4), (144, 4), (60, 3)]  # M, channels
IMAGES = [(1, 1), (513, 1), (60, 3), (396, 3)]  # P, channels
# Some results are not finite on purpose, and NumPy, which interprets the kernels, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EVERY = AUGMENTED | MOVE_Z | GRADIENT | PULLED
SLOTS = [4, -1, 0, 6, 2]  # of the lanes: one is empty, and three rows of the state belong to nobody


class Fused:
    """The kernels behind the signatures of naive.py: on copies of the state, with poisoned outputs."""

    @staticmethod
    def noise_zt(lanes, z, network, channels=1):
        shape = len(lanes.whole), z.shape[1]
        outputs = [poisoned(shape, SINGLE), poisoned(shape, network), poisoned(shape, network)]
        launch.noise_zt(lanes, z, *outputs, channels)
        return tuple(outputs)

    @staticmethod
    def step_z(lanes, z, m, v, eps, eps_theta, cotangent, null=None, repulsion=None, channels=1):
        state, eps = (z.clone(), m.clone(), v.clone()), eps.clone()
        z_t, z_network = poisoned(eps.shape, eps_theta.dtype), poisoned(eps.shape, eps_theta.dtype)
        flag = torch.zeros(len(eps), dtype=torch.int32, device=DEVICE)
        launch.step_z(lanes, state, eps, eps_theta, cotangent, z_t, z_network, flag, null, repulsion, channels)
        return (*state, eps, z_t, z_network, flag)

    @staticmethod
    def step_x(lanes, x, m, v, gradient, image, image_cotangent=None, channels=1):
        state = (x.clone(), m.clone(), v.clone())
        x_operator, cotangent = poisoned(image.shape, gradient.dtype), poisoned(image.shape, image.dtype)
        flag = torch.zeros(len(image), dtype=torch.int32, device=DEVICE)
        launch.step_x(lanes, state, gradient, image, x_operator, cotangent, flag, image_cotangent, channels)
        return (*state, x_operator, cotangent, flag)

    @staticmethod
    def operator_input(lanes, x, image, dtype, channels=1):
        out = poisoned(image.shape, dtype)
        launch.operator_input(lanes, x, image, out, channels)
        return out

    @staticmethod
    def start(lanes, value, m, v, stream):
        state = (value.clone(), m.clone(), v.clone())
        launch.start(lanes, state, stream)
        return state


def poisoned(shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def table(slots=SLOTS, **columns):
    """Lanes with different numbers in every column; `columns`: name -> one value per lane, or one for all."""
    rng = np.random.default_rng(3)
    rows = []
    for lane, slot in enumerate(slots):
        beta1, beta2 = rng.uniform(0.5, 0.95), rng.uniform(0.8, 0.999)
        row = {"slot": slot, "seed": 2**40 * lane + 5, "item": 2**32 - 1 - lane, "particle": 2**31 + lane}
        row |= {"step": 2**32 - 2 + lane & 0xFFFFFFFF, "repulsion_row": [1, 0, -1, 0, 2][lane % 5], "mode": EVERY}
        drawn = ("signal", "noise", "next_signal", "next_noise", "score", "repulsion", "unscale", "rho", "cotangent")
        row |= {name: rng.uniform() for name in drawn} | {"guidance": [1, 7.5, 1, -2, 3][lane % 5]}
        row |= {"beta1": beta1, "beta2": beta2, "epsilon": rng.uniform(1e-4, 1e-2)}
        for name, n in (("z", 2 * lane + 2), ("x", 2 * lane + 1)):
            row[f"rate_{name}"] = rng.uniform(0.1, 1)
            row |= {f"correction1_{name}": 1 / (1 - beta1**n), f"correction2_{name}": 1 / (1 - beta2**n)}
        row |= {name: value[lane] if isinstance(value, list) else value for name, value in columns.items()}
        rows.append(row if slot >= 0 else {**row, "signal": np.nan, "cotangent": np.nan})
    return Lanes.pack(rows, DEVICE)


def tensors(size, network, *names, lanes=5, seed=0):
    """Named inputs: z, x, m, v [7, size] and R [3, size] float32, what is per lane [lanes, size] in its type."""
    generator = torch.Generator().manual_seed(seed)
    single = ("z", "x", "m", "v", "eps", "repulsion", "gradient")
    rows = {"z": 7, "x": 7, "m": 7, "v": 7, "repulsion": 3}
    made = {}
    for name in names:
        drawn = torch.randn(rows.get(name, lanes), size, generator=generator)
        made[name] = (drawn.square() if name == "v" else drawn).to(SINGLE if name in single else network).to(DEVICE)
    return made


def doubled(arguments):
    return {name: each.double() if torch.is_floating_point(each) else each for name, each in arguments.items()}


def agree(function, lanes, arguments, **options):
    """The kernel errs at most twice as much as the plain definition in the same types, on every output."""
    exact_lanes = Lanes(lanes.whole, lanes.real.double())
    given = {key: DOUBLE if isinstance(value, torch.dtype) else value for key, value in options.items()}
    exact = getattr(naive, function)(exact_lanes, **doubled(arguments), **given)
    plain, fused = (getattr(room, function)(lanes, **arguments, **options) for room in (naive, Fused))
    exact, plain, fused = ((each,) if isinstance(each, torch.Tensor) else each for each in (exact, plain, fused))
    for number, (wanted, low, got) in enumerate(zip(exact, plain, fused, strict=True)):
        assert got.dtype == low.dtype and got.shape == wanted.shape
        if got.dtype == torch.int32:
            assert torch.equal(got, wanted)
            continue
        scale, allowed = wanted.abs().max(), 2 * (low.double() - wanted).abs().max()
        assert (got.double() - wanted).abs().max() <= allowed + 2e-7 * scale, f"output {number}"
        if got.dtype == SINGLE:
            torch.testing.assert_close(got, low, rtol=1e-6, atol=1e-6 * float(scale))
    return fused


@pytest.mark.parametrize("network", [HALF, SINGLE])
@pytest.mark.parametrize("size, channels", LATENTS)
def test_noise_zt(size, channels, network):
    lanes, given = table(), tensors(size, network, "z")
    eps, z_t, z_network = agree("noise_zt", lanes, given, network=network, channels=channels)
    for lane, slot in enumerate(SLOTS):
        address = (2**40 * lane + 5, 2**32 - 1 - lane, 2**31 + lane, 2**32 - 2 + lane & 0xFFFFFFFF)
        wanted = normal(*address, size) if slot >= 0 else np.zeros(size, np.float32)
        np.testing.assert_array_max_ulp(eps[lane].cpu().numpy(), wanted, maxulp=1 if DEVICE == "cuda" else 0)
    assert not z_t[1].any() and not z_network[1].any()


def step_z_inputs(size, network, null=True, push=True):
    names = ["z", "m", "v", "eps", "eps_theta", "cotangent"] + ["null"] * null + ["repulsion"] * push
    given = tensors(size, network, *names)
    if null:
        given["null"][[0, 1, 2]] = torch.nan  # not read without guidance
    for name in ("eps_theta", "cotangent", "eps"):
        given[name][1] = torch.nan  # nor anything of an empty lane
    return given


@pytest.mark.parametrize("network", [HALF, SINGLE])
@pytest.mark.parametrize("size, channels", LATENTS)
def test_step_z(size, channels, network):
    lanes, given = table(), step_z_inputs(size, network)
    z, _, _, eps, z_t, z_network, flag = agree("step_z", lanes, given, channels=channels)
    assert not flag.any() and not eps[1].any() and not z_t[1].any() and not z_network[1].any()
    assert torch.equal(z[[1, 3, 5]], given["z"][[1, 3, 5]])
    assert (z[[4, 0, 6, 2]] != given["z"][[4, 0, 6, 2]]).any(1).all()


@pytest.mark.parametrize("null, push", [(False, False), (True, False), (False, True)])
def test_step_z_without_guidance_or_repulsion(null, push):
    lanes = table(**({} if push else {"repulsion_row": -1}), **({} if null else {"guidance": 1.0}))
    agree("step_z", lanes, step_z_inputs(64, HALF, null, push), channels=4)


def test_step_z_of_lanes_that_stay():
    """Lanes that want D(z) of their last latents: no step, whatever lies in the gradients."""
    lanes, given = table(mode=[EVERY, EVERY, AUGMENTED | GRADIENT, EVERY, 0]), step_z_inputs(64, HALF)
    for name in ("eps_theta", "cotangent", "null"):
        given[name][[2, 4]] = torch.nan
    z, m, v, *_, flag = agree("step_z", lanes, given, channels=4)
    assert not flag.any()
    for got, name in ((z, "z"), (m, "m"), (v, "v")):
        assert torch.equal(got[[0, 2]], given[name][[0, 2]])


@pytest.mark.parametrize("size, channels", [(64, 4), (129, 1)])
def test_the_next_z_t_is_noise_zt_of_the_next_step(size, channels):
    lanes, given = table(), step_z_inputs(size, HALF)
    z, _, _, eps, z_t, z_network, _ = Fused.step_z(lanes, **given, channels=channels)
    following = [(int(step) + 1) & 0xFFFFFFFF for step in lanes["step"]]
    later = table(step=following, signal=lanes["next_signal"][:, 0].tolist(), noise=lanes["next_noise"][:, 0].tolist())
    for got, wanted in zip((eps, z_t, z_network), Fused.noise_zt(later, z, HALF, channels)):
        assert torch.equal(got, wanted)


MODES = [EVERY, EVERY, AUGMENTED | MOVE_Z, GRADIENT, MOVE_Z]  # of the lanes: all, empty, first step, no x, neither


def step_x_inputs(size, network, operator, seen=True):
    given = tensors(size, network, "x", "m", "v", "gradient", "image", *["image_cotangent"] * seen)
    given["gradient"] = given["gradient"].to(operator)
    if seen:
        given["image_cotangent"][1:] = torch.nan  # not read without PULLED
    given["gradient"][[1, 2, 4]] = torch.nan  # nor without GRADIENT
    given["image"][1] = torch.nan
    return given


@pytest.mark.parametrize("network, operator", [(HALF, SINGLE), (HALF, HALF), (SINGLE, SINGLE)])
@pytest.mark.parametrize("size, channels", IMAGES)
def test_step_x(size, channels, network, operator):
    lanes, given = table(mode=MODES), step_x_inputs(size, network, operator)
    x, m, v, x_operator, cotangent, flag = agree("step_x", lanes, given, channels=channels)
    assert not flag.any() and not x_operator[1].any() and not cotangent[1].any() and not cotangent[4].any()
    untouched = [0, 1, 2, 3, 5, 6]  # only lane 0, in slot 4, moves
    for got, name in ((x, "x"), (m, "m"), (v, "v")):
        assert torch.equal(got[untouched], given[name][untouched]) and (got[4] != given[name][4]).any()
    assert torch.equal(x_operator[0], x[4].to(operator)) and torch.equal(x_operator[2], x[0].to(operator))


def test_step_x_of_one_lane_without_features():
    lanes = table([3], mode=AUGMENTED | GRADIENT)
    given = step_x_inputs(60, HALF, SINGLE, seen=False)
    agree("step_x", lanes, {name: each if len(each) == 7 else each[:1] for name, each in given.items()}, channels=3)


@pytest.mark.parametrize("network, operator", [(HALF, SINGLE), (HALF, HALF), (SINGLE, SINGLE)])
@pytest.mark.parametrize("size, channels", IMAGES)
def test_operator_input(size, channels, network, operator):
    lanes, given = table(mode=MODES), tensors(size, network, "x", "image")
    out = agree("operator_input", lanes, given, dtype=operator, channels=channels)[0]
    assert torch.equal(out[0], given["x"][4].to(operator)) and not out[1].any()
    assert torch.equal(out[4].sort()[0], given["image"][4].to(operator).sort()[0])


@pytest.mark.parametrize("size", [1, 6, 515])
@pytest.mark.parametrize("stream", [0xFFFFFFFF, 0xFFFFFFFE, 1])
def test_start(size, stream):
    lanes, given = table(), tensors(size, SINGLE, "z", "m", "v")
    given["value"] = given.pop("z")
    value, m, v = agree("start", lanes, given, stream=stream)
    for lane, slot in enumerate(SLOTS):
        if slot >= 0:
            wanted = normal(2**40 * lane + 5, 2**32 - 1 - lane, 2**31 + lane, stream, size)
            np.testing.assert_array_max_ulp(value[slot].cpu().numpy(), wanted, maxulp=1 if DEVICE == "cuda" else 0)
            assert not m[slot].any() and not v[slot].any()
    assert torch.equal(value[[1, 3, 5]], given["value"][[1, 3, 5]])


@pytest.mark.parametrize("where", ["eps_theta", "cotangent", "null", "repulsion", "eps"])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_flags_of_step_z(where, bad):
    given = step_z_inputs(144, HALF)
    given[where][2 if where == "repulsion" else 4, 143] = bad  # in the last tile; lane 4 reads row 2 of R
    assert agree_flag("step_z", table(), given, channels=4) == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("value, mode, flagged", [(7e4, EVERY, 1), (6e4, EVERY, 0), (7e4, 0, 1)])
def test_flags_of_latents_that_a_16_bit_network_cannot_hold(value, mode, flagged):
    given = step_z_inputs(64, HALF)
    given["z"][4, 5] = value  # lane 0
    modes = [mode, *[EVERY] * 4]
    assert agree_flag("step_z", table(mode=modes, next_signal=0.5), given, channels=4) == [flagged, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "where, lane, bad, flagged",
    [
        ("gradient", 0, torch.nan, 1),
        ("gradient", 0, 1e30, 1),  # whose square v cannot hold
        ("gradient", 3, torch.inf, 1),
        ("gradient", 3, 1e6, 1),  # as a float16 cotangent
        ("gradient", 2, torch.nan, 0),  # not read
        *[("image", lane, torch.nan, 1) for lane in (0, 2, 3, 4)],
        ("image", 1, torch.nan, 0),
        ("image_cotangent", 0, torch.inf, 1),
        ("image_cotangent", 2, torch.inf, 0),
    ],
)
def test_flags_of_step_x(where, lane, bad, flagged):
    given = step_x_inputs(396, HALF, SINGLE)
    given[where][lane, 395] = bad
    assert agree_flag("step_x", table(mode=MODES), given, channels=3) == [flagged * (each == lane) for each in range(5)]


def agree_flag(function, lanes, given, channels):
    flags = [getattr(room, function)(lanes, **given, channels=channels)[-1].tolist() for room in (naive, Fused)]
    assert flags[0] == flags[1]
    return flags[1]


def test_a_flag_is_never_cleared():
    given = step_z_inputs(64, HALF)
    flag = torch.tensor([0, 7, 1, 0, 0], dtype=torch.int32, device=DEVICE)
    z_t = given["eps_theta"].clone()
    state = given.pop("z"), given.pop("m"), given.pop("v")
    launch.step_z(table(), state, z_t=z_t, z_network=z_t.clone(), flag=flag, channels=4, **given)
    assert flag.tolist() == [0, 7, 1, 0, 0]


def test_runs_and_orders_of_lanes_give_the_same_bits():
    lanes, given = table(), step_z_inputs(144, HALF)
    first, again = (Fused.step_z(lanes, **given, channels=4) for _ in range(2))
    order = torch.tensor([3, 0, 4, 1, 2], device=DEVICE)
    moved = {name: each[order] if len(each) == 5 else each for name, each in given.items()}
    permuted = Fused.step_z(Lanes(lanes.whole[order], lanes.real[order]), **moved, channels=4)
    for number, (a, b, c) in enumerate(zip(first, again, permuted)):
        assert torch.equal(a, b) and torch.equal(a if number < 3 else a[order], c)


@pytest.mark.parametrize(
    "name, change",
    [
        ("eps_theta", lambda t: t.float()[:, :-1]),
        ("eps_theta", lambda t: t.double()),
        ("cotangent", lambda t: t.t().contiguous().t()),
        ("eps", lambda t: t.half()),
        ("m", lambda t: t[1:]),
        ("repulsion", lambda t: t[:, 1:]),
    ],
)
def test_wrong_tensors_are_named(name, change):
    given = step_z_inputs(64, HALF)
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=f"^{name} is .* allowed is"):
        Fused.step_z(table(), **given)


@pytest.mark.parametrize("channels", [0, 3, 32])
def test_wrong_channels_are_named(channels):
    with pytest.raises(ValueError, match=f"channels is {channels}, allowed is"):
        Fused.noise_zt(table(), torch.zeros(7, 64, device=DEVICE), HALF, channels)


def test_a_column_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="'rate' does not exist"):
        Lanes.pack([{"slot": 0, "rate": 0.1}])


# Against engine/reference.py: three jobs that come and go at different ticks in one batch, one lane of it empty.
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


COMPILE = """
from rlsd.kernels.aot import compile_kernel
from rlsd.kernels.step import KERNELS
assert len({kernel.name for kernel in KERNELS}) == len(KERNELS) == 9
for kernel in KERNELS:
    cubin = compile_kernel(kernel, 90)
    assert cubin.binary[:4] == b"\\x7fELF" and cubin.shared <= 48 * 1024, cubin.line
    print(cubin.line)
"""


def test_every_kernel_compiles():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9
