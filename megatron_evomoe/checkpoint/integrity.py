"""Checksums of all files of a checkpoint, taken while it is written and compared before it is read."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.serialization import get_crc32_options, set_crc32_options

from megatron_evomoe.checkpoint import files
from megatron_evomoe.checkpoint.record import CheckpointError

_THREADS = 2
_CACHED = 1 << 18  # bytes; fits into the second-level cache of a core


def checksum(path: Path) -> int:
    """The CRC-32 of a file, which detects each single changed byte at the speed of the disk."""
    value, block = 0, memoryview(bytearray(_CACHED))
    with files.open_regular(path) as file:
        while count := file.readinto(block):
            value = zlib.crc32(block[:count], value)
    return value


class SummedFile(io.BufferedWriter):
    """A binary file for writing that computes the CRC-32 of its content."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"), buffer_size=_CACHED)
        self.crc = 0

    def write(self, data: Any) -> int:
        """As `io.BufferedWriter.write`, in blocks that are still cached when they are written."""
        view = memoryview(data)
        for start in range(0, len(view), _CACHED):
            block = view[start : start + _CACHED]
            self.crc = zlib.crc32(block, self.crc)
            super().write(block)
        return len(view)

    def fileno(self) -> int:
        """The descriptor; the buffer is flushed first, because the caller is going to fsync."""
        self.flush()
        return super().fileno()


@contextlib.contextmanager
def no_checksums_of_torch() -> Iterator[None]:
    """Let torch.save write no CRC-32 of its own inside a `with` block; ours cover the whole file."""
    before = get_crc32_options()
    set_crc32_options(False)  # for all threads, unlike torch.utils.serialization.config.patch
    try:
        yield
    finally:
        set_crc32_options(before)


def mismatch(directory: Path, saved: dict[str, list[int]]) -> str | None:
    """The first file that is not as it was saved, in words; None if all are.

    Args:
        saved: file name to [bytes, CRC-32].
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        return next(
            filter(
                None, threads.map(lambda entry: _mismatch(directory / entry[0], *entry[1]), saved.items())
            ),
            None,
        )


def _mismatch(path: Path, size: int, crc: int) -> str | None:
    try:
        if path.lstat().st_size == size and checksum(path) == crc:
            return None
        return (
            f"checkpoint {path.parent} is damaged: the bytes of {path.name} are not those that were "
            "saved (checksum differs)"
        )
    except OSError as error:
        return f"checkpoint {path.parent} cannot be read: {path.name}: {error}"


def read_verified(directory: Path, name: str, saved: dict[str, list[int]], limit: int) -> bytes:
    """The bytes of one file of a checkpoint, compared with their size and checksum.

    Args:
        saved: file name to [bytes, CRC-32].
        limit: the most bytes that are read.

    Raises:
        CheckpointError: the file cannot be read, is larger than `limit`, or is not as it was saved.
    """
    try:
        content = files.read(directory / name, limit)
    except OSError as error:
        raise CheckpointError(f"checkpoint {directory} cannot be read: {name}: {error}") from None
    if [len(content), zlib.crc32(content)] != saved.get(name):
        raise CheckpointError(
            f"checkpoint {directory} is damaged: the bytes of {name} are not those that were saved"
        )
    return content
