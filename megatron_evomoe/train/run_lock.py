"""Lets one run at a time write to a folder, and ends a run whose folder is gone.

Rank 0 holds a POSIX record lock on `FOLDER/.lock`. The kernel drops it when the process ends, however it
ends. A network file system's server drops it for a node that died (NFSv4: when the node's lease has expired).
Neither a forked process nor a helper inherits the lock. On a file system without locks, the holder changes
the file every few seconds instead, and a file that no longer changes has no holder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_evomoe.checkpoint.record import CheckpointError

NAME = ".lock"
_HERE = 15.0
"""Seconds to wait for a lock that a process of this host holds, which may be about to end."""
_ELSEWHERE = 100.0
"""Seconds to wait for a lock of another host: the lease of a dead node must expire first."""
_BEAT = 3.0
"""Seconds between two changes of the file where there are no locks."""
_STILL = 20.0
"""Seconds without a change after which the file's holder counts as dead."""
_POLL = 0.2
_SIZE = 1024  # bytes of the file
_CLOSED = -1  # no file descriptor
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)

log = logging.getLogger(__name__)


class RunLock:
    """Context in which no other run writes to `folder`. Communicates: every rank enters it.

    Args:
        patience: at most as many seconds the ranks wait for rank 0 while an earlier run is ending.

    Raises:
        CheckpointError: on every rank, on entry: another run, which is named, holds the folder, or the folder
            cannot be created.
    """

    def __init__(self, folder: Path, patience: float) -> None:
        self._folder, self._path, self._patience = folder, folder / NAME, patience
        self._descriptor = _CLOSED
        self._identity = (0, 0)
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "token": uuid.uuid4().hex,
        }
        self._lease: threading.Thread | None = None
        self._ended = threading.Event()
        self._lost_to: dict[str, Any] | None = None

    def __enter__(self) -> RunLock:
        _agreed(self._acquire)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._lease is not None:
            self._lease.join(_BEAT)
        if self._descriptor != _CLOSED:
            with contextlib.suppress(OSError):  # a folder that is gone needs no message
                if self._read().get("token") == self._me["token"]:
                    self._write({**self._me, "ended": True})
            os.close(self._descriptor)
            self._descriptor = _CLOSED

    def verify(self) -> None:
        """Raise on every rank what `check` raises. Communicates."""
        _agreed(self.check)

    def check(self) -> None:
        """Check on the rank that holds the lock that the folder is still the one that was locked.

        Raises:
            CheckpointError: the folder was deleted or replaced, or another run has taken it.
        """
        if self._lost_to is not None:
            raise CheckpointError(
                f"{self._folder} was taken over by {_named(self._lost_to)} while this run was suspended for "
                f"more than {_STILL:.0f} s; only one of the two may continue"
            )
        try:
            found = os.stat(self._path)
            if (found.st_dev, found.st_ino) != self._identity:
                self._recognise()
        except OSError as error:
            raise CheckpointError(
                f"{self._folder} was deleted or replaced while the run was writing to it: {error}"
            ) from None

    def _acquire(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CheckpointError(
                f"--save {self._folder} cannot be written to: {error}; name a folder that can"
            ) from None
        try:
            self._wait_for_lock()
            with contextlib.suppress(OSError):  # on a full disk the lock holds without naming its holder
                self._write(self._me)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise CheckpointError(f"{self._path} cannot be locked: {error}") from None
            self._take_lease()
        found = os.fstat(self._descriptor)
        self._identity = (found.st_dev, found.st_ino)

    def _wait_for_lock(self) -> None:
        """Raises `OSError` on a file system without locks, `CheckpointError` if another run has the lock."""
        started = time.monotonic()
        while True:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in _HELD:
                    raise
            holder = self._read()
            patience = min(self._patience, _HERE if holder.get("host") == self._me["host"] else _ELSEWHERE)
            if time.monotonic() - started > patience:
                raise CheckpointError(self._refusal(holder))
            if time.monotonic() - started < _POLL:
                log.warning(
                    "%s is held by %s; waiting up to %.0f s for it to end",
                    self._folder,
                    _named(holder),
                    patience,
                )
            time.sleep(_POLL)

    def _take_lease(self) -> None:
        """Raises `CheckpointError` while another run keeps changing the file."""
        started = changed = time.monotonic()
        last = self._read()
        while last and not last.get("ended") and time.monotonic() - changed < min(_STILL, self._patience / 2):
            if time.monotonic() - started > min(2 * _STILL, self._patience):
                raise CheckpointError(self._refusal(last))
            time.sleep(_POLL)
            if (found := self._read()) != last:
                last, changed = found, time.monotonic()
        self._write(self._me)
        time.sleep(5 * _POLL)
        if (found := self._read()).get("token") != self._me["token"]:  # two runs found it unchanged
            raise CheckpointError(self._refusal(found))
        self._lease = threading.Thread(target=self._keep_lease, name="lease", daemon=True)
        self._lease.start()

    def _keep_lease(self) -> None:
        beat = 0
        while not self._ended.wait(_BEAT):
            beat += 1
            try:
                found = self._read()
                if found and found.get("token") != self._me["token"]:
                    self._lost_to = found
                    return
                self._write({**self._me, "beat": beat})
            except OSError:  # a full disk or a folder that is gone: the next save reports it
                continue

    def _refusal(self, holder: dict[str, Any]) -> str:
        return (
            f"{self._folder} is in use by another run ({_named(holder)}); two would overwrite each other's "
            "checkpoints and metrics. End that one first, or choose another --save"
        )

    def _recognise(self) -> None:
        """Accept a file with a new inode number if it holds this run's token.

        Some file systems renumber files. Closing the file after reading drops the lock, so it is taken again.
        """
        token = json.loads(self._path.read_text() or "{}").get("token")
        if token != self._me["token"]:
            raise OSError(f"{self._path} is another file")
        found = os.stat(self._path)
        self._identity = (found.st_dev, found.st_ino)
        if self._lease is None:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _read(self) -> dict[str, Any]:
        """Text of the lock file, which describes its holder.

        It is read through the one descriptor, because closing another one would drop the lock.
        """
        try:
            found = json.loads(os.pread(self._descriptor, _SIZE, 0) or b"{}")
        except ValueError:  # caught while being written
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, content: dict[str, Any]) -> None:
        # in one call, so that no reader sees an empty file
        os.pwrite(self._descriptor, json.dumps(content).encode().ljust(_SIZE), 0)


def _named(holder: dict[str, Any]) -> str:
    return (
        f"host {holder.get('host', 'unknown')}, pid {holder.get('pid', 'unknown')}, since "
        f"{holder.get('since', 'unknown')}"
    )


def _agreed(work: Callable[[], None]) -> None:
    """Do `work` on rank 0. A `CheckpointError` of it is raised on every rank. Communicates."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except CheckpointError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        shared = CheckpointError(problem[0])
        shared.is_shared = True
        raise shared
