"""Simulates files that cannot be written, as on a full or broken disk, without a mount and without root."""

from __future__ import annotations

import builtins
import contextlib
import errno
import fnmatch
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def matching(pattern: str, code: int = errno.ENOSPC) -> Callable[[str], int]:
    """Return a fault for `failing`: error number `code` for file names that match `pattern`."""
    return lambda name: code if fnmatch.fnmatch(name, pattern) else 0


@contextlib.contextmanager
def failing(fault: Callable[[str], int], below: Path) -> Iterator[None]:
    """Within this context, writing to files below the folder `below` fails as `fault` decides.

    `fault` maps a file's name to the error number of the failing write, or to 0 for none, and is asked at
    every write. This holds for this process and its forks. The file is created all the same, as on a disk
    that has just become full.
    """
    opened, file_io, below = builtins.open, io.FileIO, below.absolute()

    class Failing(file_io):
        def write(self, data: Any) -> int:
            if code := fault(os.path.basename(self.name)):
                raise OSError(code, os.strerror(code))
            return super().write(data)

    def chosen(file: Any, mode: str) -> bool:
        return (
            isinstance(file, (str, os.PathLike))
            and not set(mode).isdisjoint("wax+")
            and below in Path(os.fspath(file)).absolute().parents
        )

    def open_failing(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *rest: Any, **more: Any
    ) -> Any:
        if not chosen(file, mode):
            return opened(file, mode, buffering, encoding, *rest, **more)
        raw = Failing(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding or "utf-8")

    def file_io_failing(file: Any, mode: str = "r", *rest: Any, **more: Any) -> io.FileIO:
        return (Failing if chosen(file, mode) else file_io)(file, mode.replace("b", ""), *rest, **more)

    builtins.open = io.open = open_failing
    io.FileIO = file_io_failing
    try:
        yield
    finally:
        builtins.open = io.open = opened
        io.FileIO = file_io
