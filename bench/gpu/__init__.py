"""What only a GPU can tell about the engine; all of it also runs on a CPU at toy sizes, to rehearse.

Each module is one section of the benchmark and yields result lines. A line has `section`, `case`, `method`, `unit`,
`median`, `q1`, `q3`, `rounds`, `error` (of the check that it passed) and `roofline_share`; or, where there is no
figure, `wrong` (the check failed) or `left_out` (why it was not run).
"""

from __future__ import annotations

from typing import Any

Line = dict[str, Any]


class LeftOut(Exception):
    """A method that this machine cannot run; the message says why, as one clause."""


def first_line(error: Exception) -> str:
    """What an error says, where that may be pages or nothing."""
    return (str(error).splitlines() or ["no message"])[0]
