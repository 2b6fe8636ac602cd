"""The oldest versions that pyproject.toml allows, as pip's requirements: `make oldest` runs the tests with them.

python tests/oldest.py EXTRA...      the package's own, and those of these extras, one a line: NAME==VERSION
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def oldest(extras: list[str]) -> list[str]:
    """What is required, each `>=` as `==`; others as they are. A name's last requirement counts."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    wanted = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    names = {re.split(r"[\[>=; ]", each)[0]: each.replace(">=", "==", 1) for each in wanted}
    return list(names.values())


if __name__ == "__main__":
    print("\n".join(oldest(sys.argv[1:])))
