"""Facts about this machine and what is installed on it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from rlsd.engine import RlsdError, find_onnxruntime, library_path, version


def machine() -> dict[str, str]:
    """Processor, processors that this process may run on, memory, system."""
    return {
        "processor": _processor(),
        "cores": str(_cores()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """Versions of rlsd and of what its results depend on; "not installed" where something is missing."""
    found = {"rlsd": engine_version(), "python": platform.python_version()}
    for name in ("numpy", "pillow", "tifffile", "scikit-image"):
        found[name] = installed(name)
    runtime = [f"{name} {installed(name)}" for name in ("onnxruntime", "onnxruntime-gpu") if installed(name) != MISSING]
    found["onnxruntime"] = runtime[0].split()[1] if len(runtime) == 1 else ", ".join(runtime) or MISSING
    return found


MISSING = "not installed"


def installed(name: str) -> str:
    """A distribution's version."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return MISSING


def engine_version() -> str:
    """The native library's version."""
    try:
        return version()
    except (OSError, RlsdError) as error:
        return f"library not usable: {error}"


def libraries() -> dict[str, str]:
    """Where the native library and ONNX Runtime were found."""
    runtime = find_onnxruntime()
    return {
        "librlsd": str(library_path()),
        "ONNX Runtime": runtime or "not found: pip install 'rlsd[cpu]'",
    }
