"""Buckets, padding and shards by hand; tests/distributed/test_plan.py compares real buffers."""

from __future__ import annotations

from megatron_evomoe.plan.gradient_buffers import buffer_of
from megatron_evomoe.plan.rank_tensors import RankTensor


def tensors(*sizes: int, own: int | None = None) -> list[RankTensor]:
    return [RankTensor(f"t{i}", n, "language", True, 0, own_bucket=i == own) for i, n in enumerate(sizes)]


def test_without_the_distributed_optimizer_nothing_is_padded():
    buffer = buffer_of(tensors(10, 20, 30), 4, distributed=False)
    assert (buffer.numel, buffer.buckets) == (60, ((0, 60),))
    assert buffer.spans == ((0, 30), (30, 50), (50, 60))  # the last parameter comes first


def test_paddings():
    """30 at 0, 20 at 64 and 10 at 128 end at 138, padded to a multiple of lcm(3, 128) = 384."""
    buffer = buffer_of(tensors(10, 20, 30), 3, distributed=True)
    assert buffer.spans == ((0, 30), (64, 84), (128, 138))
    assert buffer.numel == 384


def test_shards_hold_parameters_not_padding():
    """Of three slices of 128, the first has 30 + 20, the second 10, the third only padding."""
    buffer = buffer_of(tensors(10, 20, 30), 3, distributed=True)
    assert [buffer.shard(rank) for rank in range(3)] == [50, 10, 0]
    assert buffer.shard(None) == 128


def test_the_tied_matrix_has_a_bucket_of_its_own():
    """The buckets on both sides of it have 5 and 7 elements, each padded to 128."""
    buffer = buffer_of(tensors(5, 300, 7, own=1), 2, distributed=True)
    assert buffer.buckets == ((0, 128), (128, 512), (512, 640))
    assert [buffer.shard(rank) for rank in (0, 1)] == [7 + 192 + 5, 108]


def test_overlapped_reduction_cuts_buckets():
    buffer = buffer_of(tensors(100, 100, 100), 2, distributed=True, bucket_size=150)
    assert buffer.buckets == ((0, 256), (256, 384))


def test_nothing_trains():
    assert buffer_of([], 8, distributed=True).numel == 0
