"""Benchmarks: no speed figure without a check of the same result in the same run."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as the engine does; ONNX Runtime looks when it is imported
