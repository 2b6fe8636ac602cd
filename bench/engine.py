"""Full steps of the engine on the fashion bundle against PyTorch: particle-steps per second on this machine.

    python -m rlsd.bench.engine

Engine, `shared` (eager PyTorch, our algebra) and `published` (eager PyTorch, the authors' structure) first have to
agree on the particles; then they run in turn, round by round. One JSON line for each case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from rlsd.bench import measure
from rlsd.bench.baselines import TorchLoop
from rlsd.engine import Engine, Job, Params
from rlsd.export.checkpoint import load
from rlsd.export.package import Networks
from rlsd.export.trace import to_aten
from rlsd.models.fashion import PATH

OPERATOR = "inpainting"
PARAMS = Params(steps=900, gamma=20.0, lr_z=0.05, lr_x=0.1)


def main() -> None:
    """Checks, measures, prints a table and appends to bench/results/engine-cpu.jsonl."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--particles", type=int, nargs="+", default=[4, 16, 64])
    arguments.add_argument("--bundle", default=str(PATH / "bundle"))
    options = arguments.parse_args()
    networks = frozen(load(PATH / "checkpoint", None, [OPERATOR], None))
    peak, lines = measure.matrix_peak(), []
    for particles in options.particles:
        error = check(networks, options.bundle, particles)
        lines += compare(networks, options.bundle, particles, options.rounds, error, peak)
    print_table(lines)
    print("appended to", measure.record("engine-cpu", lines))


def frozen(networks: Networks) -> Networks:
    """No gradients for weights: the baselines must not pay for them."""
    for module in (networks.denoiser, networks.decoder, networks.features):
        assert module is not None
        module.requires_grad_(False).eval()
    return networks


def problem(networks: Networks) -> tuple[np.ndarray, np.ndarray]:
    """A measurement and its mask: the right half of an image is missing."""
    mask = np.zeros((1, *networks.image[1:]), np.float32)
    mask[..., : networks.image[2] // 2] = 1
    row = np.linspace(-1, 1, networks.image[2], dtype=np.float32)
    return np.broadcast_to(row, networks.image).astype(np.float32) * mask, mask


def torch_loop(networks: Networks, particles: int, published: bool, params: Params = PARAMS) -> TorchLoop:
    """One of the two PyTorch loops on the benchmark's problem."""
    y, mask = problem(networks)
    operator = networks.operators[OPERATOR]
    given = torch.from_numpy(mask).expand(particles, *mask.shape)
    return TorchLoop(
        networks, lambda x: operator(x, given), torch.from_numpy(y), particles, params, published=published
    )


def job(networks: Networks, particles: int, params: Params = PARAMS) -> Job:
    """The benchmark's problem as a job of the engine."""
    y, mask = problem(networks)
    return Job(y=y, operator=OPERATOR, operator_params={"mask": mask}, particles=particles, params=params)


def check(networks: Networks, bundle: str, particles: int) -> float:
    """The largest relative difference of the particles after a few steps; raises when the three do not agree."""
    params = Params(steps=6, gamma=PARAMS.gamma, lr_z=PARAMS.lr_z, lr_x=PARAMS.lr_x)
    with Engine(bundle) as engine:
        (result,) = engine.reconstruct([job(networks, particles, params)])
    worst = 0.0
    for published in (False, True):
        loop = torch_loop(networks, particles, published, params)
        for _ in range(params.steps - 1):
            loop.step()
        error = float(np.linalg.norm(loop.x.numpy() - result.particles) / np.linalg.norm(result.particles))
        worst = max(worst, error)
    if not worst <= 1e-3:
        raise SystemExit(f"N = {particles}: engine and PyTorch differ by {worst:.1e}; no figure without agreement")
    return worst


def compare(networks: Networks, bundle: str, particles: int, rounds: int, error: float, peak: float) -> list[dict]:
    """Interleaved rounds of the three; a result line for each."""
    with Engine(bundle) as engine:
        engine.submit(job(networks, particles))
        steps = max(1, round(128 / particles))

        def ticks() -> int:
            for _ in range(steps):
                engine.tick()
            return steps * particles

        cases: dict[str, Callable[[], int]] = {"engine": ticks}
        for name in ("shared", "published"):
            cases[name] = stepping(torch_loop(networks, particles, published=name == "published"), steps)
        measure.interleaved(cases, 1)
        before = engine.stats()
        rates = measure.interleaved(cases, rounds)
        after = engine.stats()
        engine.cancel()
    work = flops(networks)
    lines = []
    for name, values in rates.items():
        figures = measure.quartiles(values)
        ratio = measure.quartiles([mine / theirs for mine, theirs in zip(rates["engine"], values)])
        lines.append(
            {
                "bench": "engine-cpu", "case": name, "particles": particles, "unit": "particle-steps/s", **figures,
                "engine_ratio": ratio, "rounds": rounds, "check_relative_error": error,
                "roofline_share": round(figures["median"] * work / peak, 4), "peak_flops": round(peak),
            }
        )  # fmt: skip
    lines[0]["outside_graphs_share"] = round(outside(before, after), 4)
    return lines


def stepping(loop: TorchLoop, steps: int) -> Callable[[], int]:
    """A case for `interleaved`: so many steps of the loop."""

    def run() -> int:
        for _ in range(steps):
            loop.step()
        return steps * loop.particles

    return run


def outside(before: dict, after: dict) -> float:
    """Engine time outside the graphs (repulsion, noise, Adam, checks) as a share of all busy time."""
    spent = {key: after[key] - before[key] for key in after}
    graphs = sum(spent[key] for key in ("denoiser", "decoder", "decoder_pull", "features", "operators"))
    own = spent["repulsion"] + spent["elementwise"]
    return own / (graphs + own)


def flops(networks: Networks) -> float:
    """Floating-point operations of one particle-step in our algebra: denoiser, decoder, features, both pull-backs."""
    assert networks.null_context is not None
    assert networks.features is not None
    z = torch.zeros(1, *networks.latent)
    args = [z, torch.zeros(1, dtype=torch.long), networks.null_context[None]]
    denoiser, decoder = to_aten(networks.denoiser, args), to_aten(networks.decoder, [z])
    features = to_aten(networks.features, [torch.zeros(1, *networks.image)])
    with FlopCounterMode(display=False) as counter:
        denoiser(*args)
        features(decoder(z.requires_grad_(True))).sum().backward()
    return float(counter.get_total_flops())


def print_table(lines: list[dict]) -> None:
    """The result lines as a table."""
    table = Table("N", "case", "particle-steps/s", "quartiles", "engine is faster by", "roofline", "outside graphs")
    for line in lines:
        share = line.get("outside_graphs_share")
        table.add_row(
            str(line["particles"]), line["case"], f"{line['median']:.1f}", f"{line['q1']:.1f} to {line['q3']:.1f}",
            f"{line['engine_ratio']['median']:.2f}x", f"{line['roofline_share']:.0%}",
            f"{share:.2%}" if share is not None else "",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
