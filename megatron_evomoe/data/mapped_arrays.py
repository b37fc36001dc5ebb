"""The arrays of a safetensors file, mapped into memory: only the pages that are used are read.

safetensors' own readers copy every tensor. Processes that map a file share its pages.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from pathlib import Path

import numpy as np

_DTYPES = {"BOOL": np.bool_, "U8": np.uint8, "U32": np.uint32, "I64": np.int64}
_MAX_HEADER = 1 << 16  # bytes; a dozen arrays take one or two thousand


def map_arrays(path: Path, max_bytes: int) -> tuple[dict[str, np.ndarray], mmap.mmap]:
    """The arrays of a file by name, read-only, and the map that holds them.

    The file may contain anything. It must not be changed in place afterwards, which the writers of this
    package never do: they replace files.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has more than `max_bytes`, or is not a file of such arrays.
    """
    descriptor = os.open(
        path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    )  # a pipe does not wait for a writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not 8 <= status.st_size <= max_bytes:
            raise ValueError("not a regular file of such a size")
        mapped = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    length = int.from_bytes(mapped[:8], "little")
    if length > min(_MAX_HEADER, status.st_size - 8):
        raise ValueError("the header is too long")
    header = json.loads(mapped[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    header.pop("__metadata__", None)
    return {name: _array(entry, mapped, 8 + length) for name, entry in header.items()}, mapped


def _array(entry: object, mapped: mmap.mmap, start: int) -> np.ndarray:
    try:
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]  # type: ignore[index]
        begin, end = entry["data_offsets"]  # type: ignore[index]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError("a size is not a number")
        count = math.prod(shape)
        if count * dtype.itemsize != end - begin or start + end > len(mapped):
            raise ValueError("sizes do not fit")
        return (
            np.frombuffer(mapped, dtype, count, start + begin).reshape(shape)
            if count
            else np.empty(shape, dtype)
        )
    except (LookupError, TypeError) as error:
        raise ValueError(f"an entry of the header is damaged: {error}") from None
