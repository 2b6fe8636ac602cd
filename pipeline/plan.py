"""Where the memory of a GPU goes for a bundle: counted from its manifest, without a GPU.

What the engine allocates (engine/src/gpu.cpp, seat.cpp) is counted to the byte but for a few small tables; what ONNX
Runtime needs while a graph runs is the peak that `rlsd export` found in the graph, without its libraries' workspaces.
It keeps that for each graph of a batch once, however many seats of the batch there are; in the first run of a graph it
takes more for a moment, and where that does not fit the engine chooses smaller batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rlsd.engine.files import MANIFEST, read_manifest
from rlsd.pipeline.errors import InputError

HALF, FLOAT = 2, 4
LAUNCHES = 0.25  # of a batch's time that does not depend on its size, in particles: engine/src/gpu_pack.cpp
STATE = 2 * 3 * FLOAT  # value and two moments, and a copy of them from before the tick
Counted = dict[tuple[str, str, int], int]  # bytes by kind, graph and batch


@dataclass(frozen=True)
class Seat:
    """Bytes of a batch on the device: tensors that graphs read and write, and what runs of its graphs need.

    graphs: for all seats of this batch together, who take turns; None where the bundle does not say.
    """

    batch: int
    tensors: int
    graphs: int | None


@dataclass(frozen=True)
class Plan:
    """Bytes: weights once; each particle's state; each job's inputs; each seat."""

    weights: int
    particle: int
    job: int
    seats: Sequence[Seat]

    def total(self, particles: int, jobs: int = 1) -> int:
        """With so many particles in flight, each in a seat of its own."""
        known = {seat.batch: seat for seat in self.seats}
        batches = self.batches(particles)
        graphs = sum(known[batch].graphs or 0 for batch in set(batches))
        tensors = sum(known[batch].tensors for batch in batches)
        return self.weights + particles * self.particle + jobs * self.job + graphs + tensors

    def batches(self, particles: int) -> list[int]:
        """The batches in which the engine seats them, as long as `rlsd tune` has not measured others to be faster."""
        least, last = [0.0], [0]
        for n in range(1, particles + 1):
            times = [(seat.batch + least[max(0, n - seat.batch)], seat.batch) for seat in self.seats]
            time, batch = min(times, key=lambda each: each[0])
            least.append(time + LAUNCHES)
            last.append(batch)
        found = []
        while particles > 0:
            found.append(last[particles])
            particles -= last[particles]
        return sorted(found, reverse=True)

    def most_particles(self, memory: int) -> int:
        """How many fit with the kept activations of all: what one job under repulsion can have at full speed."""
        lane = self.particle + min(seat.tensors // seat.batch for seat in self.seats)
        room = max(0, memory - self.weights - self.job) // max(1, lane)
        return next((n for n in range(room, 0, -1) if self.total(n) <= memory), 0)


def read_plan(bundle: Path) -> Plan:
    """The plan of a bundle for CUDA. InputError for another."""
    try:
        lines = [words for words in map(str.split, read_manifest(bundle)) if words]
    except OSError:
        raise InputError(f"{bundle}: no bundle here: its manifest.txt cannot be read") from None
    facts = {words[0]: words[1:] for words in lines if len(words) > 1}
    if facts.get("target") != ["cuda"]:
        raise InputError(f"{bundle}: the plan is of the memory of a GPU, and this bundle is not for CUDA")
    info = _counted(bundle, lines)
    try:
        plan = _plan(lines, facts, info)
    except (KeyError, ValueError, IndexError):
        plan = None
    if plan is None or not plan.seats or lines[-1][0] != "end":
        raise InputError(f"{bundle}: its {MANIFEST} is not that of a whole bundle")
    return plan


def _plan(lines: Sequence[Sequence[str]], facts: Mapping[str, Sequence[str]], info: Counted) -> Plan:
    """The plan, by the manifest's lines as words. KeyError, ValueError or IndexError where they lack something."""
    latent, image = (prod(map(int, facts[name])) for name in ("latent", "image"))
    context = prod(map(int, facts["context"])) if "context" in facts else 0
    features = int(facts["feature_dim"][0]) if "feature_dim" in facts else 0
    operators = {w[1]: prod(map(int, w[2:])) for w in lines if w[0] == "operator"}
    for words in lines:
        if words[0] == "operator_param":
            operators[words[1]] += prod(map(int, words[3:]))
    operator = max(operators.values(), default=0)
    sizes = {words[1]: int(words[2]) for words in lines if words[0] == "file"}
    contexts = [(value, size) for (kind, name, size), value in info.items() if (kind, name) == ("kept", "context")]
    keys = contexts[0][0] // contexts[0][1] if contexts else HALF * context
    per_lane = latent * (FLOAT + 5 * HALF) + image * (2 * FLOAT + 2 * HALF) + FLOAT * operator + 2 * keys
    per_lane += features * 2 * HALF + (image * HALF if features else 0)
    seats = []
    for batch in sorted({int(w[2]) for w in lines if w[0] == "graph" and w[1] == "denoiser"}):
        kept = sum(
            value
            for (kind, name, size), value in info.items()
            if kind == "kept" and name != "context" and size == batch
        )
        peaks = [value for (kind, _, size), value in info.items() if kind == "peak" and size == batch]
        seats.append(Seat(batch, batch * per_lane + kept, sum(peaks) if peaks else None))
    return Plan(sizes.get(facts.get("weights", [""])[0], 0), STATE * (latent + image), FLOAT * operator + keys, seats)


def _counted(bundle: Path, lines: Sequence[Sequence[str]]) -> Counted:
    """What the lines "info kept|peak GRAPH BATCH BYTES" say; the core does not check them. InputError."""
    counted: Counted = {}
    for words in lines:
        if words[:2] not in (["info", "kept"], ["info", "peak"]):
            continue
        try:
            _, kind, graph, batch, size = words
            counted[kind, graph, int(batch)] = int(size)
            sensible = int(batch) >= 1 and int(size) >= 0
        except ValueError:
            sensible = False
        if not sensible:
            said, wanted = " ".join(words)[:100], f"info {words[1]} GRAPH BATCH BYTES"
            raise InputError(f"{bundle}: the manifest says {said!r}, allowed is '{wanted}' in whole numbers")
    return counted
