"""The processes that share one run, and what they exchange through torch.distributed.

They are those of torchrun, or of any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Memory of the
host goes through gloo, memory of a GPU through NCCL. Nothing that is received is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rlsd.engine import RlsdError, Status
from rlsd.pipeline.errors import InputError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(days=7)  # while process 0 alone is at work; one that dies is noticed all the same


class Stage(IntEnum):
    """Why the processes meet."""

    FAILED, START, RESUME, STEP, SNAPSHOT, RESULT, END = range(7)


class Group:
    """All processes of a run; use it in a `with` block, in which an error of one ends all others.

    timeout: seconds after which a process that does not answer counts as lost. gpu: whether memory of a GPU is to be
    exchanged. InputError if this process was not started as one of several.
    """

    def __init__(self, timeout: float = 600.0, *, gpu: bool = False):
        missing = [name for name in NEEDED if name not in os.environ]
        if missing:
            raise InputError(f"{missing[0]} is not set: start the processes with torchrun (docs/several-machines.md)")
        if not timeout > 0:
            raise InputError(f"timeout is {timeout:g}; more than 0 seconds are wanted")
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.step = 0  # of the job: told to the others, to know that all are at the same
        self._lost = self._at_work = False
        with self._others("while they were found"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout))
            self._patient = dist.new_group(timeout=PATIENCE, backend="gloo")

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not self._lost:
            with suppress(RlsdError):
                self.meet(Stage.FAILED)
        dist.destroy_process_group()

    def share(self, total: int, rank: int | None = None) -> range:
        """The particles of a process (default: this one), of `total` in all; shares differ by at most one."""
        rank = self.rank if rank is None else rank
        return range(total * rank // self.size, total * (rank + 1) // self.size)

    @contextmanager
    def _others(self, when: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # whatever torch.distributed raises is one
            if isinstance(error, RlsdError):
                raise
            self._lost = True
            why = next(iter(str(error).strip().splitlines()), "no message")
            raise RlsdError(
                Status.RUNTIME_ERROR,
                f"process {self.rank} of {self.size}: another process has ended or does not answer, {when} ({why})",
            ) from error

    def meet(self, stage: Stage, value: int = 0) -> None:
        """Waits until all are here. RlsdError unless all are at the same stage and step with the same value."""
        mine = torch.tensor([stage, self.step, value], dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._others(f"at step {self.step}"):
            dist.all_gather(found, mine, group=None if self._at_work else self._patient)
        for rank, theirs in enumerate(found):
            if stage is not Stage.FAILED and not torch.equal(theirs, mine):
                self._lost = True
                raise RlsdError(Status.RUNTIME_ERROR, self._difference(rank, theirs.tolist(), mine.tolist()))
        if stage in (Stage.START, Stage.RESULT):
            self._at_work = stage is Stage.START

    def _difference(self, rank: int, theirs: Sequence[int], mine: Sequence[int]) -> str:
        if theirs[0] == Stage.FAILED:
            return f"process {self.rank} of {self.size}: process {rank} has failed; its own message says why"
        if mine[0] == theirs[0] == Stage.START:
            return f"process {rank} has opened another bundle than process {self.rank}"
        there, here = (f"{Stage(stage).name.lower()} {step} ({value})" for stage, step, value in (theirs, mine))
        return f"process {rank} is at {there}, process {self.rank} at {here}: were they started with the same command?"

    def fill(self, rows: Any, first: int, count: int) -> None:
        """The engine's callback: rows [total, D], of which this process has first .. first + count - 1."""
        with self._others(f"at step {self.step}"):
            here = torch.as_tensor(rows)  # shares the memory of a NumPy array or of one on a GPU
            here.copy_(self._gather(here, first, count))
            if here.is_cuda:
                torch.cuda.current_stream(here.device).synchronize()

    def _gather(self, rows: torch.Tensor, first: int, count: int) -> torch.Tensor:
        total = len(rows)
        assert range(first, first + count) == self.share(total)
        self.meet(Stage.STEP, rows.shape[1])
        shares = [self.share(total, rank) for rank in range(self.size)]
        mine = rows.new_zeros((max(map(len, shares)), rows.shape[1]))  # all_gather wants the same size of all
        mine[:count] = rows[first : first + count]
        parts = [torch.empty_like(mine) for _ in shares]
        dist.all_gather(parts, mine)
        return torch.cat([part[: len(share)] for part, share in zip(parts, shares)])

    def collect(self, mine: np.ndarray, total: int) -> np.ndarray | None:
        """On process 0 all particles' values [total, ...], elsewhere None; mine: this share's, [count, ...]."""
        with self._others("while results were collected"):
            if self.rank:
                dist.send(torch.from_numpy(np.ascontiguousarray(mine)), 0)
                return None
            everything = np.empty((total, *mine.shape[1:]), mine.dtype)
            everything[: len(mine)] = mine
            for rank in range(1, self.size):
                share = self.share(total, rank)
                dist.recv(torch.from_numpy(everything[share.start : share.stop]), rank)
        return everything

    def from_first(self, content: bytes | None) -> bytes:
        """Process 0's content, everywhere."""
        with self._others("while the measurement was sent"):
            size = torch.tensor([len(content or b"")])
            dist.broadcast(size, 0)
            data = torch.empty(int(size), dtype=torch.uint8)
            if content is not None:
                data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            dist.broadcast(data, 0)
        return data.numpy().tobytes()

    def common(self, numbers: Sequence[int], most: int = 8) -> list[int]:
        """Those of the first `most` numbers (0 or more) that all processes have."""
        mine = torch.full((most,), -1, dtype=torch.int64)
        mine[: len(numbers[:most])] = torch.tensor(numbers[:most], dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self.meet(Stage.RESUME)
        with self._others("while snapshots were compared"):
            dist.all_gather(found, mine)
        return sorted(set.intersection(*(set(each.tolist()) for each in found)) - {-1})
