"""Fuzzing of what reads users' files, with atheris: python tests/fuzz/fuzz_files.py images|rows CORPUS [options]

Any bytes may come: an image or manifest is taken, or refused with one sentence (InputError). Options are libFuzzer's.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rlsd.pipeline.images", "rlsd.pipeline.manifest", "PIL", "tifffile"]):
    from rlsd.pipeline.errors import InputError
    from rlsd.pipeline.images import read_image
    from rlsd.pipeline.manifest import NAME, open_manifest


def images(file: Path, data: bytes) -> None:
    """A picture that is taken is finite, of 1 or 3 channels. file: where it is written to."""
    file.write_bytes(data)
    values = read_image(file).values
    assert values.ndim == 3 and values.shape[0] in (1, 3) and values.size > 0
    assert values.min() > float("-inf") and values.max() < float("inf")


def rows(file: Path, data: bytes) -> None:
    """Rows that are taken stay in their folder and have names that are folders of the output."""
    file.write_bytes(data)
    listed = open_manifest(file, None, ["mask", "kernel"])
    entries = list(listed.entries())
    assert len(entries) == listed.count
    for entry in entries:
        named = NAME.fullmatch(entry.name) and entry.name not in (".", "..")
        assert named or (entry.error and re.fullmatch(r"row \d+", entry.name))
        assert entry.error or all(
            Path(path).is_relative_to(file.parent) for path in (entry.path, *entry.given.values())
        )


def main() -> None:
    target = {"images": images, "rows": rows}[sys.argv.pop(1)]
    file = Path(tempfile.mkdtemp(prefix="rlsd-fuzz-", dir="/dev/shm")) / "items.csv"

    def one_input(data: bytes) -> None:
        try:
            target(file, data)
        except InputError as error:
            assert str(error).isprintable(), str(error)

    warnings.simplefilter("ignore")
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
