"""Degrees of parallelism: checked before any work starts, then turned into megatron-core's process groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_evomoe.config import ConfigError, RunConfig
from megatron_evomoe.config.kinds import StageKind


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where this rank stands."""

    world_size: int
    rank: int
    data_parallel_size: int
    data_parallel_rank: int
    first_stage: bool
    last_stage: bool
    reads_data: bool
    """One rank per data-parallel replica reads samples; the others receive them (parallel/broadcast.py)."""


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def validate(config: RunConfig, world_size: int) -> None:
    """Refuse degrees that cannot be laid out on `world_size` ranks.

    Raises:
        ConfigError: names the product and what would fit.
    """
    p, lm = config.parallel, config.language
    tp, pp, cp, ep, etp = (
        p.tensor_model_parallel_size,
        p.pipeline_model_parallel_size,
        p.context_parallel_size,
        p.expert_model_parallel_size,
        p.expert_tensor_parallel_size,
    )
    model = tp * pp * cp
    if world_size % model:
        raise ConfigError(
            f"TP {tp} x PP {pp} x CP {cp} = {model} does not divide the {world_size} ranks of this run; "
            f"the product must be one of {_divisors(world_size)}"
        )
    if world_size % (etp * ep * pp):
        raise ConfigError(
            f"expert-TP {etp} x EP {ep} x PP {pp} = {etp * ep * pp} does not divide the {world_size} ranks "
            f"of this run; EP x expert-TP must be one of {_divisors(world_size // pp)}"
        )
    if config.moe.num_experts % ep:
        raise ConfigError(
            f"num_experts {config.moe.num_experts} cannot be split over EP {ep}; EP must be one of "
            f"{_divisors(config.moe.num_experts)}"
        )
    if lm.num_attention_heads % tp:
        raise ConfigError(f"{lm.num_attention_heads} attention heads cannot be split over TP {tp}")
    if config.vision.num_attention_heads % tp:
        raise ConfigError(
            f"the vision tower's {config.vision.num_attention_heads} heads cannot be split over TP {tp}"
        )
    if lm.num_layers % pp:
        raise ConfigError(
            f"{lm.num_layers} layers cannot be split over PP {pp}; PP must be one of "
            f"{_divisors(lm.num_layers)}"
        )
    for what, width, degree in (
        ("hidden_size", lm.hidden_size, tp),
        ("ffn_hidden_size", lm.ffn_hidden_size, tp),
        ("ffn_hidden_size of an expert,", lm.ffn_hidden_size, etp),
        ("vision_ffn_hidden_size", config.vision.ffn_hidden_size, tp),
    ):
        if width % degree:
            raise ConfigError(f"{what} {width} cannot be split over {degree} tensor-parallel ranks")
    routed = any(stage.kind == StageKind.ROUTE for stage in config.stages)
    if tp > 1 and p.sequence_parallel is False and routed:
        raise ConfigError(
            f"mixtures under TP {tp} need sequence_parallel (a rule of megatron-core's MoELayer); leave it "
            "out, or "
            "use TP 1"
        )
    if cp > 1:
        raise ConfigError(
            f"context_parallel_size {cp} cannot be used: samples are not split over context-parallel ranks "
            "yet; use "
            "1, and a larger tensor_model_parallel_size for long sequences"
        )
    if p.overlap_param_gather and not p.use_distributed_optimizer:
        raise ConfigError(
            "overlap_param_gather gathers what the distributed optimizer shards, and "
            "use_distributed_optimizer is "
            "false; leave one of the two at its default"
        )
    dp = world_size // model
    batch = config.train.micro_batch_size * dp
    if config.train.global_batch_size % batch:
        raise ConfigError(
            f"global_batch_size {config.train.global_batch_size} is not a multiple of micro_batch_size "
            f"{config.train.micro_batch_size} x data parallel {dp} = {batch}"
        )
    microbatches = config.train.global_batch_size // batch
    if (virtual_stages(config) or 1) > 1 and microbatches % pp:
        raise ConfigError(
            f"the interleaved schedule needs microbatches ({microbatches}) in multiples of PP {pp}; change "
            "global_batch_size or micro_batch_size, or do not interleave"
        )


def initialize(config: RunConfig) -> Topology:
    """Create megatron-core's groups for `config.parallel`. Communicates: every rank calls it once."""
    from megatron.core import parallel_state as ps

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
    from megatron.core import parallel_state as ps

    return Topology(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        data_parallel_size=ps.get_data_parallel_world_size(),
        data_parallel_rank=ps.get_data_parallel_rank(),
        first_stage=ps.get_pipeline_model_parallel_rank() == 0,
        last_stage=ps.get_pipeline_model_parallel_rank() == ps.get_pipeline_model_parallel_world_size() - 1,
        reads_data=ps.get_tensor_model_parallel_rank() == 0
        and ps.get_pipeline_model_parallel_rank() == 0
        and ps.get_context_parallel_rank() == 0,
    )


def virtual_stages(config: RunConfig) -> int | None:
    """Chunks per pipeline rank of the interleaved schedule, at least 2; none without interleaving.

    Raises:
        ConfigError: there is one pipeline stage only, or its layers do not split evenly into several chunks.
    """
    layers, stages = config.language.num_layers, config.parallel.pipeline_model_parallel_size
    per_chunk = config.parallel.num_layers_per_virtual_pipeline_stage
    if per_chunk is None:
        return None
    chunks, left_over = divmod(layers, stages * per_chunk)
    if stages < 2 or left_over or chunks < 2:
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage {per_chunk} must split the {layers // stages} layers of "
            f"each of {stages} pipeline stages (at least 2) into at least two chunks; change it, or leave it "
            "out"
        )
    return chunks


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and megatron-core's per-region generators; weights of replicated parts agree
    on all ranks.
    """
    import random

    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
