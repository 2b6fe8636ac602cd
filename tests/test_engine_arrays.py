"""What Python hands to the core: callers' arrays, on the host and by DLPack, numbers, and what is kept for how long."""

import ctypes
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("onnx")
from bundle_factory import write_bundle
from tiny import CONTEXT, IMAGE, LATENT, make_job, make_nets

from rlsd.engine import Engine, Params, RlsdError, native
from rlsd.engine.core import Handle
from rlsd.engine.dlpack import DeviceArray, _Tensor, on_device

NETS = make_nets()
JOB = make_job(NETS, particles=2, params=Params(steps=3))
FLOAT32 = (2, 32, 1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with Engine(write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", NETS, 1)) as engine:
        yield engine


def read_only(shape):
    array = np.zeros(shape, np.float32)
    array.flags.writeable = False
    return array


WRONG = {
    "columns first": lambda shape: np.zeros(shape, np.float32, order="F"),
    "every other": lambda shape: np.zeros((*shape[:-1], 2 * shape[-1]), np.float32)[..., ::2],
    "read only": read_only,
    "float64": np.zeros,
    "float16": lambda shape: np.zeros(shape, np.float16),
    "no NumPy": lambda shape: SimpleNamespace(shape=shape),
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name, shape", [("out", (2, *IMAGE)), ("out_latents", (2, *LATENT))])
def test_arrays_that_cannot_be_filled(engine, name, shape, make):
    """The core would write float32 numbers in a row, whatever the array is."""
    with pytest.raises(ValueError, match=f"^{name} is no writable, contiguous float32 array"):
        engine.submit(JOB, **{name: make(shape)})
    with pytest.raises(ValueError, match=rf"^{name} has shape \[3, .*\], \[2, .*\] is needed"):
        engine.submit(JOB, **{name: np.zeros((3, *shape[1:]), np.float32)})
    assert engine.tick() == 0


def test_callers_arrays_are_filled(engine):
    (wanted,) = engine.reconstruct([JOB])
    out, latents = np.full((2, *IMAGE), 7, np.float32), np.full((2, *LATENT), 7, np.float32)
    handle = engine.submit(JOB, out, latents)
    engine.run()
    assert handle.result().particles is out and out.tobytes() == wanted.particles.tobytes()
    assert handle.result().latents is latents and latents.tobytes() == wanted.latents.tobytes()


class Foreign:
    """What another library hands over: the fields of its DLPack tensor, over memory of the host."""

    def __init__(self, shape, strides=None, kind=FLOAT32, offset=0, device=2):
        self.shape, self.strides, self.kind, self.offset, self.device = shape, strides, kind, offset, device
        self.memory = np.zeros(64, np.float32)

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self, stream=None):
        rows = [(ctypes.c_int64 * len(each))(*each) if each else None for each in (self.shape, self.strides)]
        start = self.memory.ctypes.data
        self.tensor = _Tensor(start, self.device, 0, len(self.shape), *self.kind, rows[0], rows[1], self.offset)
        self.rows = rows
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


@pytest.mark.parametrize("device, there", [(1, False), (3, False), (2, True), (13, True)])
def test_memory_of_a_gpu_is_known_by_its_kind(device, there):
    """The host's, the host's for CUDA, a GPU's, and what the driver moves between both."""
    assert on_device(Foreign((4,), device=device)) is there
    assert not on_device(np.zeros(4, np.float32)) and not on_device([0.0])


@pytest.mark.parametrize("shape, strides", [((2, 3, 4), (12, 4, 1)), ((1, 3, 1), (99, 1, 7)), ((2, 3), None)])
def test_dense_arrays_of_a_gpu(shape, strides):
    """A dimension of one element may have any stride; the data may begin behind the pointer."""
    foreign = Foreign(shape, strides, offset=8)
    array = DeviceArray("y", foreign)
    assert (array.shape, array.size) == (shape, np.prod(shape))
    assert array.pointer == foreign.memory.ctypes.data + 8


@pytest.mark.parametrize(
    "shape, strides", [((2, 3), (1, 2)), ((2, 3), (6, 2)), ((3, 2), (0, 1)), ((2, 2, 2), (8, 2, 1))]
)
def test_arrays_of_a_gpu_with_gaps(shape, strides):
    with pytest.raises(ValueError, match=r"^mask is a device array that is not contiguous"):
        DeviceArray("mask", Foreign(shape, strides))


@pytest.mark.parametrize("kind", [(0, 32, 1), (1, 32, 1), (2, 16, 1), (2, 64, 1), (2, 32, 2), (5, 64, 1)], ids=str)
def test_arrays_of_a_gpu_of_other_types(kind):
    with pytest.raises(ValueError, match=f"^y is a device array of type {kind[0]}, {kind[1]} bits: float32 is needed"):
        DeviceArray("y", Foreign((4,), kind=kind))


def test_an_array_of_a_gpu_is_refused_wherever_it_stands(engine):
    """Its pointer is none of the host's."""
    image, latent = Foreign((2, *IMAGE)), Foreign((2, *LATENT))
    given = {"y": Foreign(IMAGE), "context": Foreign(CONTEXT), "operator_params": {"mask": Foreign(IMAGE)}}
    for job, *outputs in (*((replace(JOB, **{name: value}),) for name, value in given.items()),
                          (JOB, image, None), (JOB, None, latent)):  # fmt: skip
        with pytest.raises(ValueError, match="lies on a GPU, but this engine runs on the CPU"):
            engine.submit(job, *outputs)


def test_the_largest_addresses_of_random_numbers(engine):
    far = replace(JOB, seed=2**64 - 1, item=2**32 - 1)
    near = replace(JOB, seed=2**64 - 2, item=2**32 - 1)
    one, other = engine.reconstruct([far, near])
    assert np.isfinite(one.particles).all() and not np.array_equal(one.particles, other.particles)


@pytest.mark.parametrize("field", ["first_particle", "all_particles"])
@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**32 + 1])
def test_shares_that_c_cannot_hold(engine, field, value):
    """ctypes would take their lowest bits: 2^32 + 1 is particle 1."""
    with pytest.raises(ValueError, match=f"{field} is {value}, allowed is a whole number from"):
        engine.submit(replace(JOB, **{field: value}))


def test_a_job_that_is_not_done_has_no_result(engine):
    handle = engine.submit(JOB)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the job is not done"):
            handle.result()
        engine.tick()
    engine.run()
    assert handle.result().particles.any()


@pytest.mark.parametrize("ticks", [False, True], ids=["run", "tick"])
def test_nothing_is_kept_of_a_job_that_is_done(engine, monkeypatch, ticks):
    """The engine holds what the core writes into, and no longer: a server submits for ever."""
    released = []
    free = Handle.release
    monkeypatch.setattr(Handle, "release", lambda self: (released.append(1), free(self))[1])
    out = np.zeros((2, *IMAGE), np.float32)
    engine.submit(JOB, out)
    array = weakref.ref(out)
    del out
    assert array() is not None
    if ticks:
        while engine.tick():
            pass
    else:
        engine.run()
    assert array() is None and released == [1]


def test_jobs_that_end_before_others_are_let_go_alone(engine):
    """In whatever order: the arrays of those that go on are written into."""
    arrays = []
    for steps in (9, 3, 6, 3, 9):
        out = np.zeros((2, *IMAGE), np.float32)
        engine.submit(replace(JOB, params=replace(JOB.params, steps=steps)), out)
        arrays.append(weakref.ref(out))
        del out
    kept = []
    while engine.tick():
        kept.append([array() is not None for array in arrays])
    assert kept == [[True] * 5] * 2 + [[True, False, True, False, True]] * 3 + [[True, False, False, False, True]] * 3
    assert not any(array() for array in arrays)


def test_a_caller_may_change_a_context(engine):
    engine.context("loud")[:] = 0
    assert engine.context("loud").any()


def test_onnxruntime_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    assert native.find_onnxruntime() is None


def test_a_parameter_that_the_operator_has_not(engine):
    x = np.zeros((2, *IMAGE), np.float32)
    mask = np.ones(IMAGE, np.float32)
    for operator, more, allowed in (("inpainting", {"musk": mask}, "mask"), ("saturate", {"mask": mask}, "gain")):
        right = {"mask": mask} if operator == "inpainting" else {"gain": np.ones(1, np.float32)}
        with pytest.raises(
            RlsdError, match=f"'{operator}' has no parameter '{next(iter(more))}': allowed is {allowed}"
        ):
            engine.measure(operator, x, **right, **more)
