"""Tests on another build of librlsd: PYTHONPATH=tests pytest -p with_library --library build/coverage/librlsd.so"""

from __future__ import annotations

from pathlib import Path

import pytest
from xdist import workermanage

import rlsd.engine
from rlsd.engine import native


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", required=True, type=Path)


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is imported."""
    path = config.getoption("--library").resolve(strict=True)
    native.library_path = rlsd.engine.library_path = lambda: path
    # A library that counts writes its counts when its process ends: none may be killed for taking longer than 10 s.
    workermanage.NodeManager.EXIT_TIMEOUT = None
