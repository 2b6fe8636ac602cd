"""The shipped prior on the GPU against the CPU in float32: its operators, and 50-step reconstructions, repeated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from rlsd.bench.gpu import Line
from rlsd.bench.gpu.steps import without_figure
from rlsd.bench.gpu.subject import Bench
from rlsd.engine import Engine, Job, Params, Result
from rlsd.models.fashion import PATH

PARAMS = Params(steps=50, rho=0.1, lr_x=0.1, lr_z=0.05, gamma=5.0)  # the fashion prior's own, fewer steps
PARTICLES, SEED, DECIBELS = 4, 7, 0.1
IMAGES = ("0002-trouser", "0013-dress")


OPERATORS = ("inpainting", "gaussian_blur", "phase_retrieval")  # of the bundle; float32 products among them
EXACT = 1e-5  # relative: they are not to be rounded to TF32


def agreement(bench: Bench, bundle: Path, steps: int = PARAMS.steps) -> list[Line]:
    """A line for the operators and one for each image; bundle: fashion's for this device."""
    lines = [_operators(bench, bundle)]
    for name in IMAGES:
        line: Line = {"section": "agreement", "case": f"fashion {name}", "method": "engine", "particles": PARTICLES}
        try:
            line |= _compare(bench, bundle, name, steps)
        except Exception as error:
            line |= without_figure(error)
        lines.append(line)
    return lines


def _compare(bench: Bench, bundle: Path, name: str, steps: int) -> Line:
    pixels = np.asarray(Image.open(PATH / "test_images" / f"{name}.png"), np.float32) / 127.5 - 1
    image = np.pad(pixels, 2, constant_values=-1)[None]
    mask = np.zeros_like(image)
    mask[..., :16] = 1
    params = Params(**{**PARAMS.__dict__, "steps": steps})
    given = Job(image * mask, "inpainting", {"mask": mask}, PARTICLES, seed=SEED, params=params)
    with Engine(PATH / "bundle") as engine:
        want = engine.reconstruct([given])[0]
    with bench.open(bundle) as engine:
        got, again = engine.reconstruct([given])[0], engine.reconstruct([given])[0]
        counts = {key: engine.stats().get(key, 0) for key in ("redone", "not_recorded")}
    return judge(want, got, again, image) | {"steps": steps, **counts}


def _operators(bench: Bench, bundle: Path) -> Line:
    line: Line = {"section": "agreement", "case": "fashion operators", "method": "engine", "unit": "relative error"}
    x = np.random.default_rng(0).uniform(-1, 1, (4, 1, 32, 32)).astype(np.float32)
    mask = {"mask": np.ones((1, 1, 32, 32), np.float32)}
    try:
        with Engine(PATH / "bundle") as cpu, bench.open(bundle) as engine:
            for name in OPERATORS:
                want, got = (each.measure(name, x, **(mask if name == "inpainting" else {})) for each in (cpu, engine))
                line[name] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        line["median"] = worst = float(np.max([line[name] for name in OPERATORS]))  # of which one may be NaN
        if not worst <= EXACT:
            line["wrong"] = f"an operator's value differs by {worst:.1e} from the CPU's, allowed {EXACT:.0e}"
    except Exception as error:
        line |= without_figure(error)
    return line


def judge(want: Result, got: Result, again: Result, image: np.ndarray) -> Line:
    """Figures of the comparison; `wrong` where PSNR differs by more than DECIBELS or the repeated bytes differ."""
    found: Line = {"unit": "dB", "same_bytes_repeated": bool(np.array_equal(got.particles, again.particles))}
    for what, of in (("mean_image", mean_image), ("particles", particles)):
        found[f"psnr_{what}"] = round(of(got.particles, image), 4)
        found[f"difference_{what}"] = round(of(got.particles, image) - of(want.particles, image), 4)
    found["median"] = worst = float(np.abs([found["difference_mean_image"], found["difference_particles"]]).max())
    if not worst <= DECIBELS:
        found["wrong"] = f"PSNR differs by {worst:.3f} dB from the CPU's, allowed {DECIBELS}"
    elif not found["same_bytes_repeated"]:
        found["wrong"] = "repeated, the reconstruction has other bytes"
    return found


def psnr(x: np.ndarray, image: np.ndarray) -> float:
    """Decibels on [-1, 1] after clipping."""
    return float(10 * np.log10(4 / np.mean((x.clip(-1, 1) - image) ** 2)))


def mean_image(x: np.ndarray, image: np.ndarray) -> float:
    """Of the particles' mean image."""
    return psnr(x.mean(0), image)


def particles(x: np.ndarray, image: np.ndarray) -> float:
    """Mean over the particles."""
    return float(np.mean([psnr(each, image) for each in x]))
