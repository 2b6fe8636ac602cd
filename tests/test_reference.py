"""engine/reference.py and the engine's tools: random numbers against known answers, repulsion from its definition."""

import numpy as np
import pytest

from rlsd.engine import normal, reference, repulsion

# Random123's known answers for philox4x32-10: counter, key, output.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]  # fmt: skip


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011) on Python's integers."""
    c, k, low = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


@pytest.mark.parametrize("counter, key, wanted", KNOWN)
def test_known_answers(counter, key, wanted):
    assert philox(counter, key) == wanted


@pytest.mark.parametrize("seed, item, particle, stream", [(0, 0, 0, 0), (2**63 + 5, 2**32 - 1, 7, 2**31), (3, 1, 2, 9)])
def test_normals_are_box_muller_of_philox(seed, item, particle, stream):
    wanted = []
    for block in range(3):
        u = [(r + 0.5) * 2.0**-32 for r in philox([block, stream, particle, item], [seed & 0xFFFFFFFF, seed >> 32])]
        for a, b in (u[:2], u[2:]):
            radius = np.sqrt(-2 * np.log(a))
            wanted += [radius * np.cos(2 * np.pi * b), radius * np.sin(2 * np.pi * b)]
    for count in (1, 3, 4, 11):
        np.testing.assert_allclose(normal(seed, item, particle, stream, count), wanted[:count], rtol=1e-6, atol=1e-7)


def test_normals_are_normal():
    x = normal(1, 2, 3, 4, 400_000).astype(np.float64)
    assert abs(x.mean()) < 4 / np.sqrt(len(x))
    assert abs(x.var() - 1) < 4 * np.sqrt(2 / len(x))
    assert abs((x**4).mean() - 3) < 0.1
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 4 / np.sqrt(len(x))


def by_definition(phi):
    """The repulsion of particles that do not coincide, by loops, as ALGORITHM.md has it."""
    phi = phi.astype(np.float64)
    n = len(phi)
    scale = np.sqrt((phi**2).sum(1).mean())
    g, h = np.zeros_like(phi), np.zeros(n)
    for i in range(n):
        d = {j: np.linalg.norm(phi[i] - phi[j]) for j in range(n) if j != i}
        h[i] = max(sorted(d.values())[(n - 2) // 2] ** 2 / np.log(max(n - 1, 2)), (1e-2 * scale) ** 2)
        k = {j: np.exp(-(d[j] ** 2) / h[i]) for j in d}
        for j in d:
            g[i] += 2 * k[j] * (phi[i] - phi[j]) / h[i]
        g[i] /= sum(k.values())
    return g, h


@pytest.mark.parametrize("n, d", [(2, 1), (2, 5), (3, 7), (4, 384), (9, 33), (16, 1), (33, 2000)])
def test_repulsion_is_its_definition(n, d):
    phi = np.random.default_rng(n).standard_normal((n, d)).astype(np.float32)
    wanted, h = by_definition(phi)
    g, bandwidth = repulsion(phi)
    np.testing.assert_allclose(g, wanted, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(bandwidth, h, rtol=1e-5)
    plain = reference.repulsion(phi.astype(np.float64), 0, 0, 0)
    np.testing.assert_allclose(plain, wanted, atol=1e-12 * np.abs(wanted).max())


def test_the_median_is_torchs():
    torch = pytest.importorskip("torch")
    for n in (3, 4, 5, 8):
        phi = np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32)
        d = torch.cdist(torch.from_numpy(phi).double(), torch.from_numpy(phi).double())
        median = torch.stack([torch.cat([d[i, :i], d[i, i + 1 :]]).median() for i in range(n)])
        np.testing.assert_allclose(repulsion(phi)[1], median**2 / np.log(max(n - 1, 2)), rtol=1e-5)


def test_no_cancellation_among_close_particles():
    """Particles that differ by 1e-3 of their norm: the Gram form in float32 loses them."""
    rng = np.random.default_rng(0)
    phi = (rng.standard_normal(16384) + 1e-3 * rng.standard_normal((4, 16384))).astype(np.float32)
    wanted, _ = by_definition(phi)
    np.testing.assert_allclose(repulsion(phi)[0], wanted, atol=1e-5 * np.abs(wanted).max())


def test_repulsion_of_arrays_of_other_kinds():
    """float64, and columns first: the core gets a copy."""
    phi = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    for same in (phi.astype(np.float64), np.asfortranarray(phi), phi.repeat(2, 0)[::2]):
        for found, wanted in zip(repulsion(same), repulsion(phi)):
            assert found.tobytes() == wanted.tobytes()


def test_one_particle_has_nobody_to_repel():
    g, h = repulsion(np.ones((1, 3), np.float32))
    assert not g.any() and h[0] == 0


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("value", [0.0, 1.0, -1e-3])
def test_coincident_particles_are_driven_apart(n, value):
    phi = np.full((n, 6), value, np.float32)
    g, h = repulsion(phi, seed=3, item=1, step=2)
    assert np.isfinite(g).all() and np.isfinite(h).all() and (np.linalg.norm(g, axis=1) > 0).all()
    np.testing.assert_allclose(g.sum(0), 0, atol=1e-4 * np.abs(g).max())  # every pair pushes both ways
    np.testing.assert_allclose(
        g, reference.repulsion(phi.astype(np.float64), 3, 1, 2), rtol=1e-4, atol=1e-4 * np.abs(g).max()
    )
    assert not np.array_equal(g, repulsion(phi, seed=3, item=1, step=3)[0])


def test_two_coincide_among_others():
    phi = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    phi[3] = phi[1]
    wanted = reference.repulsion(phi.astype(np.float64), 1, 2, 3)
    np.testing.assert_allclose(repulsion(phi, 1, 2, 3)[0], wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_far_particle_is_finite():
    phi = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    phi[0] += 1e6
    g, _ = repulsion(phi)
    assert np.isfinite(g).all()


def test_a_permutation_permutes():
    phi = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    order = np.random.default_rng(1).permutation(7)
    np.testing.assert_allclose(repulsion(phi[order])[0], repulsion(phi)[0][order], rtol=1e-4, atol=1e-6)
