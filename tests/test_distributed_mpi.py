"""docs/several-machines.md: the program that gathers with MPI, as it stands there, gives the bytes of one process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlsd.engine import Engine, Job, Params, find_onnxruntime, library_path
from rlsd.models.fashion import PATH

ROOT = Path(__file__).parent.parent
(PROGRAM,) = re.findall(r"```c\n(.*?)```", (ROOT / "docs" / "several-machines.md").read_text(), re.S)
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
MPICC, MPIEXEC = (shutil.which(name, path=TOOLS) for name in ("mpicc", "mpiexec"))


@pytest.mark.skipif(not (MPICC and MPIEXEC), reason="MPI is not installed: pip install mpich")
def test_gathered_with_mpi(tmp_path: Path) -> None:
    (tmp_path / "particles.c").write_text(PROGRAM)
    library = library_path()
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'engine' / 'include'}"]
    command = [MPICC, *flags, "particles.c", str(library), f"-Wl,-rpath,{Path(library).parent}", "-o", "particles"]
    subprocess.run(command, cwd=tmp_path, check=True)
    mask = np.zeros((1, 32, 32), np.float32)
    mask[..., 16:] = 1
    y = mask * np.random.default_rng(0).uniform(-1, 1, mask.shape).astype(np.float32)
    y.tofile(tmp_path / "y.f32")
    mask.tofile(tmp_path / "mask.f32")
    words = [str(PATH / "bundle"), "y.f32", "mask.f32", "5", "out.f32"]
    environment = os.environ | {"RLSD_ONNXRUNTIME": find_onnxruntime() or "", "PATH": TOOLS}
    subprocess.run([MPIEXEC, "-n", "2", "./particles", *words], cwd=tmp_path, env=environment, check=True, timeout=120)
    with Engine(PATH / "bundle", threads=1) as engine:
        job = Job(y, "inpainting", {"mask": mask}, particles=5, params=Params(steps=20, gamma=50))
        (result,) = engine.reconstruct([job])
    assert (tmp_path / "out.f32").read_bytes() == result.particles.tobytes()
