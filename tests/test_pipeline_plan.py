"""A GPU's memory planned from a manifest: counted by hand, and divided into batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsd.pipeline.plan import Plan, Seat, read_plan

MANIFEST = """rlsd-bundle 1
target cuda
latent 1 2 2
image 1 4 4
context 3 5
feature_dim 7
operator box 1 2 2
operator blur 1 4 4
operator_param blur kernel 3 3
graph denoiser 2 d2.onnx
graph denoiser 1 d1.onnx
info kept context 2 88
info kept decoder 2 300
info peak decoder 2 500
info peak denoiser 2 700
weights w.bin
file w.bin 1000 0
end 0
"""


def test_bytes_by_hand(tmp_path: Path) -> None:
    (tmp_path / "manifest.txt").write_text(MANIFEST)
    latent, image, operator, keys = 4, 16, 16 + 9, 88 // 2  # the largest operator's; of a sample
    lane = latent * (4 + 5 * 2) + image * (2 * 4 + 2 * 2) + 4 * operator + 2 * keys
    lane += 7 * 2 * 2 + 2 * image  # features and the cotangents of both
    state = 2 * 3 * 4 * (latent + image)  # with two moments, and all of it as it was before the tick
    plan = read_plan(tmp_path)
    assert plan == Plan(1000, state, 4 * operator + keys, [Seat(1, lane, None), Seat(2, 2 * lane + 300, 500 + 700)])
    assert plan.batches(3) == [2, 1]
    assert plan.total(3, jobs=2) == 1000 + 3 * state + 2 * (4 * operator + keys) + 1200 + 3 * lane + 300
    assert plan.total(4) - plan.total(2) == 2 * state + 2 * lane + 300  # two seats share what their graphs take
    for n in (1, 2, 5):
        assert plan.most_particles(plan.total(n)) == n and plan.most_particles(plan.total(n) - 1) == n - 1


@pytest.mark.parametrize(
    ("sizes", "particles", "batches"),
    [((1, 2, 4), 3, [2, 1]), ((1, 2, 4), 4, [4]), ((1, 2, 4), 7, [4, 2, 1]), ((2, 8), 7, [8]), ((2, 8), 5, [2, 2, 2])],
)
def test_few_large_batches_unless_much_of_them_is_empty(sizes: tuple[int, ...], particles: int, batches: list) -> None:
    """A batch costs its size and a quarter of a particle: (2, 8) takes 8.25 for 7 in one, and 9 in four."""
    assert Plan(0, 0, 0, [Seat(size, 0, 0) for size in sizes]).batches(particles) == batches
