"""Tensors without copies: views of files, and parts of larger tensors for torch.save."""

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
    """A contiguous tensor at byte `start` of a file, which must be long enough.

    The file is read when the tensor is used. Writing to the tensor does not change the file.
    """
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        memory = mmap.mmap(
            file.fileno(), start - first + count * dtype.itemsize, offset=first, access=mmap.ACCESS_COPY
        )
    with contextlib.suppress(OSError, AttributeError):  # all pages at once take half the time
        memory.madvise(_POPULATE_READ)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start - first).reshape(shape)


def alone(tensor: Tensor) -> Tensor:
    """A contiguous tensor whose storage has exactly its own size; it shares the memory if it can.

    torch.save writes the whole storage of a view, and torch's checkpoint writer copies a tensor that does not
    fill its storage.
    """
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    start = tensor.storage_offset() * tensor.element_size()
    own = tensor.untyped_storage()[start : start + tensor.nbytes]  # shares the memory
    return torch.empty(0, dtype=tensor.dtype).set_(own, 0, tensor.shape, tensor.stride())
