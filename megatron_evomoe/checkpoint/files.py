"""Opens and writes the files of a checkpoint.

Only regular files are opened, never through a link or a pipe. Small files are written completely to the disk,
or the error names them.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(mode: int) -> str:
    """The kind of a file in words, from its `st_mode`."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file for reading, unbuffered.

    Raises:
        OSError: it cannot be opened, or is not a regular file (a link to one is not).
    """
    _require_regular(os.lstat(path).st_mode, path)  # first, because opening some devices has effects
    file = io.FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        _require_regular(os.fstat(file.fileno()).st_mode, path)  # it may have been replaced
    except OSError:
        file.close()
        raise
    return file


def _require_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, not a regular file", str(path))


def read(path: Path, limit: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: as for `open_regular`, or the file has more than `limit` bytes.
    """
    with io.BufferedReader(open_regular(path)) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, at most {limit} are read", str(path))
        return file.read(limit)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` as the file of an `OSError` that is raised inside a `with` block.

    The error of a failed write names no file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write(path: Path, content: bytes) -> None:
    """Write `content` and wait until it is on the disk; a network file system reports a full disk only then.

    Raises:
        OSError: the write failed; the error names `path`.
    """
    with naming(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the list of names of a directory, is on the disk.

    Raises:
        OSError: that failed; the error names `path`.
    """
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
