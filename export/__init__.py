"""Build time: turns torch modules, or a checkpoint in diffusers layout, into a bundle that the engine runs."""

from rlsd.export.check import CheckError
from rlsd.export.checkpoint import CheckpointError, export_checkpoint
from rlsd.export.operators import Operator
from rlsd.export.package import Networks, package

__all__ = ["CheckError", "CheckpointError", "Networks", "Operator", "export_checkpoint", "package"]
