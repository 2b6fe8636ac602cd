"""Without a GPU the Triton kernels run in interpreter mode, which has to be chosen before triton is imported."""

from __future__ import annotations

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
