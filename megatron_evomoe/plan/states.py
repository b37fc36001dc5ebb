"""Parameters, gradients, optimizer state and evolution state of one rank, in bytes. Exact.

Counted are each parameter; the fp32 gradient buffer of what trains, with its padding; Adam's two fp32
moments and, under bf16, the fp32 master copy, of the rank's shard with the distributed optimizer and of all
its trained parameters without; the fp32 experts 2…N of `evolve` that this rank keeps, and its copy of the
last step's expert 1. Not counted are one step counter per tensor (torch's Adam) and temporary memory of an
optimizer step. `tests/distributed/test_plan.py` compares with real runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.moe.evolution_rules import rule_named
from megatron_evomoe.parallel.degrees import data_parallel_size
from megatron_evomoe.plan.gradient_buffers import Buffer, buffer_of
from megatron_evomoe.plan.layout import expert_data_parallel
from megatron_evomoe.plan.rank_tensors import RankTensor, chunk_tensors, chunks

GRADIENT_BYTES = 4
MOMENT_BYTES = 8
MASTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class States:
    """One rank's resident memory, and what it reduces; ``…_bytes`` are bytes, the others elements."""

    parameters: int
    trainable: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    evolution_bytes: int
    dense_reduced: int
    """Elements reduced over all replicas, padding included."""
    expert_reduced: int
    """Elements reduced over the ranks with the same experts."""
    tied: int
    """Elements of the tied matrix, if this rank holds one of two copies that train."""

    @property
    def total_bytes(self) -> int:
        """The sum of all kinds of state."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.evolution_bytes


def element_bytes(config: RunConfig) -> int:
    """Bytes of one element of a parameter or an activation."""
    return 2 if config.train.bf16 else 4


def states_of(
    config: RunConfig,
    kind: StageKind,
    *,
    world_size: int,
    pp_rank: int,
    dp_rank: int | None = None,
    expert_dp_rank: int | None = None,
) -> States:
    """What one rank of pipeline stage `pp_rank` holds; `config` has layout and overrides applied.

    Args:
        dp_rank, expert_dp_rank: the rank's place among the replicas, and among the ranks with the same
            experts, which decides the shard and the evolved experts that it keeps. None takes an upper
            bound.
    """
    tensors = [chunk_tensors(config, kind, pp_rank, chunk) for chunk in range(chunks(config))]
    every = [t for chunk in tensors for t in chunk]
    dense = [_buffer(config, chunk, world_size, pp_rank, i, expert=False) for i, chunk in enumerate(tensors)]
    expert = [_buffer(config, chunk, world_size, pp_rank, i, expert=True) for i, chunk in enumerate(tensors)]
    trainable = sum(t.numel for t in every if t.trains)
    if config.parallel.use_distributed_optimizer:
        optimized = sum(b.shard(dp_rank) for b in dense) + sum(b.shard(expert_dp_rank) for b in expert)
    else:
        optimized = trainable
    return States(
        parameters=sum(t.numel for t in every),
        trainable=trainable,
        parameter_bytes=sum(t.numel for t in every) * element_bytes(config),
        gradient_bytes=sum(b.numel for b in dense + expert) * GRADIENT_BYTES,
        optimizer_bytes=optimized * (MOMENT_BYTES + (MASTER_BYTES if config.train.bf16 else 0)),
        evolution_bytes=_evolution_bytes(
            config, kind, every, data_parallel_size(config, world_size), dp_rank
        ),
        dense_reduced=sum(b.numel for b in dense),
        expert_reduced=sum(b.numel for b in expert),
        tied=sum(t.numel for t in every if t.own_bucket and t.trains),
    )


def _buffer(
    config: RunConfig,
    tensors: Sequence[RankTensor],
    world_size: int,
    pp_rank: int,
    chunk: int,
    *,
    expert: bool,
) -> Buffer:
    """A chunk's gradient buffer.

    megatron-core divides it into buckets only if reduction overlaps the backward, and then only the buffer
    of the first stage's first chunk.
    """
    replicas = data_parallel_size(config, world_size)
    cut = config.parallel.overlap_grad_reduce and pp_rank == 0 and chunk == 0
    group = (
        expert_data_parallel(config, world_size)
        if expert
        else replicas * config.parallel.context_parallel_size
    )
    chosen = [t for t in tensors if t.trains and t.expert_parallel == expert]
    return buffer_of(
        chosen,
        group,
        config.parallel.use_distributed_optimizer,
        max(40_000_000, 1_000_000 * replicas) if cut else None,
    )


def _evolution_bytes(
    config: RunConfig, kind: StageKind, tensors: Sequence[RankTensor], replicas: int, dp_rank: int | None
) -> int:
    """Experts 2…N are dealt round robin over the replicas (x CP), so the first replica keeps the most."""
    if kind != StageKind.EVOLVE:
        return 0
    group = replicas * config.parallel.context_parallel_size
    kept = len(range(1, config.moe.num_experts)[dp_rank or 0 :: group])
    previous = element_bytes(config) if kept and rule_named(config.moe.evolution_rule).needs_previous else 0
    return sum(t.numel for t in tensors if t.part == "first_expert") * (4 * kept + previous)
