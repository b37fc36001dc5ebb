"""Files that cannot be written: a full disk or a broken one, at a file of one's choice, without a mount and without root."""

from __future__ import annotations

import builtins
import contextlib
import errno
import fnmatch
import io
import os
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def failing(pattern: str, code: int = errno.ENOSPC, *, when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Inside, what this process and its forks write to a file whose name matches `pattern` fails with `code`, while `when()`.

    The file is made, as on a disk that has just become full, and every write to it fails.
    """
    real = {"open": builtins.open, "FileIO": io.FileIO}

    class Failing(io.FileIO):
        def write(self, data: Any) -> int:
            if when():
                raise OSError(code, os.strerror(code))
            return super().write(data)

    def chosen(file: Any, mode: str) -> bool:
        return isinstance(file, (str, os.PathLike)) and not set(mode).isdisjoint("wax+") and fnmatch.fnmatch(
            os.path.basename(os.fspath(file)), pattern) and when()

    def open_failing(file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *rest: Any, **more: Any) -> Any:
        if not chosen(file, mode):
            return real["open"](file, mode, buffering, encoding, *rest, **more)
        raw = Failing(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding or "utf-8")

    def file_io(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> io.FileIO:
        return (Failing if chosen(file, mode) else real["FileIO"])(file, mode.replace("b", ""), *args, **kwargs)

    builtins.open = io.open = open_failing
    io.FileIO = file_io
    try:
        yield
    finally:
        builtins.open = io.open = real["open"]
        io.FileIO = real["FileIO"]
