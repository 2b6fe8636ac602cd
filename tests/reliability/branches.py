"""Branches of the core that tests took, from the JSON of llvm-cov export -summary-only on the standard input.

branches.py LEAST        prints a line for each file; 1 as exit status if less than LEAST percent were taken in all

A branch is a condition of the source being true, or being false; what a compiler adds for exceptions is none, and those
of a template count once, however many types it is used with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    found = json.load(sys.stdin)["data"][0]
    rows = [(Path(file["filename"]).name, file["summary"]["branches"]) for file in found["files"]]
    for name, branches in sorted(rows):
        if branches["count"]:
            print(f"{name:24} {branches['covered']:5} of {branches['count']:5}  {branches['percent']:6.2f} %")
    taken, count = (sum(branches[what] for _, branches in rows) for what in ("covered", "count"))
    print(f"{'all':24} {taken:5} of {count:5}  {100 * taken / count:6.2f} %")
    return int(100 * taken < float(sys.argv[1]) * count)


if __name__ == "__main__":
    sys.exit(main())
