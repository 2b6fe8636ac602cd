"""The binary interface stays what it was: the header against its table, the library's symbols, Python's view of it."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess

import abi
import pytest

from rlsd.engine import Params, library_path, native
from rlsd.engine.params import REPULSIONS, VARIANTS

HEADER = abi.HEADER.read_text()
FOUND = abi.from_header(HEADER)
STRUCTS = {
    "rlsd_progress": native.ProgressStruct,
    "rlsd_engine_options": native.OptionsStruct,
    "rlsd_params": native.ParamsStruct,
    "rlsd_tensor": native.TensorStruct,
    "rlsd_request": native.RequestStruct,
    "rlsd_job_info": native.JobInfoStruct,
    "rlsd_stats": native.StatsStruct,
}
FUNCTIONS = {name for name, text in FOUND.declared.items() if f"(*{name})" not in text}


def test_header_is_its_table() -> None:
    assert abi.breaks(abi.from_table(abi.TABLE.read_text()), FOUND) == []
    assert FOUND.table() == abi.TABLE.read_text(), "appended to rlsd.h: write the table with `python tests/abi.py`"


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("    int32_t threads; ", "    int64_t threads; ", "rlsd_engine_options does not begin"),
        ("    double rho; ", "    double rho2;\n    double rho; ", "rlsd_params does not begin"),
        ("} rlsd_tensor;", "    int32_t more;\n} rlsd_tensor;", "rlsd_tensor.more lies in the old struct"),
        ("} rlsd_tensor;", "    int64_t more;\n} rlsd_tensor;", "rlsd_tensor has no size"),
        ("    uint32_t item; ", "    ", "rlsd_request does not begin"),
        ("RLSD_CANCELLED = 7,", "RLSD_CANCELLED = 17,", "value of rlsd_status.RLSD_CANCELLED"),
        ("RLSD_API rlsd_status rlsd_run(rlsd_engine *engine);", "", "declaration of rlsd_run"),
        ("float *out, size_t count);", "double *out, size_t count);", "declaration of rlsd_normal"),
        ("typedef void (*rlsd_log_fn)(void *user, ", "typedef void (*rlsd_log_fn)(", "declaration of rlsd_log_fn"),
    ],
)
def test_breaks_are_seen(before: str, after: str, reason: str) -> None:
    assert HEADER.count(before) == 1
    assert any(reason in each for each in abi.breaks(FOUND, abi.from_header(HEADER.replace(before, after))))


def test_appending_is_allowed() -> None:
    text = HEADER.replace("} rlsd_params;", "    double more;\n} rlsd_params;").replace(
        "RLSD_NO_DEVICE = 9", "RLSD_NO_DEVICE = 9, RLSD_MORE = 10"
    )
    new = abi.from_header(text)
    assert new != FOUND and abi.breaks(FOUND, new) == []


def test_library_exports_what_the_header_declares() -> None:
    done = subprocess.run(["nm", "-D", "--defined-only", library_path()], check=True, capture_output=True, text=True)
    assert {line.split()[-1] for line in done.stdout.splitlines()} == FUNCTIONS


def test_python_structs() -> None:
    assert FOUND.structs.keys() == STRUCTS.keys()
    for name, struct in STRUCTS.items():
        fields = {
            field[0].rstrip("_"): (getattr(struct, field[0]).offset, getattr(struct, field[0]).size)
            for field in struct._fields_
        }
        assert list(fields.items()) == list(FOUND.structs[name].fields.items()), name
        assert ctypes.sizeof(struct) == FOUND.structs[name].size


def test_python_functions() -> None:
    """Every function of the header is typed, with as many arguments, but for ONNX Runtime's own entry point."""
    library = native.library()
    for name in FUNCTIONS - {"RegisterCustomOps"}:
        arguments = FOUND.declared[name].partition("(")[2].removesuffix(")")
        count = 0 if arguments == "void" else arguments.count(",") + 1
        assert getattr(library, name).argtypes is not None and len(getattr(library, name).argtypes) == count, name


def test_python_has_the_same_defaults() -> None:
    """Of the parameters and of a request; a C program gets them from the _init functions."""
    params, request = native.ParamsStruct(), native.RequestStruct()
    native.check(native.library().rlsd_params_init(params, ctypes.sizeof(params)))
    words = VARIANTS | REPULSIONS
    for field in dataclasses.fields(Params):
        assert getattr(params, field.name) == words.get(field.default, field.default), field.name
    native.check(native.library().rlsd_request_init(request, ctypes.sizeof(request)))
    assert (request.particles, request.seed, request.item, request.all_particles) == (1, 0, 0, 0)


@pytest.mark.parametrize("size", [8, 24, 2 * ctypes.sizeof(native.ParamsStruct)])
def test_structs_of_other_versions(size: int) -> None:
    """Nothing is written behind the caller's struct; what this library does not know is zero."""
    memory = (ctypes.c_uint8 * 256)(*[0xA5] * 256)
    params = ctypes.cast(memory, ctypes.POINTER(native.ParamsStruct))
    native.check(native.library().rlsd_params_init(params, size))
    known = min(size, ctypes.sizeof(native.ParamsStruct))
    whole = native.ParamsStruct()
    native.check(native.library().rlsd_params_init(whole, ctypes.sizeof(whole)))
    assert params.contents.size == size
    assert bytes(memory)[8:known] == bytes(whole)[8:known]
    assert not any(memory[known:size]) and all(each == 0xA5 for each in memory[size:])


def test_python_statuses() -> None:
    prefix = "rlsd_status.RLSD_"
    found = {name.removeprefix(prefix): value for name, value in FOUND.values.items() if name.startswith(prefix)}
    assert found == {status.name: status.value for status in native.Status}
    assert FOUND.values["RLSD_STREAM_USER"] == native.STREAM_USER
