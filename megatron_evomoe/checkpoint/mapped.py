"""Tensors without copies: views of a file, read when they are used and gone from memory when they are let go;
parts of larger ones, written from where they lie.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14


def view_of(path: Path, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A contiguous tensor that lies at byte `start` of a file; the caller has checked that the file is long
    enough.

    It may be written to; the file stays as it is.
    """
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        memory = mmap.mmap(
            file.fileno(), start - first + count * dtype.itemsize, offset=first, access=mmap.ACCESS_COPY
        )
    with contextlib.suppress(OSError, AttributeError):  # all pages at once is twice as fast as one by one
        memory.madvise(_POPULATE_READ)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start - first).reshape(shape)


def alone(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous and with a storage of its own size: torch.save writes the whole storage behind a
    view, and torch's checkpoint writer copies what does not fill its storage. Shares the memory where it
    can.
    """
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    start = tensor.storage_offset() * tensor.element_size()
    own = tensor.untyped_storage()[start : start + tensor.nbytes]  # shares the memory
    return torch.empty(0, dtype=tensor.dtype).set_(own, 0, tensor.shape, tensor.stride())
