"""B: the denoiser alone. C: the decoder forward, and forward and pulled back, with the memory a particle keeps.

The engine's figures are its own seconds in these graphs (rlsd_stats: CUDA events on a GPU) while it takes full steps
of so many particles, whose result was checked; PyTorch's are calls of the networks, checked against float32, timed
between those steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlsd.bench import measure
from rlsd.bench.gpu import Line
from rlsd.bench.gpu.steps import GRAPHS, mode, speedups, without_figure
from rlsd.bench.gpu.subject import FLOOR, PLAIN_LIMIT, Subject, Wrong, free, untimed
from rlsd.bench.gpu.timing import Clock
from rlsd.bench.gpu.torch_step import Method
from rlsd.export.package import Networks

COVERED = 0.5  # of a step's time the graphs' seconds must explain, or they are not what the graphs cost


@dataclass(frozen=True)
class Part:
    """What is timed: the engine's graphs, and the same of PyTorch's networks."""

    section: str
    title: str
    graphs: tuple[str, ...]
    call: Callable[[Networks, Mapping[str, Tensor]], Tensor]
    methods: tuple[str, ...] = ("shared", "xformers", "compiled")


def denoise(networks: Networks, given: Mapping[str, Tensor]) -> Tensor:
    """eps of z_t [B, *latent]."""
    context = [given["context"]] if "context" in given else []
    with torch.no_grad():
        return networks.denoiser(given["z"], given["t"], *context)


def decode(networks: Networks, given: Mapping[str, Tensor]) -> Tensor:
    """D(z) [B, *image], without a graph."""
    with torch.no_grad():
        return networks.decoder(given["z"])


def decode_and_pull(networks: Networks, given: Mapping[str, Tensor]) -> Tensor:
    """The cotangent of z for one of D(z)."""
    z = given["z"].detach().requires_grad_(True)
    return torch.autograd.grad(networks.decoder(z), z, given["cotangent"])[0]


PARTS = (
    Part("B", "denoiser", ("denoiser",), denoise),
    Part("C", "decoder", ("decoder",), decode, ("shared", "xformers")),  # compiling it without a graph too: minutes
    Part("C", "decoder and pull-back", ("decoder", "decoder_pull"), decode_and_pull),
)


def parts(subject: Subject, batch: int, methods: Sequence[str]) -> list[Line]:
    """Sections B and C for one batch, the engine beside those of `methods` that are about the networks."""
    left = [part for part in PARTS if set(part.methods) & set(methods) or not methods]
    lines: list[Line] = []
    try:
        error = subject.check("engine", batch)
        free()
        with subject.in_flight(batch):
            while left:
                lines += _part(subject, left[0], batch, error, methods)
                left.pop(0)
        return lines
    except Exception as problem:  # what is measured stays
        broken = {"case": f"{subject.name} B={batch}", "batch": batch, "network": subject.name, "method": "engine"}
        sections = dict.fromkeys(part.section for part in left)
        return lines + [{"section": section, **broken, **without_figure(problem)} for section in sections]


def _part(subject: Subject, part: Part, batch: int, engine_error: float, methods: Sequence[str]) -> list[Line]:
    bench = subject.bench
    common: Line = {
        "section": part.section, "case": f"{subject.name} {part.title} B={batch}", "network": subject.name,
        "batch": batch, "both_ways": len(part.graphs) == 2,
    }  # fmt: skip
    runs, facts, lines = _torch_runs(subject, part, batch, common, methods)
    facts["engine"] = {"error": engine_error}
    if part.section == "C":
        facts["engine"]["gb_per_particle"] = round(subject.engine.bytes_per_particle / 1e9, 4)
    clock, share = Clock(bench.device), _EngineClock(subject, part.graphs)
    for run in runs.values():
        run()
    everything = {"engine": share.step, **runs}
    times = measure.interleaved(
        everything, bench.rounds, lambda run: share() if run is everything["engine"] else clock(run), bench.limit
    )
    if share.explained() < COVERED:
        wrong = f"the graphs' seconds explain {share.explained():.0%} of the steps, {COVERED:.0%} are wanted"
        lines.append({**common, "method": "engine", "wrong": wrong})
        times.pop("engine")
    least = subject.work.least_seconds(bench.roof, batch, part.graphs)
    for name, values in times.items():
        line = {**common, "method": name, "unit": "ms", **measure.quartiles([1e3 * v for v in values]), **facts[name]}
        line |= {"rounds": len(values), "roofline_share": round(1e3 * least / line["median"], 4)}
        line |= {"operations": subject.work.operations(batch, part.graphs)}
        line |= {"bytes": subject.work.moved(batch, part.graphs)}
        lines.append(line | ({"speedup": speedups(times)} if name == "engine" else {}))
    return lines


class _EngineClock:
    """Seconds in some graphs of one tick, by the engine's own account."""

    def __init__(self, subject: Subject, graphs: tuple[str, ...]):
        self.engine, self.graphs = subject.engine, graphs
        self.first = self.engine.stats()

    def step(self) -> None:
        self.engine.tick()

    def __call__(self) -> float:
        before = self.engine.stats()
        self.step()
        after = self.engine.stats()
        return sum(after[graph] - before[graph] for graph in self.graphs)

    def explained(self) -> float:
        """What share of the time inside ticks all graphs' seconds add up to."""
        now = self.engine.stats()
        spent = {key: now[key] - self.first[key] for key in now}
        return sum(spent[name] for name in GRAPHS) / spent["wall"]


def _torch_runs(
    subject: Subject, part: Part, batch: int, common: Line, methods: Sequence[str]
) -> tuple[dict[str, Callable[[], Any]], dict[str, Line], list[Line]]:
    """PyTorch's methods that passed the check: their calls, what is known of them, and lines for the others."""
    runs: dict[str, Callable[[], Any]] = {}
    facts: dict[str, Line] = {}
    lines: list[Line] = []
    for name in [name for name in part.methods if name in methods]:
        try:
            error = check(subject, part, name, batch)
            method, given = subject.method(name), inputs(subject.method(name), batch)
            facts[name] = {"error": error, **mode(subject, name)}
            if len(part.graphs) == 2:
                facts[name]["gb_per_particle"] = round(kept_bytes(method.networks, given) / batch / 1e9, 4)
            runs[name] = lambda method=method, given=given: part.call(method.networks, given)  # type: ignore[misc]
        except Exception as problem:
            lines.append({**common, "method": name, **without_figure(problem)})
    return runs, facts, lines


def check(subject: Subject, part: Part, name: str, batch: int) -> float:
    """Relative error of a method's networks against float32. Raises Wrong, LeftOut.

    They may err twice as much as plain halves do, whether those are to be timed or not.
    """
    key = f"{name}, {part.title}", batch
    if key not in subject.errors:
        given = inputs(subject.method(name), batch)
        error = relative(part.call(subject.method(name).networks, given), _exact(subject, part, given))
        allowed = PLAIN_LIMIT if name == "shared" else max(2 * check(subject, part, "shared", batch), FLOOR)
        if not error <= allowed:
            raise Wrong(f"relative error {error:.1e}, allowed {allowed:.1e}")
        subject.errors[key] = error
    return subject.errors[key]


def inputs(method: Method, batch: int) -> dict[str, Tensor]:
    """Seeded: z, t, cotangent, and the null context where there is one."""
    networks, device, dtype = method.networks, method.device, method.dtype
    generator = torch.Generator().manual_seed(batch)

    def drawn(shape: Any) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(device, dtype, memory_format=method.layout)

    steps = len(networks.alphas_cumprod)
    given = {"z": drawn(networks.latent), "cotangent": drawn(networks.image)}
    given["t"] = (torch.arange(batch) * (steps // 2) % steps).to(device)
    if networks.null_context is not None:
        null = networks.null_context.to(device, dtype)
        given["context"] = null.expand(batch, *null.shape)
    return given


def _exact(subject: Subject, part: Part, given: Mapping[str, Tensor]) -> Tensor:
    """The same in float32, one sample at a time."""
    rows = range(len(given["t"]))
    wide = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    with untimed():
        return torch.cat([part.call(subject.exact, {n: v[i : i + 1] for n, v in wide.items()}) for i in rows])


def relative(got: Tensor, want: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((got.float() - want).norm() / want.norm())


def kept_bytes(networks: Networks, given: Mapping[str, Tensor]) -> int:
    """Bytes of activations that autograd keeps between the decoder and its pull-back."""
    weights = {p.untyped_storage().data_ptr() for p in networks.decoder.parameters()}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        networks.decoder(given["z"].detach().requires_grad_(True))
    return sum(kept.values())
