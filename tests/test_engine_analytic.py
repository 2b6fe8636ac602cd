"""Where the engine must end is known in closed form: Gaussian prior with its exact score, linear decoder and operator.

Prior z ~ N(mu, diag(s^2)); the table abar is constant, so that the expected dynamics do not change with the step.
With C = abar s^2 + 1 - abar the exact noise prediction is eps_theta(z_t) = sqrt(1-abar) (z_t - sqrt(abar) mu) / C,
and z_t = sqrt(abar) z + sqrt(1-abar) eps gives

    n = eps_theta - eps = sqrt((1-abar) abar) (z - mu) / C  +  ((1-abar)/C - 1) eps.

Its second part is noise of mean zero that does not depend on z. Times lambda omega / M, omega = sqrt((1-abar)/abar),
the expected gradient of z's score term is (lambda / M) ((1-abar)/C) (z - mu) =: q (z - mu), element-wise.

D(z) = W z + b and f(x) = A x are linear, so the whole system is linear with additive symmetric noise; Adam's update is
an odd function of its gradients. Hence the stationary law is symmetric about the point where all expected gradients
vanish, and its mean is that point, for any learning rate that is small enough to be stable:

    without x:  q (z - mu) + W'A'(A(Wz + b) - y) / Y = 0
    with x:     q (z - mu) + W'(Wz + b - x) / P = 0  and  A'(Ax - y) / Y + (rho/P)(x - Wz - b) = 0

(M, P, Y: sizes of z, x, y). The mean over particles must be there within its own standard error.
"""

import numpy as np
import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from tiny import HIDDEN, M, Nets, P, make_job, make_nets

from rlsd.engine import Engine, Params

ABAR, LAMBDA, RHO, PARTICLES, STEPS = 0.6, 0.4, 0.7, 256, 3000


def gaussian_nets() -> tuple[Nets, np.ndarray, np.ndarray]:
    """Linear networks whose denoiser knows the prior; mu, s."""
    nets = make_nets(3, linear=True)
    rng = np.random.default_rng(4)
    mu, s = rng.standard_normal(M), rng.uniform(0.2, 0.6, M)
    variance = ABAR * s**2 + 1 - ABAR
    slope = np.sqrt(1 - ABAR) / variance
    nets.weights["W2"][:] = 0
    nets.weights["bias"] = np.zeros((STEPS, HIDDEN), np.float32)
    nets.weights["slope"] = np.tile(slope, (STEPS, 1)).astype(np.float32)
    nets.weights["offset"] = np.tile(-np.sqrt(ABAR) * slope * mu, (STEPS, 1)).astype(np.float32)
    nets.abar = np.full(STEPS, ABAR)
    return nets, mu, LAMBDA / M * (1 - ABAR) / variance


def stationary(nets: Nets, mu: np.ndarray, q: np.ndarray, job, variant: str) -> np.ndarray:
    """The result [P] at which all expected gradients vanish."""
    w = {name: values.astype(np.float64) for name, values in nets.weights.items()}
    W, b = (w["V1"] @ w["V2"]).T, w["b1"] @ w["V2"] + w["b2"]
    A = np.diag(job.operator_params["mask"].ravel().astype(np.float64))
    y, Y, Q = job.y.ravel(), P, np.diag(q)
    if variant == "rlsd-nonaug":
        z = np.linalg.solve(Q + W.T @ A.T @ A @ W / Y, Q @ mu + W.T @ A.T @ (y - A @ b) / Y)
        return W @ z + b
    system = np.block([[Q + W.T @ W / P, -W.T / P], [-RHO / P * W, A.T @ A / Y + RHO / P * np.eye(P)]])
    both = np.linalg.solve(system, np.concatenate([Q @ mu - W.T @ b / P, A.T @ y / Y + RHO / P * b]))
    return both[M:]


@pytest.mark.parametrize("variant", ["rlsd", "rlsd-nonaug"])
def test_the_mean_is_the_stationary_point(tmp_path, variant):
    nets, mu, q = gaussian_nets()
    params = Params(variant=variant, steps=STEPS, lambda_=LAMBDA, rho=RHO, lr_x=0.03, lr_z=0.03)
    job = make_job(nets, particles=PARTICLES, params=params)
    with Engine(write_bundle(tmp_path / "bundle", nets, 128), max_particles=PARTICLES) as engine:
        found = engine.reconstruct([job])[0].particles.reshape(PARTICLES, P).astype(np.float64)
    wanted = stationary(nets, mu, q, job, variant)
    error = np.abs(found.mean(0) - wanted)
    assert (error < 4.5 * found.std(0) / np.sqrt(PARTICLES) + 1e-3).all()
    assert found.std(0).max() < 0.15 * np.abs(wanted).max()
