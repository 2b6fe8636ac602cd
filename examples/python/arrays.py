"""Arrays in, arrays out, with rlsd.engine alone (NumPy and ONNX Runtime; no torch, no files of the pipeline).

    python arrays.py BUNDLE IMAGES.npy OUT.npz [--particles N] [--steps K]

IMAGES: uint8 [n, C, H, W], clean images; each is measured at a quarter of its resolution, with noise.
OUT: y [n, C, H / 4, W / 4], particles [n, N, C, H, W], mean and deviation [n, C, H, W], float32 in [-1, 1].
"""

from __future__ import annotations

import argparse

import numpy as np

from rlsd.engine import Engine, Job, Params, normal

OPERATOR, NOISE = "superres4", 0.02
USER_STREAM = 0xC0000000  # RLSD_STREAM_USER of rlsd.h: random numbers that the engine itself never uses


def measured(engine: Engine, images: np.ndarray) -> np.ndarray:
    """y = f(x) + noise of all images [n, C, H, W], by the bundle's own operator. Raises RlsdError if it has none."""
    y = engine.measure(OPERATOR, images)
    noise = [normal(0, item, 0, USER_STREAM, y[0].size).reshape(y[0].shape) for item in range(len(y))]
    return y + NOISE * np.stack(noise)


def reconstructed(engine: Engine, y: np.ndarray, particles: int, params: Params) -> np.ndarray:
    """[n, N, C, H, W]. All jobs are in flight together; each is reported when it is done."""
    out = np.zeros((len(y), particles, *engine.image_shape), np.float32)
    jobs = [Job(each, OPERATOR, particles=particles, item=item, params=params) for item, each in enumerate(y)]
    waiting = {item: engine.submit(job, out[item]) for item, job in enumerate(jobs)}
    while waiting:
        engine.tick()  # more jobs could be submitted here: they would join the next tick
        for item in [item for item, handle in waiting.items() if handle.done]:
            seconds = waiting.pop(item).result().seconds
            print(f"item {item}: {particles} reconstructions in {seconds:.1f} s")
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("images")
    parser.add_argument("out")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    params = Params(steps=given.steps, rho=0.1, gamma=5, lr_x=0.1, lr_z=0.15)
    with Engine(given.bundle) as engine:
        images = np.load(given.images, allow_pickle=False)
        if images.dtype != np.uint8 or images.shape[1:] != engine.image_shape:
            wanted = ("n", *engine.image_shape)
            parser.error(f"{given.images} is {images.dtype} {images.shape}; it has to be uint8 {wanted}")
        y = measured(engine, images.astype(np.float32) / 127.5 - 1)
        particles = reconstructed(engine, y, given.particles, params)
    np.savez(given.out, y=y, particles=particles, mean=particles.mean(1), deviation=particles.std(1))


if __name__ == "__main__":
    main()
