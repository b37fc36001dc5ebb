"""Experts that start as copies of a dense FFN: `replicate`, and `noise` on top. The baselines beside
evolution.

Replication happens while loading: every expert's entry of the sharded state dict is pointed at the dense
FFN's key, so ``dist_checkpointing.load`` fills each expert from ``mlp.linear_fc1.weight`` in whatever layout
either side has. There is no converter and no second copy on disk. (core's ``upcycling_utils.py`` does the
same to a model already in memory.)

Shape legend: N experts, F width of the FFN (2F rows in a gated first layer), C width of the stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Optional

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

from megatron_evomoe.config import ConfigError
from megatron_evomoe.moe import initial_draws

_EXPERT_KEY = re.compile(
    r"^(?P<before>(?:.*\.)?)experts\.experts\.(?:(?P<index>\d+)\.)?(?P<name>linear_fc[12]\..+)$"
)
"""Where a checkpoint has an expert: the index is an axis of the tensor, or (core's singleton_local_shards) in
the key.
"""


def dense_expert_sharded_state_dict(
    moe_layer: Any, prefix: str = "", sharded_offsets: tuple = (), metadata: Optional[dict] = None
) -> dict[str, Any]:
    """The experts of one MoE layer, each to be read from the dense FFN that a checkpoint has at `prefix`.

    Args:
        moe_layer: a `MoELayer` with `SequentialMLP` or `TEGroupedMLP` experts.
        prefix, sharded_offsets, metadata: as for ``moe_layer.sharded_state_dict``.

    Returns:
        The very dictionary keys ``moe_layer.load_state_dict`` expects; for loading only, never for saving.
    """
    experts = moe_layer.experts
    if not isinstance(experts, (SequentialMLP, TEGroupedMLP)):
        raise ConfigError(
            f"{type(experts).__name__} stores its experts in a form of its own and cannot start from a dense "
            "checkpoint; use SequentialMLP (moe_grouped_gemm: false) or TEGroupedMLP"
        )
    return read_experts_from_dense(experts.sharded_state_dict(f"{prefix}experts.", sharded_offsets, metadata))


def read_experts_from_dense(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """A whole model's sharded state dict with every expert's entry pointed at the dense FFN; the rest as it
    was.
    """
    return {k: _dense_entry(entry) for k, entry in sharded_state_dict.items()}


def _dense_entry(entry: Any) -> Any:
    match = _EXPERT_KEY.match(getattr(entry, "key", ""))
    if not match:
        return entry
    if isinstance(entry, ShardedObject):
        # A layer's extra state (FP8 scales; None on a CPU): a checkpoint reader gives out one object once,
        # not N times, and scales are measured anew within a few steps. So each expert keeps what it has.
        return LocalNonpersistentObject(entry.data)
    key, index = match["before"] + match["name"], match["index"]
    if isinstance(entry, ShardedTensorFactory):  # a gated fc1, cut in gate and value only when core builds it
        build = entry.build_fn
        return replace(
            entry,
            key=key,
            build_fn=lambda *args: [_without_expert(part, part.key, index) for part in build(*args)],
        )
    return _without_expert(entry, key, index)


def _without_expert(entry: ShardedTensor, key: str, index: Optional[str]) -> ShardedTensor:
    """`entry` under `key`, without its expert axis, which is the last of the prepended ones (none if `index`
    is given).
    """
    at = entry.prepend_axis_num - 1
    expert = entry.global_offset[at] if index is None else int(index)
    # All experts are replicas of one dense tensor now; core wants exactly one holder of each piece to be the
    # main one.
    replica = (*entry.replica_id[:2], entry.replica_id[2] + expert * torch.distributed.get_world_size())
    if index is not None:
        return replace(entry, key=key, replica_id=replica)

    def drop(axes: tuple) -> tuple:
        return (*axes[:at], *axes[at + 1 :])

    return replace(
        entry,
        key=key,
        replica_id=replica,
        prepend_axis_num=at,
        global_shape=drop(entry.global_shape),
        global_offset=drop(entry.global_offset),
        axis_fragmentations=drop(entry.axis_fragmentations),
    )


@torch.no_grad()
def add_noise(experts: Any, seed: int, layer_number: int, std_units: float) -> None:
    """Add normal noise to every expert's matrices (not biases), `std_units` times each matrix's own standard
    deviation.

    Communicates over the expert-tensor-parallel group where that has more than one rank. To be called after
    loading and before the optimizer copies the weights.

    The noise of a matrix is a function of (seed, layer, expert, matrix) and drawn for the whole matrix, of
    which each rank adds its part: any layout gives the same experts.

    Args:
        experts: ``moe_layer.experts``, a `SequentialMLP` or `TEGroupedMLP`.
        layer_number: global, from 1.
    """
    ranks, rank = experts.tp_group.size(), experts.tp_group.rank()
    for expert, which, weight in _matrices(experts):
        gates = 2 if which == 1 and experts.config.gated_linear_unit else 1
        axis = (
            1 if which == 1 else 2
        )  # of [gates, rows, columns]: fc1 is cut by rows within gate and value, fc2 by columns
        local = (gates, weight.shape[0] // gates, weight.shape[1])
        shape = [n * ranks if i == axis else n for i, n in enumerate(local)]
        whole = initial_draws.expert_noise(seed, layer_number, expert, which, shape)
        part = whole.narrow(axis, rank * local[axis], local[axis]).reshape(weight.shape)
        scale = std_units * _std(weight, experts.tp_group)
        weight.copy_(weight.float() + part.to(weight.device) * scale)


def _matrices(experts: Any) -> Iterator[tuple[int, int, torch.nn.Parameter]]:
    """(global expert index, 1 or 2 for fc1 or fc2, the local shard) of every expert here."""
    first = experts.ep_group.rank() * experts.num_local_experts
    for i in range(experts.num_local_experts):
        for which in (1, 2):
            if isinstance(experts, SequentialMLP):
                yield first + i, which, getattr(experts.local_experts[i], f"linear_fc{which}").weight
            else:
                yield first + i, which, getattr(getattr(experts, f"linear_fc{which}"), f"weight{i}")


def _std(weight: torch.Tensor, group: torch.distributed.ProcessGroup) -> float:
    """Standard deviation of the whole matrix, of which each rank of the group has a part."""
    total = initial_draws.moments(weight)
    if group.size() > 1:
        torch.distributed.all_reduce(total, group=group)
    return initial_draws.std_of(total)
