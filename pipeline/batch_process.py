"""A worker of a batch as a process of its own: started by batch_pool, with which it talks through a socket.

The socket's number is its one argument. It inherits the output folder's lock, and ends at once when the process that
leads the batch does.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from rlsd.engine import RlsdError
from rlsd.pipeline.batch_errors import fatal_event
from rlsd.pipeline.batch_work import Nothing, Work, work_on
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.manifest import Entry

SECONDS_BETWEEN_LOOKS = 0.2  # at whether to stop, while there is nothing to do
STOP, END = "stop", "end"


class Line:
    """Entries from the leading process, as they come."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._come: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stopping = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                word = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)  # nobody leads any more
            if word == STOP:
                self.stopping = True
            else:
                self._come.put(word)

    def __call__(self, wait: bool) -> Entry | Nothing:
        """The next entry; see batch_work.Feed."""
        try:
            word = self._come.get(wait, SECONDS_BETWEEN_LOOKS)
        except queue.Empty:
            return Nothing.YET
        return Nothing.EVER if word == END else word


def serve(connection: Connection) -> None:
    """Gets the Work, does what comes, and says what happened; the last event is `fatal` where it could not go on."""
    work: Work = connection.recv()
    line = Line(connection)
    try:
        work_on(work, line, connection.send, lambda: line.stopping)
    except KeyboardInterrupt:
        pass  # the leading process asked for it
    except (InputError, RlsdError, OSError) as error:
        connection.send(fatal_event(error))


def main() -> None:
    """Only the leading process heeds a terminal or a service manager that wants all to end: it tells the others."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
