"""Engine, Job and Result: a thin view of rlsd.h for NumPy arrays."""

from __future__ import annotations

import atexit
import ctypes as c
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rlsd.engine import native
from rlsd.engine.arrays import filled_array, gathered_rows, given_array, tensor_structs
from rlsd.engine.dlpack import DeviceArray
from rlsd.engine.files import facts_in, is_for_cuda, read_verified
from rlsd.engine.jobs import Gather, Handle, Job, OperatorInfo, Progress, Result, check_numbers, operators_in
from rlsd.engine.native import INT32, RlsdError, Status, check, check_whole, library

# Seconds until a run sees a signal. More often would cost: a thread that computes in Python keeps each callback waiting
# for some 5 ms (sys.getswitchinterval).
_SIGNALS_WAIT = 0.2


class Engine:
    """An opened bundle. Threads have it one after the other: `submit`, `tick`, `run` and what evaluates graphs wait for
    each other, and in the engine's own callbacks they raise RlsdError; `cancel` may come from anywhere. On a GPU it
    should always be the same thread that ticks: what another one recorded as CUDA graphs has to be recorded again. A
    forked child opens an engine of its own.

    bundle: the directory that `rlsd export` wrote. device: "cpu" or "cuda:0" and so on, default what the bundle was
    exported for. threads: 0 for `usable_processors()`. max_particles: in flight at once, 0 for 256. onnxruntime: path
    of the library, default the installed wheel's. progress: called after each tick of `run`, or so many seconds apart
    (progress_interval) and after the last; returning True stops. log: called with each message. Raises RlsdError,
    and ValueError for a number of threads or particles that C cannot hold.

    What `progress` raises ends a run after its tick, and so does what a signal's handler raises (KeyboardInterrupt),
    which has its turn when `progress` is due or, without one, five times a second: jobs that are not done are
    cancelled, and `run` raises it. What a thread runs as the interpreter exits is cancelled and waited for.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        device: str | None = None,
        threads: int = 0,
        max_particles: int = 0,
        onnxruntime: str | None = None,
        progress: Callable[[Progress], bool | None] | None = None,
        progress_interval: float = 0,
        log: Callable[[str], None] | None = None,
    ):
        self._pointer = c.c_void_p()
        self._raised: BaseException | None = None
        self._calls = threading.RLock()
        self._runner: int | None = None  # the thread that ticks
        self._undone: list[Handle] = []  # the core writes into their arrays, whether the caller keeps them or not
        options = native.OptionsStruct()
        check(library().rlsd_engine_options_init(options, c.sizeof(options)))
        if (device or "").startswith("cuda") or is_for_cuda(Path(bundle)):
            native.preload_cuda()
        runtime = onnxruntime or native.find_onnxruntime()
        options.onnxruntime = os.fsencode(runtime) if runtime else None
        options.device = device.encode() if device else None
        for name, number in (("threads", threads), ("max_particles", max_particles)):
            check_whole(name, number, INT32)
            setattr(options, name, int(number))
        me = weakref.ref(self)  # an engine that nobody keeps goes at once, not when cycles are collected
        self._callbacks = (
            native.PROGRESS(lambda *given: 0 if (engine := me()) is None else engine._on_progress(*given)),
            native.LOG(lambda *given: None if (engine := me()) is None else engine._on_log(*given)),
        )
        self._progress, self._log = progress, log
        options.progress = self._callbacks[0]  # always: a signal's handler runs in it
        options.progress_interval = progress_interval if progress else _SIGNALS_WAIT
        if log:
            options.log = self._callbacks[1]
        check(library().rlsd_engine_open(os.fsencode(bundle), options, self._pointer))
        self.path = Path(bundle)
        self._facts = self._read_facts()
        _opened.add(self)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the engine; jobs that are not done are dropped. What another thread runs in it is cancelled and waited
        for. Raises RlsdError in one of the engine's own callbacks."""
        if not self._pointer:
            return
        if self._runner == threading.get_ident():
            raise RlsdError(Status.INVALID_ARGUMENT, "the engine is at work: its own callbacks cannot close it")
        if self._runner is not None:
            self.cancel()
        with self._calls:
            library().rlsd_engine_close(self._pointer)
            self._pointer = c.c_void_p()
            self._undone = []

    def __del__(self) -> None:
        self.close()

    # ------------------------------------------------------------ facts

    def describe(self) -> dict[str, list[str]]:
        """The manifest's facts and the engine's own: key -> the values of each line with that key."""
        return self._facts

    def _read_facts(self) -> dict[str, list[str]]:
        return facts_in(library().rlsd_engine_describe(self._pointer).decode().splitlines())

    def _shape(self, key: str) -> tuple[int, ...] | None:
        return tuple(map(int, self._facts[key][0].split())) if key in self._facts else None

    @property
    def name(self) -> str:
        return self._facts["name"][0]

    @property
    def on_gpu(self) -> bool:
        """Whether the engine runs on a GPU."""
        return self._facts["device"] != ["cpu"]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self._shape("image") or ()

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self._shape("latent") or ()

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        """(L, C), None where the denoiser takes no context."""
        return self._shape("context")

    @property
    def timesteps(self) -> int:
        return int(self._facts["timesteps"][0])

    @property
    def feature_dim(self) -> int | None:
        """Length of the features phi, None without an extractor."""
        return int(self._facts["feature_dim"][0]) if "feature_dim" in self._facts else None

    @property
    def bytes_per_particle(self) -> int:
        """Memory of a particle in flight beside its state: inputs, outputs and kept activations of the graphs."""
        return int(self._facts["bytes_per_particle"][0])

    @property
    def operators(self) -> dict[str, OperatorInfo]:
        """The bundle's forward operators, by name."""
        return operators_in(self._facts)

    @property
    def contexts(self) -> list[str]:
        """Names of the bundle's own contexts (class names, say)."""
        return [line.split()[0] for line in self._facts.get("named_context", [])]

    def context(self, name: str) -> np.ndarray:
        """A named context [L, C]; KeyError when the bundle has none of that name."""
        for line in self._facts.get("named_context", []):
            label, file = line.split()
            if label == name and self.context_shape:
                return np.frombuffer(self.file(file), np.float32).reshape(self.context_shape).copy()
        raise KeyError(name)

    def file(self, name: str) -> bytes:
        """The bytes of a file of the bundle, verified again; RlsdError for one that its manifest does not have."""
        return read_verified(self.path, name, self._facts.get("file", []))

    # ------------------------------------------------------------ jobs

    def submit(self, job: Job, out: Any = None, out_latents: Any = None) -> Handle:
        """Checks and queues a job; nothing runs yet.

        out, out_latents: arrays to be filled, [N, C, H, W] and [N, *latent_shape], of NumPy or of the engine's GPU;
        float32 and contiguous. Default: new ones of NumPy. Raises RlsdError for a job that is not possible, ValueError
        for an array of another shape or type, or on a GPU where the engine is not, and for a number that C cannot hold.
        """
        check_numbers(job)
        n, steps, params = int(job.particles), int(job.params.steps), job.params.struct()
        request = native.RequestStruct()
        check(library().rlsd_request_init(request, c.sizeof(request)))
        y = given_array("y", job.y)
        tensors, keep = tensor_structs(job.operator_params, whole=False)
        context = None if job.context is None else given_array("context", job.context)
        particles = filled_array("out", out, (max(n, 0), *self.image_shape))
        latents = filled_array("out_latents", out_latents, (max(n, 0), *self.latent_shape))
        if not self.on_gpu and any(isinstance(a, DeviceArray) for a in (y, *keep, context, particles, latents)):
            raise ValueError("an array of the job lies on a GPU, but this engine runs on the CPU")
        request.op, request.y, request.y_count = job.operator.encode(), y.pointer, y.size
        request.params, request.param_count = tensors, len(keep)
        if context is not None:
            request.context, request.context_count = context.pointer, context.size
        request.particles, request.seed, request.item = n, int(job.seed), int(job.item)
        request.out, request.out_count = particles.pointer, particles.size
        request.out_latents, request.out_latents_count = latents.pointer, latents.size
        trace = np.zeros((steps - 1, max(n, 0), 3), np.float32) if job.trace else None
        if trace is not None:
            request.out_trace, request.out_trace_count = trace.ctypes.data, trace.size
        request.first_particle, request.all_particles = int(job.first_particle), int(job.all_particles)
        if job.gather is not None:
            request.gather = native.GATHER(partial(self._on_gather, job.gather))
        if job.snapshot is not None:
            request.snapshot, request.snapshot_size = job.snapshot, len(job.snapshot)
        pointer = c.c_void_p()
        with self._calls:
            check(library().rlsd_submit(self._pointer, params, request, pointer))
            handle = Handle(pointer, particles.source, latents.source, trace, request.gather)
            self._undone.append(handle)
        return handle

    def tick(self) -> int:
        """One step of every particle in flight; returns the number of jobs that are not done."""
        left = c.c_int64()
        with self._under_way():
            status = library().rlsd_tick(self._pointer, left)
            self._conclude(status, left.value)
        return left.value

    def run(self) -> None:
        """Ticks until no job is left. Raises RlsdError of the first job that failed, after finishing the others."""
        with self._under_way():
            status = library().rlsd_run(self._pointer)
            self._conclude(status, 0)

    def _conclude(self, status: int, left: int) -> None:
        if (ended := len(self._undone) - left) > 0:
            going_on, others = [], iter(self._undone)
            while ended > 0 and (handle := next(others, None)) is not None:  # early ones: jobs begin in their order
                if handle.done:
                    ended -= 1
                else:
                    going_on.append(handle)
            self._undone = [*going_on, *others]
        if self._raised is not None:
            raise self._raised
        check(status)

    def cancel(self) -> None:
        """Stops the run at once; from any thread."""
        library().rlsd_cancel(self._pointer)

    def reconstruct(self, jobs: Sequence[Job]) -> list[Result]:
        """Submits all jobs, runs, and returns their results in the same order. Where one is refused none is left."""
        handles: list[Handle] = []
        try:
            for job in jobs:
                handles.append(self.submit(job))
            self.run()
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.release()

    # ------------------------------------------------------------ tools

    def evaluate(self, graph: str, outputs: Sequence[str], **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one graph of the bundle: every array has the samples first. Returns the named outputs, flat per sample.

        Outputs of known shape (eps, image, z, x, grad, y, phi) come back in that shape. Raises RlsdError, and
        ValueError without inputs or for an output of no known shape.
        """
        if not inputs:
            raise ValueError(f"graph {graph!r} is given no inputs")
        count = len(next(iter(inputs.values())))
        given, keep = tensor_structs(inputs)
        shapes = {name: self._output_shape(graph, name) for name in outputs}
        found = {name: np.empty((count, *shape), np.float32) for name, shape in shapes.items()}
        wanted, kept = tensor_structs(found)
        with self._calls:
            status = library().rlsd_evaluate(self._pointer, graph.encode(), count, given, len(keep), wanted, len(kept))
        check(status)
        return found

    def _output_shape(self, graph: str, name: str) -> tuple[int, ...]:
        if name in ("eps", "z", "z_cotangent"):
            return self.latent_shape
        if name in ("image", "grad", "image_cotangent"):
            return self.image_shape
        if name == "phi" and self.feature_dim:
            return (self.feature_dim,)
        if name == "y" and (operator := graph.removeprefix("operator.").rpartition(".")[0]) in self.operators:
            return self.operators[operator].measurement_shape
        if name == "loss":
            return ()
        raise ValueError(f"output {name!r} of graph {graph!r} has no known shape")

    def measure(self, operator: str, x: np.ndarray, **params: np.ndarray) -> np.ndarray:
        """f(x) for images x [n, C, H, W]; parameters have the samples first, or are one item's for all of them."""
        if operator not in self.operators:
            known = ", ".join(self.operators)
            raise RlsdError(Status.INVALID_ARGUMENT, f"operator {operator!r} is not in the bundle: allowed is {known}")
        shapes = self.operators[operator].params
        for name in params.keys() - shapes.keys():
            allowed = ", ".join(shapes) or "none"
            raise RlsdError(
                Status.INVALID_ARGUMENT, f"operator {operator!r} has no parameter {name!r}: allowed is {allowed}"
            )
        each = {k: np.broadcast_to(v, (len(x), *shapes[k])) for k, v in params.items()}
        return self.evaluate(f"operator.{operator}.forward", ["y"], x=x, **each)["y"]

    def features(self, images: np.ndarray) -> np.ndarray:
        """phi of images [n, C, H, W]: [n, D]."""
        return self.evaluate("features", ["phi"], image=images)["phi"]

    def stats(self) -> dict[str, float]:
        """Counts and seconds since the engine was opened; see rlsd_stats in rlsd.h."""
        stats = native.StatsStruct(size=c.sizeof(native.StatsStruct))
        check(library().rlsd_engine_stats(self._pointer, stats))
        return {field[0]: getattr(stats, field[0]) for field in native.StatsStruct._fields_[1:]}

    # ------------------------------------------------------------ callbacks

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        """While the core may call back. What a signal's handler raises before a callback's first line ctypes would
        print and drop, and return any number for it: it ends the run."""

        def dropped(unraisable: sys.UnraisableHookArgs) -> None:
            if "ctypes callback function" not in (unraisable.err_msg or ""):
                return before(unraisable)
            self._raised = unraisable.exc_value
            self.cancel()

        with self._calls:
            outer, self._runner = self._runner, threading.get_ident()
            self._raised, before = None, sys.unraisablehook
            handles_signals = threading.current_thread() is threading.main_thread()
            try:
                if handles_signals:
                    sys.unraisablehook = dropped
                yield
            finally:
                self._runner = outer
                if handles_signals:
                    sys.unraisablehook = before

    def _on_progress(self, _user: int, pointer) -> int:  # type: ignore[no-untyped-def]
        try:
            if self._progress is None:
                c.pythonapi.PyErr_CheckSignals()  # Python 3.10 does not by itself where nothing is called
                return 0
            values = pointer.contents
            return int(bool(self._progress(Progress(**{f.name: getattr(values, f.name) for f in fields(Progress)}))))
        except BaseException as error:
            self._raised = error
            return 1

    def _on_gather(self, gather: Gather, _user: int, rows: int, first: int, count: int, total: int, dim: int) -> int:
        try:
            gather(gathered_rows(rows, (total, dim), self.on_gpu), first, count)
            return 0
        except BaseException as error:
            self._raised = error
            if not isinstance(error, Exception):  # a signal's, which ends the run and not this job alone
                self.cancel()
            return 1

    def _on_log(self, _user: int, _level: int, message: bytes) -> None:
        if self._log is not None:
            self._log(message.decode(errors="replace"))


_opened: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Ends what other threads run: ONNX Runtime is taken down next, and a callback would end its thread in the core."""
    for engine in list(_opened):
        engine.cancel()
        engine._calls.acquire(timeout=60)  # and keeps it: no tick begins any more


def _forget_threads() -> None:
    """A forked child has none of the threads that may have been at work."""
    for engine in list(_opened):
        engine._calls, engine._runner = threading.RLock(), None


os.register_at_fork(after_in_child=_forget_threads)
