"""A file that several processes make together: each does its share, and nobody waits in a collective.

The work is cut into numbered pieces. The processes, which may be on several hosts, meet in a folder beside
the file. A process claims a piece by creating a file there, and keeps changing that file while it works, so
that the others know that it is alive. The result of a piece is a file as well, so nothing that is finished is
lost when processes end, and a later call goes on from there. A piece whose claim no longer changes is taken
over. In rare cases two processes then do the same piece, which costs time and changes nothing, because
results are renamed into place.

    build_together(
        target,
        pieces=64,
        work=lambda piece: tokens_of(piece).tobytes(),
        assemble=lambda parts, path: path.write_bytes(b"".join(part.read_bytes() for part in parts)),
    )
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from megatron_evomoe.data.files import temporary_beside, write_atomically

_BEAT = 2.0
"""Seconds between two changes of a claim."""
_STILL = 20.0
"""Seconds without a change after which the process that made a claim counts as dead."""
_POLL = 0.2
"""Seconds between two looks at the pieces that other processes are working on."""


def build_together(
    target: Path,
    pieces: int,
    work: Callable[[int], bytes],
    assemble: Callable[[Sequence[Path], Path], None],
    *,
    is_current: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make the file `target`, together with all processes that call this with the same `target` and `pieces`.

    It returns once `target` is current, whoever made it. At once if it is so already.

    Args:
        target: its name must identify what it is made of, because finished pieces of an earlier attempt are
            kept in `parts_folder(target, pieces)` and used.
        pieces: the work is divided into the pieces 0 … pieces − 1, at least one. A piece should take seconds.
        work: computes the result of a piece. It must be the same in whichever process it is computed.
        assemble: given the files of the results, in order, and a path, writes the whole to that path, which
            is then renamed. One process does this, after the last piece.
        is_current: whether `target` is there and right. None means that it exists.
        progress: called with the number of finished pieces and `pieces`, after each piece and several times
            a second while this process waits for others. What it raises ends this process's share.

    Raises:
        OSError: the folder of `target` cannot be written to, or its disk is full. Finished pieces stay.
        Exception: what `work`, `assemble` and `progress` raise. The piece is free for others then.
    """
    ready = is_current or target.exists
    folder = parts_folder(target, pieces)
    with _Claims(folder) as claims:
        while not ready():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                found = set(os.listdir(folder))
                missing = [piece for piece in range(pieces) if _part(piece) not in found]
                if progress is not None:
                    progress(pieces - len(missing), pieces)
                # the number after the last piece stands for putting them together
                piece = claims.take(missing or [pieces], found)
            except FileNotFoundError:  # another process has finished, and removed the folder
                if ready():
                    break
                raise
            if piece is None:
                time.sleep(_POLL)
            elif piece == pieces:
                _assemble(target, [folder / _part(piece) for piece in range(pieces)], assemble, ready)
            else:
                result = work(piece)
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / _part(piece), result)
    shutil.rmtree(folder, ignore_errors=True)


def parts_folder(target: Path, pieces: int) -> Path:
    """The folder beside `target` that holds the results of pieces until `target` is complete."""
    return target.with_name(f".{target.name.lstrip('.')}.{pieces}.parts")


def _part(piece: int) -> str:
    return f"{piece}.part"


def _assemble(
    target: Path,
    parts: Sequence[Path],
    assemble: Callable[[Sequence[Path], Path], None],
    ready: Callable[[], bool],
) -> None:
    temporary = temporary_beside(target)
    try:
        assemble(parts, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except FileNotFoundError:  # a process that was taken for dead has finished, and removed the parts
        if not ready():
            raise
    finally:
        temporary.unlink(missing_ok=True)


class _Claims:
    """The claims of this process in a folder, one at a time, and what it knows of those of others.

    A thread changes the claim every few seconds while the context lasts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._me = {"host": os.uname().nodename, "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._claim: Path | None = None
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_changing, name="claim", daemon=True)

    def __enter__(self) -> _Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._release()

    def take(self, pieces: Sequence[int], found: set[str]) -> int | None:
        """Claim one of `pieces` in place of the last one; none if living processes work on all of them.

        found: the names of the files in the folder.

        Raises:
            OSError: no claim can be written.
        """
        self._release()
        free = [piece for piece in pieces if _claim(piece) not in found]
        # in another order in each process, so that they seldom reach for the same piece
        for piece in random.sample(free, len(free)) or pieces:
            if free or self._is_dead(piece):
                path = self._folder / _claim(piece)
                if not free:
                    path.unlink(missing_ok=True)
                with contextlib.suppress(FileExistsError):
                    self._write(path, os.O_CREAT | os.O_EXCL, 0)
                    self._claim = path
                    break
        else:
            return None
        if not self._thread.is_alive():
            self._thread.start()
        return piece

    def _release(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            with contextlib.suppress(OSError):
                claim.unlink()

    def _is_dead(self, piece: int) -> bool:
        """Whether the process that claimed a piece has ended, or has been still for long."""
        try:
            content = (self._folder / _claim(piece)).read_bytes()
        except FileNotFoundError:
            return True
        before, since = self._seen.get(piece, (b"", 0.0))
        if content != before:
            since = time.monotonic()
            self._seen[piece] = content, since
        return time.monotonic() - since > _STILL or self._has_ended(content)

    def _has_ended(self, content: bytes) -> bool:
        """Whether a claim is that of a process of this host that no longer exists."""
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, PermissionError):
            found = json.loads(content)
            if found["host"] == self._me["host"]:
                try:
                    os.kill(found["pid"], 0)
                except ProcessLookupError:
                    return True
        return False

    def _keep_changing(self) -> None:
        beat = 0
        while not self._ended.wait(_BEAT):
            beat += 1
            claim = self._claim
            if claim is not None:
                with contextlib.suppress(OSError):  # released meanwhile, or a full disk
                    self._write(claim, 0, beat)

    def _write(self, path: Path, flags: int, beat: int) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o666)
        try:
            # of one length and in one call, so that no reader sees a part of it
            os.pwrite(descriptor, json.dumps({**self._me, "beat": beat}).encode().ljust(256), 0)
        finally:
            os.close(descriptor)


def _claim(piece: int) -> str:
    return f"{piece}.claim"
