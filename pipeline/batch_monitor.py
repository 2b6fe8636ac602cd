"""How a batch is going: lines for people, a log of JSON lines, metrics for Prometheus."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rich.console import Console

from rlsd.pipeline.batch_work import Event
from rlsd.pipeline.errors import InputError
from rlsd.pipeline.progress import say

SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_METRICS = 10.0, 2.0
_HELP = {
    "items": ("gauge", "Items of the batch."),
    "items_finished_before": ("gauge", "Items that earlier runs had finished."),
    "items_done_total": ("counter", "Items that this run has finished."),
    "items_failed_total": ("counter", "Items that failed in this run."),
    "particle_steps_total": ("counter", "Steps of single particles in this run."),
    "snapshots_total": ("counter", "Snapshots of items under way."),
    "snapshot_bytes_total": ("counter", "Bytes of these snapshots."),
    "worker_deaths_total": ("counter", "Workers that ended before their time."),
    "seconds_total": ("counter", "Seconds since this run began."),
    "running": ("gauge", "1 while this run is at work, 0 once it has ended."),
}
_COUNTED = {"done": "items_done_total", "failed": "items_failed_total", "death": "worker_deaths_total"}


class Monitor:
    """Counts events and tells of them. failures: of this run, by the item's index and name."""

    def __init__(self, items: int, console: Console, log: Path | None = None, metrics: Path | None = None):
        self.console, self.metrics = console, metrics
        self.values: dict[str, float] = {**dict.fromkeys(_HELP, 0), "items": items, "running": 1}
        self.failures: dict[tuple[int, str], Mapping[str, Any]] = {}
        self._start = self._line = self._written = time.monotonic()
        self._log = open(log, "a", encoding="utf-8", buffering=1) if log else None  # noqa: SIM115 (closed in close)

    def __call__(self, event: Event) -> None:
        """Takes in one event."""
        values = self.values
        if event.kind in _COUNTED:
            values[_COUNTED[event.kind]] += 1
        elif event.kind == "steps":
            values["particle_steps_total"] = event.number
        elif event.kind == "snapshot":
            values["snapshots_total"] += 1
            values["snapshot_bytes_total"] += event.number
        if event.kind == "failed":
            self.failures[event.index, event.name] = {"item": event.index, "name": event.name, "error": event.text}
        if event.kind in ("failed", "death"):
            self.say(f"{event.name}: {event.text}" if event.name else event.text)
        if event.kind not in ("steps", "snapshot", "ready"):
            self.log(event)
        self.look()

    def log(self, event: Event) -> None:
        """A line of the log."""
        if self._log is None:
            return
        facts: dict[str, Any] = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
        facts["event"] = event.kind
        facts |= {"item": event.index, "name": event.name} if event.index >= 0 else {}
        facts |= {"text": event.text} if event.text else {}
        facts |= {"seconds": round(event.number, 3)} if event.kind == "done" else {}
        try:
            self._log.write(json.dumps(facts) + "\n")
        except OSError as error:  # no reason to stop the batch
            self._log = None
            self.say(f"log cannot be written: {error.strerror}; the batch goes on without")

    def say(self, text: str) -> None:
        """A line for people."""
        say(self.console, text.encode(errors="backslashreplace").decode())  # names of files need not be text

    def look(self) -> None:
        """Says how far it is and writes the metrics, when it is time to."""
        now = time.monotonic()
        if now - self._line >= SECONDS_BETWEEN_LINES:
            self._line = now
            self.say(self.summary())
        if self.metrics and now - self._written >= SECONDS_BETWEEN_METRICS:
            self._written = now
            self._try_to_write()

    def summary(self) -> str:
        """How far it is, as a sentence."""
        values, seconds = self.values, time.monotonic() - self._start
        done = values["items_done_total"] + values["items_finished_before"]
        rate = values["particle_steps_total"] / max(seconds, 1e-9)
        failed = f", {len(self.failures):,} failed" if self.failures else ""
        return f"{done:,.0f} of {values['items']:,.0f} items done{failed}; {rate:,.0f} particle-steps/s"

    def text(self) -> str:
        """The metrics in Prometheus' text format."""
        self.values["seconds_total"] = round(time.monotonic() - self._start, 3)
        lines = []
        for name, (kind, help_text) in _HELP.items():
            full = f"rlsd_batch_{name}"
            lines += [f"# HELP {full} {help_text}", f"# TYPE {full} {kind}", f"{full} {self.values[name]:.15g}"]
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """The metrics' file, in one step: a collector never sees half of it."""
        assert self.metrics is not None
        temporary = self.metrics.with_name(f"{self.metrics.name}.{os.getpid()}")
        temporary.write_text(self.text())
        os.replace(temporary, self.metrics)

    def _try_to_write(self) -> None:
        try:
            self.write()
        except OSError as error:  # no reason to stop the batch
            self.say(f"metrics {self.metrics} cannot be written: {error.strerror}; the batch goes on without")
            self.metrics = None

    def close(self) -> None:
        """The last figures."""
        self.values["running"] = 0
        if self.metrics:
            self._try_to_write()
        if self._log:
            with suppress(OSError):
                self._log.close()


@contextmanager
def monitored(items: int, console: Console, log: Path | None, metrics: str | None) -> Iterator[Monitor]:
    """A monitor. metrics: a file, or a port of this machine to ask. InputError when log or metrics are not usable."""
    port = int(metrics) if metrics and metrics.isdecimal() else None
    file = Path(metrics) if metrics and port is None else None
    try:
        monitor = Monitor(items, console, log, file)
    except OSError as error:
        raise InputError(f"log {log} cannot be written: {error.strerror}") from None
    try:
        if file:
            monitor.write()
        server = None if port is None else _server(monitor, port)
    except (OSError, OverflowError) as error:
        raise InputError(f"metrics {metrics} cannot be offered: {error}") from None
    try:
        yield monitor
    finally:
        monitor.close()
        if server:
            server.shutdown()
            server.server_close()


def _server(monitor: Monitor, port: int) -> ThreadingHTTPServer:
    """Answers GET /metrics on 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/metrics"
            body = monitor.text().encode() if found else b"try /metrics\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            """Nothing: standard error is for the batch."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
