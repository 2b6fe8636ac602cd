"""RLSD behind NVIDIA's Triton Inference Server: a model of its Python backend; see docs/triton-server.md."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # the server has it; it is in no package

from rlsd.engine import Engine, Job, Params, RlsdError
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.model import find_bundle


@dataclass
class Work:
    """A request on its way: the handles of its items' jobs, or what was wrong with it."""

    handles: list[Any] = field(default_factory=list)
    error: pb_utils.TritonError | None = None

    def drop(self, error: pb_utils.TritonError) -> None:
        for handle in self.handles:
            handle.release()
        self.handles, self.error = [], error


class TritonPythonModel:
    """One engine on one bundle. All requests of a call to `execute` are in flight together."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the bundle that config.pbtxt names. A setting or bundle that is not possible: TritonModelException."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        given = {name: value["string_value"] for name, value in parameters.items()}
        on_gpu = args["model_instance_kind"] == "GPU"
        try:
            self.params = params_of(given)
            self.particles, self.most_particles = int(given["particles"]), int(given["most_particles"])
            self.engine = Engine(
                find_bundle(given["bundle"]),
                device=f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu",
                threads=int(given["threads"]),
            )
        except KeyError as error:
            raise pb_utils.TritonModelException(f"config.pbtxt lacks the parameter {error}") from error
        except (InputError, RlsdError, ValueError) as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self.operators = self.engine.operators

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request, in their order; one that is not possible has an error of its own."""
        works = [self._submitted(request) for request in requests]
        while any(not handle.done for work in works for handle in work.handles):
            for request, work in zip(requests, works):
                if work.handles and request.is_cancelled():
                    work.drop(pb_utils.TritonError("cancelled by the client", pb_utils.TritonError.CANCELLED))
            with contextlib.suppress(RlsdError):  # of one job, whose response says so; the others go on
                self.engine.tick()
        return [self._response(work) for work in works]

    def finalize(self) -> None:
        self.engine.close()

    def _submitted(self, request: Any) -> Work:
        work = Work()
        try:
            for job in self._jobs(request):
                work.handles.append(self.engine.submit(job))
        except (RlsdError, ValueError) as error:
            work.drop(pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        return work

    def _jobs(self, request: Any) -> Iterator[Job]:
        """The jobs of a request's items. ValueError for values that no job can have."""
        y, names = array_of(request, "y"), array_of(request, "operator")
        packed, particles, seeds = (array_of(request, name) for name in ("parameters", "particles", "seed"))
        if particles is not None and len(set(particles[:, 0])) > 1:
            raise ValueError("the items of one request ask for different numbers of particles: send several requests")
        for i, name in enumerate(names[:, 0]):
            operator = name.decode(errors="replace")
            count = self.particles if particles is None else int(particles[i, 0])
            if not 1 <= count <= self.most_particles:
                raise ValueError(f"particles is {count}; allowed is 1 to {self.most_particles}")
            yield Job(
                y=y[i],
                operator=operator,
                operator_params=self._unpacked(operator, None if packed is None else packed[i]),
                particles=count,
                seed=0 if seeds is None else int(seeds[i, 0]),
                params=self.params,
            )

    def _unpacked(self, operator: str, packed: np.ndarray | None) -> dict[str, np.ndarray]:
        """The operator's parameters from one vector, in which they stand in the bundle's order."""
        if operator not in self.operators:
            raise ValueError(f"operator is {operator!r}; allowed are {', '.join(self.operators)}")
        shapes = self.operators[operator].params
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        found = 0 if packed is None else packed.size
        if found != sum(sizes):
            wanted = " and ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"
            raise ValueError(f"parameters has {found} values; operator {operator} takes {sum(sizes)}: {wanted}")
        parts = [] if packed is None else np.split(packed, np.cumsum(sizes)[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts)}

    def _response(self, work: Work) -> Any:
        try:
            results = [handle.result() for handle in work.handles]
        except RlsdError as error:
            work.drop(pb_utils.TritonError(str(error), pb_utils.TritonError.INTERNAL))
        if work.error is not None:
            return pb_utils.InferenceResponse(output_tensors=[], error=work.error)
        images = np.stack([result.particles for result in results])
        seconds = np.array([[result.seconds] for result in results], np.float32)
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor("images", images), pb_utils.Tensor("seconds", seconds)]
        )


def params_of(given: dict[str, str]) -> Params:
    """rlsd.engine.Params from the settings "params.NAME". ValueError."""
    kinds = {each.name: type(each.default) for each in fields(Params)}
    chosen = {name.removeprefix("params."): text for name, text in given.items() if name.startswith("params.")}
    unknown = sorted(set(chosen) - set(kinds))
    if unknown:
        raise ValueError(f"params.{unknown[0]} is no parameter; allowed are {', '.join(kinds)}")
    return Params(**{name: kinds[name](text) for name, text in chosen.items()})


def array_of(request: Any, name: str) -> np.ndarray | None:
    """An input [items, ...] as NumPy's, None where the request has none of that name."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()
