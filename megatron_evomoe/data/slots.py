"""Memory that worker processes write microbatches into and the training process reads, used again and again.

Blocks are mapped before the workers are forked, so only their numbers cross processes: no file descriptor, no
copy, and nothing in /dev/shm. A block is free again when the last tensor in it is gone.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

_ALIGNMENT = 64


class Form(NamedTuple):
    """The shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Slots:
    """Blocks of one size. Pages that nothing was written to take no memory."""

    def __init__(self, count: int, size: int) -> None:
        """See the class.

        Args:
            size: of a block, in bytes.
        """
        self._size = size
        self._blocks = [mmap.mmap(-1, size) for _ in range(count)]
        self._free = list(reversed(range(count)))

    def take(self) -> int | None:
        """The number of a free block; none if all are in use.

        It is the one that was in use last, whose pages are there already.
        """
        return self._free.pop() if self._free else None

    def tensors(self, slot: int, forms: Sequence[Form]) -> list[torch.Tensor] | None:
        """Tensors of the given forms in a block, one after the other; none if they do not fit."""
        if sum(-(-form.size // _ALIGNMENT) * _ALIGNMENT for form in forms) > self._size:
            return None
        return list(_cut(torch.from_numpy(np.frombuffer(self._blocks[slot], np.uint8)), forms))

    def receive(self, slot: int, forms: Sequence[Form]) -> list[torch.Tensor]:
        """The tensors that a worker has written to a block, which is free when the last of them is gone."""
        memory = np.frombuffer(self._blocks[slot], np.uint8)
        # torch keeps the array as long as any tensor uses its memory
        weakref.finalize(memory, self._free.append, slot).atexit = False
        return list(_cut(torch.from_numpy(memory), forms))

    def release(self, slot: int) -> None:
        """Free a block that is not received."""
        self._free.append(slot)


def _cut(memory: torch.Tensor, forms: Sequence[Form]) -> Iterator[torch.Tensor]:
    start = 0
    for form in forms:
        # an empty tensor has no bytes that could be viewed as another dtype
        part = memory[start : start + form.size].view(form.dtype) if form.size else memory.new_empty(0)
        yield part.to(form.dtype).view(form.shape)
        start += -(-form.size // _ALIGNMENT) * _ALIGNMENT
