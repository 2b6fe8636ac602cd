"""RLSD as a deepinv Reconstructor: model(y, physics) -> images, for any physics that can be exported.

The physics becomes an operator of the prior's bundle (rlsd.export.deepinv), in a bundle that is kept in the user's
cache and found again by what the physics computes. All items of a batch go through the engine in one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

try:
    import torch
    from deepinv.models import Reconstructor
    from torch import Tensor, nn

    from rlsd.export import deepinv as physics_export
    from rlsd.export.physics import Layout, PhysicsOperator, View, copied
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"rlsd.pipeline.deepinv needs {error.name}: pip install 'rlsd[deepinv]'") from error

from rlsd.engine import Engine, Job
from rlsd.engine.jobs import Handle
from rlsd.pipeline.extension import extended, image_of
from rlsd.pipeline.fit import Frame
from rlsd.pipeline.items import conditioning, frame_of
from rlsd.pipeline.model import find_bundle, open_model
from rlsd.pipeline.presets import family_of
from rlsd.pipeline.settings import settings_for
from rlsd.pipeline.tasks import TASKS

RESULTS = ("mean", "best", "all")


@dataclass(frozen=True)
class Prepared:
    """A bundle with what a physics needs. operators: by item, or one for all. given: parameters, [items, ...] each."""

    bundle: Path
    operators: Sequence[str]
    given: Mapping[str, Tensor]
    layout: Layout
    view: View


class RLSD(Reconstructor):
    """Repulsive Latent Score Distillation (arXiv 2406.16683) with a diffusion prior, for deepinv.

    model: a shipped prior or the folder of a bundle. result: what a call returns: "mean", the particles' mean
    [B, C, H, W]; "best", for each item the particle whose f(x) is nearest to y, [B, C, H, W]; "all", [B, N, C, H, W].
    task: the task whose settings are taken for the prior's family; changes: fields of rlsd.engine.Params and
    particles, seed, label (rlsd.pipeline.settings.Settings) in place of its own. unit: the physics acts on images in
    [0, 1], as deepinv's do, and so are the results; otherwise both are in [-1, 1]. Images have the size that the
    physics takes: the prior's own, or that without its black border. adjoint_limit: as for from_physics. device,
    threads: as for the engine. Raises InputError, and RlsdError for a bundle that is not whole.
    """

    def __init__(
        self,
        model: str | Path = "fashion",
        *,
        result: str = "mean",
        task: str = "gaussian-blur",
        unit: bool = True,
        adjoint_limit: float | None = physics_export.ADJOINT_LIMIT,
        device: str | None = None,
        threads: int = 0,
        **changes: Any,
    ):
        super().__init__()
        for field, value, allowed in (("result", result, RESULTS), ("task", task, tuple(TASKS))):
            if value not in allowed:
                raise ValueError(f"{field} is {value!r}; allowed are {', '.join(allowed)}")
        self.result, self.unit, self.adjoint_limit = result, unit, adjoint_limit
        self.bundle = find_bundle(str(model))
        self.settings = settings_for(TASKS[task], family_of(image_of(self.bundle)), changes)
        self._options: dict[str, Any] = {"device": device, "threads": threads}
        self._engine = self._opened(self.bundle)
        self.frame: Frame = frame_of(self._engine)
        conditioning(self._engine, self.settings)
        self._known: dict[str, Path] = {}
        self._apart: set[str] = set()  # kinds of physics that cannot have parameters per item

    def forward(self, y: Any, physics: nn.Module, *, seed: int | None = None, **_: Any) -> Tensor:
        """Images [B, C, H, W] from measurements y of `physics`, or with result="all" particles [B, N, C, H, W].

        They lie where y lies. seed: in place of the settings'; equal seeds give equal images.
        Raises ValueError for a physics that cannot be exported or a y that is not its, CheckError for one that
        contradicts itself, RlsdError.
        """
        prepared = self.prepare(y, physics)
        self._engine = self._opened(prepared.bundle)
        packed = prepared.layout.pack(y).detach().to(torch.float32)
        settings = self.settings
        jobs = [
            Job(
                _array(packed[i], self._engine),
                prepared.operators[i % len(prepared.operators)],
                {name: _array(values[i], self._engine) for name, values in prepared.given.items()},
                particles=settings.particles,
                seed=settings.seed if seed is None else seed,
                item=i,
                context=conditioning(self._engine, settings),
                params=settings.params,
            )
            for i in range(len(packed))
        ]
        shape = (len(jobs), settings.particles, *self._engine.image_shape)
        out = torch.empty(shape, device=packed.device if self._engine.on_gpu else "cpu")
        self._run(jobs, out)
        images = prepared.view(out).to(packed.device)
        if self.result == "all":
            return images
        return images.mean(1) if self.result == "mean" else images[torch.arange(len(jobs)), self._best(jobs, out)]

    def _run(self, jobs: Sequence[Job], out: Tensor) -> None:
        """Writes the jobs' particles to `out`; the engine is left without jobs, also by an error."""
        handles: list[Handle] = []
        try:
            for job, into in zip(jobs, out):
                handles.append(self._engine.submit(job, _array(into, self._engine)))
            self._engine.run()
            for handle in handles:
                handle.result()
        finally:
            for handle in handles:
                handle.release()

    def prepare(self, y: Any, physics: nn.Module) -> Prepared:
        """The bundle for this physics, exported now unless it was before; nothing is reconstructed."""
        count = len((y.x if hasattr(y, "x") else [y])[0])
        names = [name for name, value in physics.named_buffers() if value.dim() >= 3 and len(value) == count > 1]
        if names and not _for_one(physics, self.frame, self.unit):
            kind = type(physics).__qualname__
            if not any("." in name for name in names) and kind not in self._apart:
                try:
                    return self._per_item(y, physics, names)
                except ValueError:
                    self._apart.add(kind)
            operators = [self._described(y, _item(physics, names, i)) for i in range(count)]
        else:
            operators = [self._described(y, physics)]
        return self._prepared(operators, {})

    def _per_item(self, y: Any, physics: nn.Module, names: Sequence[str]) -> Prepared:
        operator = self._described(y, _item(physics, names, 0), names)
        return self._prepared([operator], {name: physics.get_buffer(name).detach().float() for name in names})

    def _described(self, y: Any, physics: nn.Module, per_item: Sequence[str] = ()) -> PhysicsOperator:
        """The operator of the physics, for images with or without the prior's border, whichever gives such a y."""
        wanted, image, reasons = Layout.of(y).parts, self.frame.image, []
        for border in dict.fromkeys([self.frame.padding, (0, 0, 0, 0)]):
            try:
                found = physics_export.described(physics, image, unit=self.unit, border=border, per_item=per_item)
            except ValueError as error:
                reasons.append(str(error))
                continue
            if found.layout.parts == wanted:
                return found.scaled_by(physics_export.scale_of(found, image))
            reasons.append(f"from images of this prior it measures {found.layout.parts}, and y is {wanted}")
        raise ValueError(f"y is not of this physics, or the physics not of this prior: {'; '.join(reasons)}")

    def _prepared(self, operators: Sequence[PhysicsOperator], given: Mapping[str, Tensor]) -> Prepared:
        names = [f"physics_{i}" for i in range(len(operators))]
        content = b"".join(fingerprint(operator, self.frame.image) for operator in operators)

        def make(image: Sequence[int]) -> dict[str, nn.Module]:
            found = [physics_export.exportable(each, image, self.adjoint_limit) for each in operators]
            return dict(zip(names, found))

        key = sha256(content).hexdigest()
        if key not in self._known:
            self._known[key] = extended(self.bundle, "physics", content, make)
        return Prepared(self._known[key], names, given, operators[0].layout, operators[0].view)

    def _opened(self, bundle: Path) -> Engine:
        """The engine of a bundle; one is open at a time."""
        current: Engine | None = getattr(self, "_engine", None)
        if current is not None and current.path == bundle:
            return current
        if current is not None:
            current.close()
        return open_model(str(bundle), **self._options)

    def _best(self, jobs: Sequence[Job], particles: Tensor) -> Tensor:
        """For each item the number of the particle with the smallest residual, [B]."""
        found = []
        for job, images in zip(jobs, particles):
            given = {name: _numpy(value)[None] for name, value in job.operator_params.items()}
            f = torch.from_numpy(self._engine.measure(job.operator, _numpy(images), **given))
            found.append((f - torch.from_numpy(_numpy(job.y))).flatten(1).norm(dim=1).argmin())
        return torch.stack(found).to(particles.device)


def fingerprint(operator: PhysicsOperator, image: Sequence[int]) -> bytes:
    """What the operator computes from two random images, and all else that its export depends on, as a digest."""
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(2, *image, generator=generator) * 2 - 1
    given = [torch.rand(2, *shape, generator=generator) for shape in operator.parameters_of(image).values()]
    kind = type(operator.measure.physics)
    facts = (kind.__module__, kind.__qualname__, operator.view, operator.layout.parts, operator.per_item)
    with torch.no_grad():
        values = operator(x, *given).numpy().tobytes()
    return sha256(repr(facts).encode() + values).digest()


def _for_one(physics: nn.Module, frame: Frame, unit: bool) -> bool:
    """Whether the physics measures one image as it is, so that its parameters are not those of a batch."""
    for border in dict.fromkeys([frame.padding, (0, 0, 0, 0)]):
        try:
            physics_export.described(physics, frame.image, unit=unit, border=border)
        except ValueError:
            continue
        return True
    return False


def _item(physics: nn.Module, names: Sequence[str], item: int) -> nn.Module:
    """A copy with the parameters of one item of the batch."""
    alone = copied(physics)
    for name in names:
        path, _, leaf = name.rpartition(".")
        alone.get_submodule(path)._buffers[leaf] = physics.get_buffer(name)[item : item + 1].clone()
    return alone


def _array(values: Tensor, engine: Engine) -> Any:
    """For the engine: a tensor of its GPU as it is, any other as a NumPy array."""
    return values.contiguous() if engine.on_gpu and values.is_cuda else values.cpu().contiguous().numpy()


def _numpy(values: Any) -> Any:
    return values.cpu().numpy() if isinstance(values, Tensor) else values
