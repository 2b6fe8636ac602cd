"""`rlsd batch` on a file system that is really full: a small one in memory, in a namespace of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from batch_case import batch, bundle, contents, here  # noqa: F401

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
COMMAND = "import sys; from rlsd.pipeline import cli; sys.exit(cli.run(sys.argv[1:]))"
# Full, then larger: what it holds is copied out, because the file system ends with its namespace.
SCRIPT = """
set -e
mkdir small
mount -t tmpfs -o size=$1 none small
shift
set +e
"$@"
echo first $?
cp -r small/out early
mount -o remount,size=16m none small
"$@"
echo second $?
cp -r small/out late
"""


def namespaces() -> bool:
    """Whether a user may mount here."""
    try:
        tried = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return tried.returncode == 0


@pytest.mark.skipif(not namespaces(), reason="users may not mount file systems here")
@pytest.mark.parametrize(("kib", "done"), [(8, range(1)), (24, range(1, 6)), (40, range(1, 6))])
def test_a_full_file_system(kib: int, done: range) -> None:
    """Full before the first item is done, or later: what is finished stays, and the same command goes on."""
    words = ["batch", "-m", "bundle", "-t", "random", "-i", "in", "-n2", "--steps", "12", "--threads", "1"]
    run = subprocess.run(
        [*NAMESPACE, "sh", "-c", SCRIPT, "sh", f"{kib}k", sys.executable, "-c", COMMAND, *words, "-o", "small/out"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "first 1" in run.stdout and "second 0" in run.stdout, run.stdout + run.stderr
    assert run.stderr.count("No space left on device") == 1 and "Traceback" not in run.stderr, run.stderr
    assert batch(out="undisturbed") == 0
    early, late, wanted = (contents(Path(name)) for name in ("early", "late", "undisturbed"))
    assert late == wanted
    finished = [name for name in early if name.startswith("items/") and name.endswith("/item.json")]
    whole = [name for name in finished if not name.startswith("items/.")]
    assert len(whole) in done and all(early[name] == wanted[name] for name in whole)
