"""The gradient buffer of megatron-core's `DistributedDataParallel`: offsets, padding, and each rank's shard.

Source: ``megatron/core/distributed/param_and_grad_buffer.py`` of 0.16.1; in 0.19.2 the padding is in
``optimizer/param_layout.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_evomoe.plan.rank_tensors import RankTensor

PARAMETER_ALIGNMENT = 64
"""With the distributed optimizer a parameter starts at a multiple of this number of elements."""
BUCKET_ALIGNMENT = 128
"""With the distributed optimizer a bucket's elements are a multiple of this and of the group's size."""


@dataclass(frozen=True)
class Buffer:
    """One buffer. All numbers count elements."""

    numel: int
    """Its length, padding included."""
    buckets: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int], ...]
    """Where each parameter lies."""
    group: int
    """Ranks among which it is reduced and, with the distributed optimizer, split."""

    def shard(self, rank: int | None) -> int:
        """Elements that rank `rank` of the group optimizes with the distributed optimizer.

        The rank gets one slice of every bucket. Padding is not counted. Without a rank this is an upper
        bound, the size of slices that hold no padding.
        """
        if rank is None:
            return self.numel // self.group
        total = 0
        for start, end in self.buckets:
            slice_length = (end - start) // self.group
            first = start + rank * slice_length
            total += sum(max(0, min(e, first + slice_length) - max(s, first)) for s, e in self.spans)
        return total


def buffer_of(
    tensors: Sequence[RankTensor], group: int, distributed: bool, bucket_size: int | None = None
) -> Buffer:
    """Place `tensors` from the last to the first, as megatron-core does.

    Args:
        group: number of ranks that reduce the buffer together.
        distributed: whether the distributed optimizer pads parameters and buckets; there is no other padding.
        bucket_size: elements after which a bucket is closed; None makes one bucket.
    """
    buckets: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    bucket_start = position = 0

    def close(end: int) -> int:
        nonlocal bucket_start
        end = _up(end, math.lcm(group, BUCKET_ALIGNMENT)) if distributed else end
        buckets.append((bucket_start, end))
        bucket_start = end
        return end

    for tensor in reversed(tensors):
        own = tensor.own_bucket and distributed
        start = _up(position, PARAMETER_ALIGNMENT) if distributed else position
        if own and start > bucket_start:
            start = close(start)
        position = start + tensor.numel
        spans.append((start, position))
        if own or (bucket_size is not None and position - bucket_start >= bucket_size):
            position = close(position)
    if position > bucket_start:
        position = close(position)
    return Buffer(numel=position, buckets=tuple(buckets), spans=tuple(spans), group=group)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
