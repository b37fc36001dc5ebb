"""A checkpoint's files. Opening what lies in its folder: regular files alone, never through a link, never
waiting for a pipe. Writing the small ones: whole on the disk, or an error with the file's name.
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
    """What a file is, in words, from its `st_mode`."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


def open_regular(path: Path) -> io.FileIO:
    """`path` for reading, unbuffered.

    Raises:
        OSError: it cannot be opened, or is no regular file (a link to one is none).
    """
    _require_regular(os.lstat(path).st_mode, path)  # before it is opened: opening some devices does something
    file = io.FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        _require_regular(os.fstat(file.fileno()).st_mode, path)  # it may have been exchanged
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
        OSError: as `open_regular`; or it has more than `limit` bytes.
    """
    with io.BufferedReader(open_regular(path)) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, at most {limit} are read", str(path))
        return file.read(limit)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an `OSError` raised inside `path` as its file: a failed write knows a descriptor only."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write(path: Path, content: bytes) -> None:
    """Write `content` and have it on the disk. A network file system tells of a full disk only then.

    Raises:
        OSError: it could not be written; names `path`.
    """
    with naming(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk.

    Raises:
        OSError: it could not be written; names `path`.
    """
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
