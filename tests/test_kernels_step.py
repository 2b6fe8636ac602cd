"""kernels/step against its plain definitions; test_kernels_step_loop.py has those against engine/reference.py."""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from fused_step import DEVICE, SINGLE, Fused

from rlsd.engine import normal
from rlsd.kernels.step import launch, naive
from rlsd.kernels.step.lanes import AUGMENTED, GRADIENT, MOVE_Z, PULLED, Lanes

HALF, DOUBLE = torch.float16, torch.float64
LATENTS = [(1, 1), (7, 1), (129, 1), (64, 4), (144, 4), (60, 3)]  # M, channels
IMAGES = [(1, 1), (513, 1), (60, 3), (396, 3)]  # P, channels
# Some results are not finite on purpose, and NumPy, which interprets the kernels, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EVERY = AUGMENTED | MOVE_Z | GRADIENT | PULLED
SLOTS = [4, -1, 0, 6, 2]  # of the lanes: one is empty, and three rows of the state belong to nobody


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


@pytest.mark.parametrize(
    "where, bad",
    [
        *((where, torch.nan) for where in ("eps_theta", "cotangent", "null", "repulsion", "eps")),
        *((where, -torch.inf) for where in ("eps_theta", "cotangent", "null", "repulsion", "eps")),
        ("repulsion", 1e30),  # whose square v cannot hold: z would stand still and look well
    ],
)
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


COMPILE = """
from rlsd.kernels.aot import Kernel, compile_kernel
from rlsd.kernels.step import KERNELS
from rlsd.kernels.step.triton_kernels import normal_kernel
assert len({kernel.name for kernel in KERNELS}) == len(KERNELS) == 7
for kernel in KERNELS:
    cubin = compile_kernel(kernel, 90)
    assert cubin.binary[:4] == b"\\x7fELF" and cubin.shared <= 48 * 1024, cubin.line
    print(cubin.line)
words = dict.fromkeys(("k0", "k1", "item", "particle", "stream", "count"), "i32")  # in no bundle, but in philox_normal
compile_kernel(Kernel("normal", normal_kernel, {"out": "*fp32", **words}, {"BLOCK": 512}), 90)
"""


def test_every_kernel_compiles():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 7


@pytest.mark.parametrize("D, stride", [(24, 32), (1, 16), (600, 608)])
def test_features_go_to_their_rows_and_repulsion_comes_back(D, stride):
    lanes = table(feature_row=[3, -1, 0, 5, 1])
    generator = torch.Generator().manual_seed(4)
    phi = torch.randn(5, D, generator=generator).to(HALF).to(DEVICE)
    rows = torch.full((6, stride), 7.0, device=DEVICE)
    got, want = Fused.gather_features(lanes, phi, rows), naive.gather_features(lanes, phi, rows)
    assert torch.equal(got, want) and torch.equal(got[3, :D], phi[0].float()) and not got[3, D:].any()
    assert (got[[2, 4]] == 7).all()
    alone = Lanes.pack([{"feature_row": 0}, {}], DEVICE)  # an empty lane has no row to fill
    assert torch.equal(Fused.gather_features(alone, phi[:2], rows)[0, :D], phi[0].float())
    assert alone["repulsion_row"].tolist() == alone["feature_row"].tolist() == [[0], [-1]]
    R = (
        torch.randn(6, stride, generator=generator).to(DEVICE)
        * torch.tensor([1e-6, 1e4, 1, 0.0, 1, 30], device=DEVICE)[:, None]
    )
    given, scale = agree("spread_repulsion", lanes, {"repulsion": R}, D=D, level=8.0, network=HALF)
    assert not given[0].any() and not given[1].any() and scale[0] == 0 and scale[1] == 0  # R is 0; no row
    back = given.double() * scale[:, None] * lanes["unscale"] / -lanes["repulsion"]
    torch.testing.assert_close(back[2:], R[[0, 5, 1], :D].double(), rtol=2e-3, atol=2e-3 * float(R[1].abs().max()))


def test_image_scale_weighs_what_the_features_pull_back():
    lanes, arguments = table(), tensors(60, HALF, "x", "m", "v", "gradient", "image", "image_cotangent")
    scale = torch.linspace(-2, 3, 5, device=DEVICE)
    agree("step_x", lanes, {**arguments, "image_scale": scale}, channels=3)
