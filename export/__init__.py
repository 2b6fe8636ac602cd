"""Build time: turns torch modules, or a checkpoint in diffusers layout, into a bundle that the engine runs."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as the engine does; ONNX Runtime looks when it is imported

from rlsd.export.check import CheckError
from rlsd.export.checkpoint import CheckpointError, export_checkpoint
from rlsd.export.operators import Operator
from rlsd.export.package import Networks, package

__all__ = ["CheckError", "CheckpointError", "Networks", "Operator", "export_checkpoint", "package"]
