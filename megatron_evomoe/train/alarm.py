"""One rank's failure becomes every rank's message within seconds, whatever the others wait for.

A rank that fails says so in the job's key-value store and waits until the others have heard. A thread of each
rank looks there twice a second: it prints the message, gives the rank a few seconds to end by itself (often
it has met the same error, or its collective has failed), and then ends it: a collective that waits cannot be
interrupted. The status is that of the rank that failed.
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

import torch.distributed as dist

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.errors import DataError
from megatron_evomoe.observe.heartbeat import CollectiveError, failed_collective
from megatron_evomoe.train.step import NonFiniteError

_POLL, _GRACE = 0.5, 5.0
# seconds for the others to hear; less where one of them is dead or silent, as a failed collective says
_PATIENCE = 5.0
USER_ERRORS = (ConfigError, CheckpointError, DataError, NonFiniteError, OSError)
"""Errors whose message says all: no traceback, exit status 2."""


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
    """all ranks have met it alike, and the text says what is to be said of ranks"""

    def __str__(self) -> str:
        place = "" if self.is_shared else f"rank {self.rank} of {self.world} ({self.host}, pid {self.pid}): "
        return f"error: {place}{self.text}"


class RankFailedError(RuntimeError):
    """This rank, or another and this one with it, has failed. The message has been printed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.status = failure.status


def failure_of(error: BaseException, run_dir: Path | None) -> Failure:
    """`error` as this rank tells it: in a line, with what stays intact under `run_dir`, where that is known
    already.
    """
    line = " ".join(str(error).split())
    if isinstance(error, (CollectiveError, dist.DistError)) or failed_collective(error) is not None:
        status = 3  # not the cause, wherever another rank has told one
    else:
        status = 2 if isinstance(error, USER_ERRORS) else 130 if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, OSError) or not isinstance(error, (*USER_ERRORS, CollectiveError)):
        line = f"{type(error).__name__}: {line}".removesuffix(": ")
    says_it_itself = isinstance(error, (ConfigError, CheckpointError, NonFiniteError))
    if run_dir is not None and not says_it_itself:
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
    """Print what this rank met, with the traceback where the message does not say all."""
    if failure.status == 1:
        traceback.print_exception(error)
    print(failure, file=sys.stderr, flush=True)
    return failure


class Alarm:
    """Context of everything that ranks do together. Alone in the world it does nothing.

    run_dir: for the message, where the run's checkpoints are; none where that is not known yet.

    Raises:
        RankFailedError: from the end of the context, in place of whatever ended it.
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
            store = dist.distributed_c10d._get_default_store()
            self._store = store.clone()  # a connection each: one waits while the other asks
            self._thread = threading.Thread(
                target=self._watch, args=(store.clone(),), name="alarm", daemon=True
            )
            self._thread.start()
        return self

    def sound(self, error: BaseException) -> None:
        """Tell the other ranks what this one met. Only the first failure of all ranks counts; does not
        wait.
        """
        if self._thread is None or self._sounded is not None:
            return
        self._sounded = failure_of(error, self._run_dir)
        try:
            if self._store.add("alarm/count", 1) == 1:
                self._store.set("alarm/failure", json.dumps(asdict(self._sounded)))
                self._heard = self._sounded
                if self._said.acquire(blocking=False):
                    tell(self._sounded, error)
        except Exception:  # whoever kept the store is gone, and the others find out by their collectives
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
        """The failure this rank ends with, printed: the first of all ranks, unless this one met something of
        its own.
        """
        first, mine = self._heard, self._sounded
        if first is None or (first.text != mine.text and mine.status != 3):
            return tell(mine, error)
        self._say(first)
        return first

    def _wait_until_heard(self) -> None:
        """torchrun ends the others as soon as this rank has ended, and the store may be this rank's own."""
        deadline = time.monotonic() + (_PATIENCE if self._sounded.status != 3 else 4 * _POLL)
        try:
            while self._store.add("alarm/heard", 0) < self._world and time.monotonic() < deadline:
                time.sleep(0.05)
        except Exception:  # whoever kept the store is gone
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
        except Exception:  # whoever kept the store is gone
            return
        if failure.rank != self._rank and not self._ended.wait(_GRACE):
            sys.stdout.flush()
            os._exit(failure.status)

    def _say(self, failure: Failure) -> None:
        """Print it, once, from whichever thread is first."""
        if self._said.acquire(blocking=False):
            print(failure, file=sys.stderr, flush=True)


def _read(store: dist.Store) -> Failure | None:
    """The first failure of any rank. Raises RuntimeError where whoever kept the store is gone."""
    if not store.check(["alarm/failure"]):
        return None
    return Failure(**json.loads(store.get("alarm/failure")))
