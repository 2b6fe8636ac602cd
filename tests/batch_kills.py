"""Kills `rlsd batch` with SIGKILL again and again, and compares what it leaves with an undisturbed run, byte by byte.

    python tests/batch_kills.py --kills 200

A run is killed at a random time, or by itself right before or after the n-th call that changes the disk, or at the
n-th fsync with the file cut short, as a power failure would leave it; of two workers one is killed, or the process that
leads them. After every kill all that the output folder shows must be as in the undisturbed run, or not be there; then
the same command is started again. A folder that a run has ended in must be the undisturbed one's exactly.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bundle_factory import write_bundle
from PIL import Image
from tiny import make_nets

from rlsd.bench import measure
from rlsd.models.fashion import PATH
from rlsd.pipeline import cli

CALLS = ("rename", "replace", "fsync", "unlink", "mkdir", "rmdir")  # of os, through which everything is written
WAYS = ("before", "after", "torn")


@dataclass
class Injection:
    """At which of the process's calls it dies, and how; counts the calls."""

    call: int = 0  # 0: never
    way: str = "before"
    keep: float = 0.5  # share of the file that a torn one keeps
    seen: int = 0

    def install(self) -> None:
        """In this process, from now on."""
        for name in CALLS:
            setattr(os, name, self._around(name, getattr(os, name)))

    def _around(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **options: Any) -> Any:
            self.seen += 1
            dies = self.seen == self.call
            if dies and self.way == "torn" and name == "fsync":
                self._tear(words[0])
            if dies and self.way != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*words, **options)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def _tear(self, descriptor: int) -> None:
        facts = os.fstat(descriptor)
        if stat.S_ISREG(facts.st_mode):
            os.truncate(f"/proc/self/fd/{descriptor}", int(facts.st_size * self.keep))


def start(words: Sequence[str], injection: Injection, counted: int | None = None) -> int:
    """Runs `rlsd WORDS` in a forked process and returns its id. counted: descriptor to write the number of calls to."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        injection.install()
        code = cli.run(words)
        if counted is not None:
            os.write(counted, str(injection.seen).encode())
    finally:
        os._exit(code)


def end_of(process: int, limit: float = 300.0) -> int:
    """Waits for it: its exit code, or minus the signal."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"a run was not done after {limit} s")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def visible(files: dict[str, bytes]) -> dict[str, bytes]:
    """Those that do not lie in a hidden folder, which is for what is not complete."""
    return {name: data for name, data in files.items() if not any(part.startswith(".") for part in Path(name).parts)}


def workers_of(process: int) -> list[int]:
    """Processes that it started."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@dataclass
class Campaign:
    """Kills of one command. words: all of it but --out and --log. exit_code: of the undisturbed run."""

    name: str
    words: Sequence[str]
    folder: Path
    rng: random.Random
    exit_code: int = 0
    differences: list[str] = field(default_factory=list)
    kills: dict[str, int] = field(default_factory=dict)
    runs: int = 0

    def prepare(self) -> None:
        """The undisturbed run: its files, seconds and calls."""
        reader, writer = os.pipe()
        begin = time.monotonic()
        code = end_of(start(self._command(self.folder / "undisturbed"), Injection(), writer))
        assert code == self.exit_code, f"the undisturbed run ended with {code}"
        self.seconds = time.monotonic() - begin
        self.calls = int(os.read(reader, 100))
        self.wanted = contents(self.folder / "undisturbed")
        assert not any(name.startswith(".") for name in self.wanted)
        self.log = self.folder / "log.jsonl"
        self.log.touch()

    def _command(self, out: Path) -> list[str]:
        return ["batch", *self.words, "--out", str(out), "--log", str(self.folder / "log.jsonl")]

    def strike(self, way: str) -> None:
        """Starts the command in the campaign's folder and kills it, or finds it ended before that."""
        out = self.folder / "out"
        injection = Injection()
        if way in WAYS:
            injection = Injection(self.rng.randint(1, self.calls), way, self.rng.random())
        process = start(self._command(out), injection)
        if way in ("time", "worker"):
            time.sleep(self.rng.uniform(0, self.seconds))
            self._kill(process, way)
        code = end_of(process)
        self.runs += 1
        if code == -signal.SIGKILL:
            if way != "time":
                self.kills[way] = self.kills.get(way, 0) + 1
            self._compare(visible(contents(out)), whole=False)
        elif code == self.exit_code:
            self._compare(contents(out), whole=True)
            shutil.rmtree(out)
        else:
            self.differences.append(f"{way}: exit code {code}")
            shutil.rmtree(out)

    def _kill(self, process: int, way: str) -> None:
        """The process itself, or one of its workers."""
        victims = [process] if way == "time" else workers_of(process)
        if victims and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(self.rng.choice(victims), signal.SIGKILL)
            self.kills[way] = self.kills.get(way, 0) + 1

    def _compare(self, found: dict[str, bytes], whole: bool) -> None:
        for name in found.keys() | (self.wanted.keys() if whole else ()):
            if found.get(name) != self.wanted.get(name):
                self.differences.append(name)

    def finish(self) -> None:
        """A last run, which nothing disturbs."""
        out = self.folder / "out"
        code = end_of(start(self._command(out), Injection()))
        if code != self.exit_code:
            self.differences.append(f"the last run: exit code {code}")
        self._compare(contents(out), whole=True)

    def line(self) -> dict[str, Any]:
        """The result."""
        text = self.log.read_text()
        return {
            "bench": "batch-kills", "case": self.name, "kills": sum(self.kills.values()), "by_way": self.kills,
            "runs": self.runs, "differences": len(self.differences),
            "resumed_from_snapshot": text.count("goes on from its snapshot"),
            "unusable_snapshots": text.count("its snapshot is not usable"),
        }  # fmt: skip


def tiny(folder: Path, items: int = 12) -> list[str]:
    """Words for a batch on a bundle made by hand; one of its inputs is no image."""
    write_bundle(folder / "bundle", make_nets(), 1, 4)
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)
    for index in range(items):
        Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8)).save(folder / "in" / f"{index:02}.png")
    (folder / "in" / "bad.png").write_text("no image")
    words = ["-m", str(folder / "bundle"), "-t", "random", "-i", str(folder / "in")]
    return [*words, "-n", "2", "--steps", "100", "--snapshot-every", "0.004", "--threads", "1"]


def fashion(folder: Path) -> list[str]:
    """Words for a batch on the shipped prior and images."""
    words = ["-m", "fashion", "-t", "half", "-i", str(PATH / "test_images"), "--snapshot-every", "0.1"]
    return [*words, "-n", "2", "--steps", "8", "--threads", "1"]


def run(name: str, folder: Path, seed: int, ways: Sequence[str], kills: int) -> Campaign:
    """A campaign of so many kills, the ways taken in turn. name: tiny, workers or fashion."""
    folder.mkdir(parents=True)
    words = fashion(folder) if name == "fashion" else tiny(folder, 40 if name == "workers" else 12)
    if name == "workers":
        words += ["--workers", "2"]
    campaign = Campaign(name, words, folder, random.Random(seed), exit_code=0 if name == "fashion" else 1)
    campaign.prepare()
    for turn in range(20 * kills):
        if sum(campaign.kills.values()) >= kills:
            break
        campaign.strike(ways[turn % len(ways)])
    campaign.finish()
    return campaign


def main() -> None:
    """All campaigns; their lines are appended to bench/results/batch-kills.jsonl."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--kills", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    few = max(1, options.kills // 10)
    plans = {
        "tiny": (("time", *WAYS, "time", *WAYS, "time"), options.kills - 3 * few),
        "workers": (("worker", "time", "worker"), 2 * few),
        "fashion": (("time", *WAYS), few),
    }
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (ways, kills) in plans.items():
            campaign = run(name, Path(folder) / name, options.seed, ways, kills)
            lines.append({**campaign.line(), "seed": options.seed})
            print(lines[-1], *campaign.differences, sep="\n  ")
    print("appended to", measure.record("batch-kills", lines))
    if any(line["differences"] for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
