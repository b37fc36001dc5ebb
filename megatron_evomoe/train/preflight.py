"""Checks every stage before the first one begins, so that a mistake in the last stage is found at once."""

from __future__ import annotations

import importlib.util

import torch.distributed as dist

from megatron_evomoe.config import ConfigError, RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import check_feature_cache, trained_parts
from megatron_evomoe.model import precision, transformer_config
from megatron_evomoe.moe import evolution_rules
from megatron_evomoe.parallel import degrees


def check(config: RunConfig) -> None:
    """Check every stage of `config` against this run's ranks. Raises `ConfigError`, which names the stage."""
    for stage in config.stages:
        of_stage = config.for_stage(stage.name)
        try:
            check_stage(of_stage, stage.kind, dist.get_world_size())
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name!r}: {error}") from None
        check_feature_cache(of_stage, stage)


def check_stage(config: RunConfig, kind: StageKind, world_size: int) -> None:
    """Check one stage, its configuration already resolved. Raises `ConfigError`."""
    degrees.validate(config, world_size)
    precision.check_sequence(config)
    trained_parts(config, kind)
    for build in (
        transformer_config.language_transformer_config,
        transformer_config.vision_transformer_config,
        transformer_config.projector_transformer_config,
    ):
        build(config)
    parallel, train = config.parallel, config.train
    if kind == StageKind.EVOLVE:
        evolution_rules.validate_ranges(config.moe.num_experts, config.moe.evolution_ranges)
        replicas = degrees.data_parallel_size(config, world_size)
        evolution_rules.check_rule(config.moe.evolution_rule, parallel.use_distributed_optimizer, replicas)
    if kind == StageKind.ROUTE and config.moe.moe_token_dispatcher_type == "flex":
        _check_flex(config)
    if train.profile and (absent := [rank for rank in train.profile_ranks if rank >= world_size]):
        raise ConfigError(
            f"profile_ranks names {absent}, and this run has ranks 0 to {world_size - 1}; leave them out"
        )


def _check_flex(config: RunConfig) -> None:
    """Check what megatron-core itself would check only when it builds the first mixture."""
    parallel = config.parallel
    if parallel.expert_tensor_parallel_size * parallel.expert_model_parallel_size == 1:
        raise ConfigError(
            "moe_token_dispatcher_type flex sends tokens between ranks, and expert-TP x EP is 1; use alltoall"
        )
    if importlib.util.find_spec("deep_ep") is None:
        raise ConfigError(
            "moe_token_dispatcher_type flex needs DeepEP (the package deep_ep), which is not installed; "
            "install it or use alltoall"
        )
