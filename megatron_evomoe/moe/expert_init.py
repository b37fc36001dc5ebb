"""Starts experts as copies of a dense FFN (`replicate`), or as copies with noise (`noise`).

These are the baselines for expert evolution. Replication happens while a checkpoint is loaded: every
expert's entry of the sharded state dict names the dense FFN's key, so ``dist_checkpointing.load`` fills
each expert from ``mlp.linear_fc1.weight``, whatever the layouts of the checkpoint and of the run. That
needs neither a converter nor a second copy on disk. (megatron-core's ``upcycling_utils.py`` does the same
to a model in memory.)

Shape legend: N experts · F width of the FFN (2F rows in a gated first layer) · C width of the stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

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
"""Pattern of an expert's key in a checkpoint.

The expert's index is an axis of the tensor, or is part of the key if megatron-core's
``singleton_local_shards`` is set.
"""


def dense_expert_sharded_state_dict(
    moe_layer: Any, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
) -> dict[str, Any]:
    """The sharded state dict of a MoE layer's experts, each to be read from the dense FFN at `prefix`.

    Args:
        moe_layer: a `MoELayer` with `SequentialMLP` or `TEGroupedMLP` experts.
        prefix, sharded_offsets, metadata: as for ``moe_layer.sharded_state_dict``.

    Returns:
        Entries under the keys that ``moe_layer.load_state_dict`` expects. They are for loading only.

    Raises:
        ConfigError: the layer's experts are of another class.
    """
    experts = moe_layer.experts
    if not isinstance(experts, (SequentialMLP, TEGroupedMLP)):
        raise ConfigError(
            f"{type(experts).__name__} stores its experts in a form of its own and cannot start from a dense "
            "checkpoint; use SequentialMLP (moe_grouped_gemm: false) or TEGroupedMLP"
        )
    return read_experts_from_dense(experts.sharded_state_dict(f"{prefix}experts.", sharded_offsets, metadata))


def read_experts_from_dense(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """A model's sharded state dict with every expert's entry naming the dense FFN; the rest is unchanged."""
    return {k: _dense_entry(entry) for k, entry in sharded_state_dict.items()}


def _dense_entry(entry: Any) -> Any:
    match = _EXPERT_KEY.match(getattr(entry, "key", ""))
    if not match:
        return entry
    if isinstance(entry, ShardedObject):
        # A layer's extra state holds FP8 scales (None on a CPU). The reader hands out one object once and not
        # N times, and scales are measured anew within a few steps, so each expert keeps the state it has.
        return LocalNonpersistentObject(entry.data)
    key, index = match["before"] + match["name"], match["index"]
    if isinstance(entry, ShardedTensorFactory):  # a gated fc1, which core splits when it builds the entry
        build = entry.build_fn
        return replace(
            entry,
            key=key,
            build_fn=lambda *args: [_without_expert(part, part.key, index) for part in build(*args)],
        )
    return _without_expert(entry, key, index)


def _without_expert(entry: ShardedTensor, key: str, index: str | None) -> ShardedTensor:
    """`entry` under `key` and without its expert axis.

    The expert axis is the last of the prepended axes; where `index` is given there is none.
    """
    at = entry.prepend_axis_num - 1
    expert = entry.global_offset[at] if index is None else int(index)
    # All experts are now replicas of one dense tensor, and megatron-core requires exactly one main replica.
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
    """Add normal noise to the matrices of every expert, not to biases. Communicates over expert-TP ranks.

    Call it after loading and before the optimizer copies the weights. The noise of a matrix depends on (seed,
    layer, expert, matrix) alone and is drawn for the whole matrix, of which each rank adds its part, so every
    layout gives the same experts.

    Args:
        experts: ``moe_layer.experts``, a `SequentialMLP` or `TEGroupedMLP`.
        layer_number: global, from 1.
        std_units: the noise's standard deviation, in units of the standard deviation of each matrix.
    """
    ranks, rank = experts.tp_group.size(), experts.tp_group.rank()
    for expert, which, weight in _matrices(experts):
        gates = 2 if which == 1 and experts.config.gated_linear_unit else 1
        axis = which  # of [gates, rows, columns]: TP splits fc1 by rows within gate and value, fc2 by columns
        local = (gates, weight.shape[0] // gates, weight.shape[1])
        shape = [n * ranks if i == axis else n for i, n in enumerate(local)]
        whole = initial_draws.expert_noise(seed, layer_number, expert, which, shape)
        part = whole.narrow(axis, rank * local[axis], local[axis]).reshape(weight.shape)
        scale = std_units * _std(weight, experts.tp_group)
        weight.copy_(weight.float() + part.to(weight.device) * scale)


def _matrices(experts: Any) -> Iterator[tuple[int, int, torch.nn.Parameter]]:
    """(global index, 1 or 2 for fc1 or fc2, local shard) of every expert on this rank."""
    first = experts.ep_group.rank() * experts.num_local_experts
    for i in range(experts.num_local_experts):
        for which in (1, 2):
            if isinstance(experts, SequentialMLP):
                yield first + i, which, getattr(experts.local_experts[i], f"linear_fc{which}").weight
            else:
                yield first + i, which, getattr(getattr(experts, f"linear_fc{which}"), f"weight{i}")


def _std(weight: torch.Tensor, group: torch.distributed.ProcessGroup) -> float:
    """Standard deviation of a matrix of which each rank of `group` holds a part. Communicates over it."""
    total = initial_draws.moments(weight)
    if group.size() > 1:
        torch.distributed.all_reduce(total, group=group)
    return initial_draws.std_of(total)
