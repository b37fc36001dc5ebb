"""When one rank fails, every rank prints that rank's message and ends within seconds.

The failing rank writes its error to the job's key-value store and waits until the other ranks have read it.
On each rank a thread reads the store twice a second. When it finds an error, it prints the message and gives
its rank a few seconds to end by itself, because often that rank has met the same error or its collective has
failed. Then the thread ends the process, because a collective that waits cannot be interrupted. The exit
status is that of the rank that failed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.errors import DataError
from megatron_evomoe.observe.heartbeat import CollectiveError, failed_collective
from megatron_evomoe.train.step import NonFiniteError

_POLL = 0.5
"""Seconds between two looks at the store."""
_GRACE = 5.0
"""Seconds that a rank has to end by itself after another one failed."""
_PATIENCE = 5.0
"""Seconds that a failing rank waits for the others to read its message.

After a failed collective it waits less, because then another rank is dead or hangs.
"""
USER_ERRORS = (ConfigError, CheckpointError, DataError, NonFiniteError, OSError)
"""Errors whose message is enough for a user: printed without a traceback, with exit status 2."""


@dataclass(frozen=True)
class Failure:
    """The error that ended a rank, as all ranks print it."""

    rank: int
    world: int
    host: str
    pid: int
    text: str
    status: int
    is_shared: bool
    """Whether all ranks met the same error; then the message names no rank."""

    def __str__(self) -> str:
        place = "" if self.is_shared else f"rank {self.rank} of {self.world} ({self.host}, pid {self.pid}): "
        return f"error: {place}{self.text}"


class RankFailedError(RuntimeError):
    """This rank failed, or it ends because another one did. The message has been printed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.status = failure.status


def failure_of(error: BaseException, run_dir: Path | None) -> Failure:
    """`error` as one line, which also says that the checkpoints under `run_dir`, if known, are intact."""
    line = " ".join(str(error).split())
    if isinstance(error, (CollectiveError, dist.DistError)) or failed_collective(error) is not None:
        status = 3  # a consequence, if another rank reports an error of its own
    else:
        status = 2 if isinstance(error, USER_ERRORS) else 130 if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, OSError) or not isinstance(error, (*USER_ERRORS, CollectiveError)):
        line = f"{type(error).__name__}: {line}".removesuffix(": ")
    is_complete = isinstance(error, (ConfigError, CheckpointError, NonFiniteError))
    if run_dir is not None and not is_complete:
        line += (
            f". The checkpoints under {run_dir} stay as they were; the same command goes on from the newest"
        )
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Failure(
        rank,
        world,
        socket.gethostname(),
        os.getpid(),
        line,
        status,
        is_shared=world == 1 or getattr(error, "is_shared", False),
    )


def tell(failure: Failure, error: BaseException) -> Failure:
    """Print this rank's failure, with the traceback unless it is an error meant for users."""
    if failure.status == 1:
        traceback.print_exception(error)
    print(failure, file=sys.stderr, flush=True)
    return failure


class Alarm:
    """Context for all that the ranks do together. With a single rank it does nothing.

    Args:
        run_dir: where the run's checkpoints are, for the message; none while that is not known.

    Raises:
        RankFailedError: when the context is left by an exception, in its place.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._run_dir = run_dir
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._sounded: Failure | None = None
        self._heard: Failure | None = None
        self._ended, self._said = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Alarm:
        if self._world > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()  # the thread gets a connection of its own: one may block the other
            self._thread = threading.Thread(
                target=self._watch, args=(store.clone(),), name="alarm", daemon=True
            )
            self._thread.start()
        return self

    def sound(self, error: BaseException) -> None:
        """Tell the other ranks of this error, without waiting. Only the first failure of all ranks counts."""
        if self._thread is None or self._sounded is not None:
            return
        self._sounded = failure_of(error, self._run_dir)
        try:
            if self._store.add("alarm/count", 1) == 1:
                self._store.set("alarm/failure", json.dumps(asdict(self._sounded)))
                self._heard = self._sounded
                if self._said.acquire(blocking=False):
                    tell(self._sounded, error)
        except Exception:  # the process that hosts the store is gone; the others' collectives will fail
            return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        try:
            if error is not None:
                self.sound(error)
                self._wait_until_heard()
                raise RankFailedError(self._settle(error)) from error
        finally:
            self._ended.set()

    def _settle(self, error: BaseException) -> Failure:
        """Print and return the failure that this rank ends with.

        It is the first failure of all ranks, unless this rank had an error of its own.
        """
        first, mine = self._heard, self._sounded
        assert mine is not None, "settled after `sound`"
        if first is None or (first.text != mine.text and mine.status != 3):
            return tell(mine, error)
        self._say(first)
        return first

    def _wait_until_heard(self) -> None:
        """Wait until the other ranks have read the message.

        torchrun kills them once this rank ends, and this rank may host the store.
        """
        assert self._sounded is not None, "waited for after `sound`"
        deadline = time.monotonic() + (_PATIENCE if self._sounded.status != 3 else 4 * _POLL)
        try:
            while self._store.add("alarm/heard", 0) < self._world and time.monotonic() < deadline:
                time.sleep(0.05)
        except Exception:  # the process that hosts the store is gone
            return

    def _watch(self, store: dist.Store) -> None:
        try:
            while (failure := _read(store)) is None:
                if self._ended.wait(_POLL):
                    return
            self._heard = failure
            if failure.rank != self._rank:
                self._say(failure)
            store.add("alarm/heard", 1)
        except Exception:  # the process that hosts the store is gone
            return
        if failure.rank != self._rank and not self._ended.wait(_GRACE):
            sys.stdout.flush()
            os._exit(failure.status)

    def _say(self, failure: Failure) -> None:
        """Print the failure once, from the thread that comes first."""
        if self._said.acquire(blocking=False):
            print(failure, file=sys.stderr, flush=True)


def _read(store: dist.Store) -> Failure | None:
    """The first failure of any rank. Raises `RuntimeError` if the process that hosts the store is gone."""
    if not store.check(["alarm/failure"]):
        return None
    return Failure(**json.loads(store.get("alarm/failure")))
