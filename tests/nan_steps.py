"""NaN put into each output of each network at each step of a run: the engine must find it in that step and say where.

python tests/nan_steps.py        prints the figures; 1 as exit status if one was found late, elsewhere, or not at all

A poisoned graph is the tiny bundle's with a condition at its end: it compares what it was given with what particle p is
known to be at step k, and returns NaN for that lane of the batch alone.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from bundle_factory import make_graphs, write_bundle
from onnx import helper, numpy_helper
from tiny import LATENT, TIMESTEPS, M, P, make_job, make_nets

from rlsd.engine import Engine, Job, Params, RlsdError, Status, normal

Array = np.ndarray
PARTICLES, STEPS, BATCH, ITEM = 3, 7, 2, 5
NETS = make_nets()
NEAR = 1e-5  # how far what a graph is given may be from what is known; a step moves by 0.05
HEADER, CHECKSUM = 96, 64  # bytes of a snapshot before and after its arrays
STREAM_INITIAL_Z, STREAM_INITIAL_X = 0xFFFFFFFF, 0xFFFFFFFE
OUTPUTS = (
    "denoiser.eps", "decoder.image", "decoder.hidden", "decoder.pixels", "decoder_pull.z_cotangent", "features.phi",
    "features_pull.image_cotangent", "operator.inpainting.loss.grad",
)  # fmt: skip


@dataclass(frozen=True)
class State:
    """Where all particles are when step k begins: z [N, M], x [N, P], and the images D(z) [N, P]."""

    z: Array
    x: Array
    image: Array


@dataclass(frozen=True)
class Verdict:
    """output: network and output. found: the tick that failed, or None. fault: what is wrong, or None."""

    output: str
    variant: str
    step: int
    particle: int
    found: int | None
    fault: str | None


def the_job(variant: str) -> Job:
    params = Params(steps=STEPS + 1, gamma=2.0, lr_x=0.05, lr_z=0.05, variant=variant)
    return make_job(NETS, particles=PARTICLES, item=ITEM, params=params)


def undisturbed(bundle: Path, variant: str) -> list[State]:
    """The states when each step of a run on the healthy bundle begins, and at the last decoding."""
    job, states = the_job(variant), []
    with Engine(bundle, threads=1) as engine:
        handle = engine.submit(job)
        z, x = (
            np.stack([normal(job.seed, job.item, p, stream, size) for p in range(PARTICLES)])
            for stream, size in ((STREAM_INITIAL_Z, M), (STREAM_INITIAL_X, P))
        )
        for _ in range(STEPS + 1):
            image = engine.evaluate("decoder", ["image"], z=z.reshape(-1, *LATENT))["image"].reshape(-1, P)
            states.append(State(z, x if variant == "rlsd" else image, image))
            if engine.tick() == 0:
                return states
            values = np.frombuffer(handle.snapshot()[HEADER:-CHECKSUM], np.float32)
            z = values[: PARTICLES * M].reshape(-1, M)
            if variant == "rlsd":
                x = values[3 * PARTICLES * M :][: PARTICLES * P].reshape(-1, P)
    raise AssertionError("the run has more ticks than steps and a last decoding")


def known_input(output: str, state: State, particle: int) -> tuple[str, Array]:
    """The name of the tensor by which a graph recognises its moment, and what it is then, flat."""
    network = output.rpartition(".")[0]
    names = {"decoder": ("z", state.z), "features": ("image", state.image), "features_pull": ("image", state.image)}
    names |= {"decoder_pull": ("pixels", state.image), "operator.inpainting.loss": ("x", state.x)}
    name, values = names[network]
    return name, values[particle]


def poisoned(graph: bytes, output: str, given: str, value: Array) -> bytes:
    """The graph, whose `output` is NaN for each sample whose input `given` is `value` [n]."""
    model = onnx.load_from_string(graph)
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)
    }
    for node in model.graph.node:
        node.output[:] = ["clean" if name == output else name for name in node.output]
        node.input[:] = ["clean" if name == output else name for name in node.input]
    constants = {
        "nan": np.array(np.nan, np.float32), "value": value, "near": np.array(NEAR, np.float32), "axis": np.array([1]),
        "flat": np.array([BATCH, value.size]), "one": np.array([BATCH, *[1] * (len(shapes[output]) - 1)]),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(v, "poison." + name) for name, v in constants.items())
    steps = [
        ("Reshape", [given, "poison.flat"]), ("Cast", ["0"]), ("Sub", ["1", "poison.value"]), ("Abs", ["2"]),
        ("ReduceMax", ["3"]), ("Less", ["4", "poison.near"]), ("Reshape", ["5", "poison.one"]),
    ]  # fmt: skip
    for i, (kind, inputs) in enumerate(steps):
        names = ["poison." + name if name.isdigit() else name for name in inputs]
        extra = {"Cast": {"to": onnx.TensorProto.FLOAT}, "ReduceMax": {"axes": [1], "keepdims": 1}}.get(kind, {})
        model.graph.node.append(helper.make_node(kind, names, [f"poison.{i}"], **extra))
    model.graph.node.append(helper.make_node("Where", [f"poison.{len(steps) - 1}", "poison.nan", "clean"], [output]))
    return model.SerializeToString()


def judge(folder: Path, output: str, variant: str, step: int, state: State) -> Verdict:
    """Runs the job on a bundle, made in the new folder, whose `output` is NaN for one particle at this step."""
    network, _, name = output.rpartition(".")
    particle = step % PARTICLES
    if network == "denoiser":  # it knows the timestep, which all particles share
        particle, given, value = 0, "t", np.array(timestep(step), np.float32).reshape(1)
    else:
        given, value = known_input(output, state, particle)
    graph = poisoned(make_graphs(NETS, BATCH, True)[network], name, given, value)
    found, message, left = None, "", False
    with Engine(write_bundle(folder, NETS, BATCH, instead={network: graph}), threads=1) as engine:
        handle = engine.submit(the_job(variant))
        for tick in range(STEPS + 1):
            try:
                engine.tick()
            except RlsdError as error:
                found, message = tick, str(error) if error.status == Status.NON_FINITE else f"{error.status}"
                left = bool(handle._particles.any() or handle._latents.any())
                break
    wanted = f"item {ITEM}, particle {particle}: the state became NaN or infinite at step {step} of {STEPS}"
    fault = None if found == step and message == wanted else f"found in tick {found}: {message!r}, wanted {wanted!r}"
    if left:
        fault = "results were left in the caller's arrays"
    return Verdict(output, variant, step, particle, found, fault)


def timestep(step: int) -> int:
    """Of the table, which the denoiser is given at a step."""
    return min((STEPS - step) * (TIMESTEPS // (STEPS + 1)) + 1, TIMESTEPS - 1)


def used(output: str, variant: str, step: int) -> bool:
    """Whether the engine needs that output then: x has its gradient one tick later, the last tick only decodes."""
    if output == "decoder.image":
        return True
    if output.endswith("loss.grad"):
        return step > 0 if variant == "rlsd" else step < STEPS
    return step < STEPS


def campaign(work: Path, steps: Sequence[int] = range(STEPS + 1)) -> Iterator[Verdict]:
    """Every output at every one of the steps that needs it, in both variants."""
    for variant in ("rlsd", "rlsd-nonaug"):
        states = undisturbed(write_bundle(work / variant, NETS, BATCH), variant)
        for output in OUTPUTS:
            for step in steps:
                if used(output, variant, step):
                    yield judge(work / f"{variant}.{output}.{step}", output, variant, step, states[step])


def main() -> int:
    with tempfile.TemporaryDirectory() as work:
        verdicts = list(campaign(Path(work)))
    wrong = [verdict for verdict in verdicts if verdict.fault]
    for verdict in wrong:
        print(f"{verdict.output} at step {verdict.step} of {verdict.variant}: {verdict.fault}")
    print(f"{len(verdicts)} NaNs in {len(OUTPUTS)} outputs of the networks: {len(verdicts) - len(wrong)} found within "
          f"their step, with item, particle and step in the message")  # fmt: skip
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
