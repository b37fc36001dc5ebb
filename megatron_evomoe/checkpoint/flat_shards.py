"""The state of a DistributedOptimizer as shards of the parameters of the model, without copies.

Each rank owns ranges of flattened parameters. megatron-core's format that can be resharded first gathers the
whole state on every replica, so that host memory and traffic grow with the model. But a range of a row-major
array consists of a few boxes (the end of a row, whole rows, the beginning of a row), and a checkpoint may
hold any boxes. Each rank therefore writes its own boxes from where they are in memory, and reads the boxes
that it needs under another layout. Keys and shapes on disk are those of megatron-core's `fully_reshardable`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

_STATE = ("param", "exp_avg", "exp_avg_sq")


def sharded(part: Any, model: dict[str, Any]) -> dict[int, dict[str, list[ShardedTensor]]]:
    """The shards of the state that this rank owns, as views.

    Args:
        part: a DistributedOptimizer whose moments are allocated.
        model: the sharded state dict of the model, whose leaves hold the parameters themselves.

    Returns:
        For each parameter of which this rank owns a range: the name of the state to boxes.

    Raises:
        ValueError: a parameter is not in `model`.
    """
    entries, _ = extract_matching_values(
        model, lambda leaf: isinstance(leaf, (ShardedTensor, ShardedTensorFactory))
    )
    by_parameter = {entry.data: entry for entry in nested_values(entries)}
    found: dict[int, dict[str, list[ShardedTensor]]] = {}
    for parameter, (start, stop) in owned_ranges(part):
        if parameter not in by_parameter:
            raise ValueError(
                f"a trained parameter of shape {tuple(parameter.shape)} is not in the model's sharded "
                "state dict"
            )
        state = part._get_main_param_and_optimizer_states(parameter)
        places = list(_places(by_parameter[parameter], start, stop))
        found[len(found)] = {
            name: [
                _box(
                    place,
                    state[name].detach(),
                    start,
                    f"optimizer.state.{name}.",
                    part.distributed_optimizer_instance_id,
                )
                for place in places
            ]
            for name in _STATE
        }
    return found


def owned_ranges(part: Any) -> Iterator[tuple[torch.nn.Parameter, tuple[int, int]]]:
    """Each parameter that this rank owns in part, and the range that it owns of the flattened parameter."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, (ranges["param"].start, ranges["param"].end)


def boxes(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Split elements [start, stop) of a row-major array of `shape` into contiguous boxes, in memory order.

    There are at most 2·d − 1 boxes for d dimensions.

    Returns:
        Offset, shape and first element of each box.
    """
    if start >= stop:
        return
    if not shape:
        yield (), (), start
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows are [first, last)
    if first > last:  # inside one row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]), first * row
    yield from _in_row(shape, last, last * row, stop)


def _in_row(
    shape: tuple[int, ...], index: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    base = index * math.prod(shape[1:])
    for offset, size, first in boxes(shape[1:], start - base, stop - base):
        yield (index, *offset), (1, *size), first + base


def _places(
    entry: ShardedTensor | ShardedTensorFactory, start: int, stop: int
) -> Iterator[tuple[ShardedTensor, int]]:
    """The shards, without data, of elements [start, stop) of a flattened local parameter.

    Returns:
        Each shard and its first element.
    """
    # on the meta device, where the views of a factory tell where they begin and nothing is computed
    index = torch.empty(entry.data.shape, dtype=torch.float32, device="meta")
    for whole in _tensors_of(entry, index):
        assert whole.data.is_contiguous(), f"{whole.key}: parts of a parameter must be contiguous"
        begin = whole.data.storage_offset()
        ahead = whole.prepend_axis_num
        for offset, size, first in boxes(
            tuple(whole.data.shape), max(start - begin, 0), min(stop - begin, whole.data.numel())
        ):
            place = (
                *whole.global_offset[:ahead],
                *(a + b for a, b in zip(whole.global_offset[ahead:], offset, strict=True)),
            )
            yield (
                replace(
                    whole,
                    data=None,
                    local_shape=(*(1,) * ahead, *size),
                    global_offset=place,
                    prepend_axis_num=0,
                    axis_fragmentations=None,
                ),
                first + begin,
            )


def _tensors_of(entry: ShardedTensor | ShardedTensorFactory, data: torch.Tensor) -> list[ShardedTensor]:
    if isinstance(entry, ShardedTensor):
        return [replace(entry, data=data, dtype=data.dtype)]
    return list(nested_values(replace(entry, data=data).build()))


def _box(
    place: tuple[ShardedTensor, int], flat: torch.Tensor, start: int, prefix: str, instance: int
) -> ShardedTensor:
    """A shard of `_places` with its data.

    Args:
        flat: the flattened range that this rank owns, whose first element is element `start` of the
            parameter.
    """
    shard, first = place
    data = flat[first - start : first - start + math.prod(shard.local_shape)].view(shard.local_shape)
    # data-parallel replicas own different ranges; the other two coordinates are those of the parameter
    return replace(
        shard,
        key=prefix + shard.key,
        data=data,
        dtype=data.dtype,
        replica_id=(*shard.replica_id[:2], instance),
    )
