"""This rank's place in the run: megatron-core's process groups, created once and then handed around."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel

from megatron_evomoe.config import RunConfig
from megatron_evomoe.parallel.degrees import validate, virtual_stages


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One kind of parallelism: the ranks that split the same thing with this rank."""

    size: int
    rank: int
    """This rank's index in the group, from 0."""
    group: dist.ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Topology:
    """All groups that this rank belongs to."""

    world_size: int
    rank: int
    tensor: Axis
    """TP: shares of each weight matrix outside the experts."""
    pipeline: Axis
    """PP: consecutive layers."""
    context: Axis
    """CP: parts of each sequence."""
    data: Axis
    """Replicas, which read different samples."""
    expert: Axis
    """EP: different experts of each mixture."""
    expert_tensor: Axis
    """Expert-TP: shares of each expert's weight matrices."""
    model_group: dist.ProcessGroup
    """TP x PP: the ranks that hold one copy of everything outside the experts."""
    expert_model_group: dist.ProcessGroup
    """Expert-TP x EP x PP: the ranks that hold one copy of all experts."""
    data_and_context_group: dist.ProcessGroup
    """DP x CP: the ranks that hold the same weights outside the experts."""
    tensor_and_context_group: dist.ProcessGroup
    """TP x CP: the ranks that hold the positions of the same samples."""
    chunks: int
    """Model chunks on this rank; more than 1 with the interleaved schedule."""

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds the vision tower, the projector and the embedding."""
        return self.pipeline.rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank holds the last norm and the output layer, and computes the loss."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def reads_data(self) -> bool:
        """Whether this rank reads its replica's samples; the others receive them (parallel/broadcast.py)."""
        return self.tensor.rank == self.pipeline.rank == self.context.rank == 0


def initialize(config: RunConfig) -> Topology:
    """Create megatron-core's groups for `config.parallel`. Communicates: every rank calls it once.

    Raises:
        ConfigError: the degrees do not fit the world or the model (parallel/degrees.py).
    """
    validate(config, dist.get_world_size())
    p = config.parallel
    ps.initialize_model_parallel(
        tensor_model_parallel_size=p.tensor_model_parallel_size,
        pipeline_model_parallel_size=p.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages(config),
        context_parallel_size=p.context_parallel_size,
        expert_model_parallel_size=p.expert_model_parallel_size,
        expert_tensor_parallel_size=p.expert_tensor_parallel_size,
        distributed_timeout_minutes=p.distributed_timeout_minutes,
    )
    return current()


def current() -> Topology:
    """This rank's place in the groups that exist."""
    return Topology(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor=_axis(ps.get_tensor_model_parallel_group()),
        pipeline=_axis(ps.get_pipeline_model_parallel_group()),
        context=_axis(ps.get_context_parallel_group()),
        data=_axis(ps.get_data_parallel_group()),
        expert=_axis(ps.get_expert_model_parallel_group()),
        expert_tensor=_axis(ps.get_expert_tensor_parallel_group()),
        model_group=ps.get_model_parallel_group(),
        expert_model_group=ps.get_expert_tensor_model_pipeline_parallel_group(),
        data_and_context_group=ps.get_data_parallel_group(with_context_parallel=True),
        tensor_and_context_group=ps.get_tensor_and_context_parallel_group(),
        chunks=ps.get_virtual_pipeline_model_parallel_world_size() or 1,
    )


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(size=dist.get_world_size(group), rank=dist.get_rank(group), group=group)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and megatron-core's generators.

    Parts of the model that ranks replicate start from the same weights on all of them.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
