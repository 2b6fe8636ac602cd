"""Run time: RLSD reconstruction by the native engine. Needs numpy and an ONNX Runtime library, never torch."""

from rlsd.engine.core import Engine
from rlsd.engine.jobs import Handle, Job, OperatorInfo, Progress, Result
from rlsd.engine.native import (
    RlsdError,
    Status,
    find_onnxruntime,
    library_path,
    normal,
    repulsion,
    usable_processors,
    version,
)
from rlsd.engine.params import Params

__all__ = [
    "Engine",
    "Handle",
    "Job",
    "OperatorInfo",
    "Params",
    "Progress",
    "Result",
    "RlsdError",
    "Status",
    "find_onnxruntime",
    "library_path",
    "normal",
    "repulsion",
    "usable_processors",
    "version",
]
