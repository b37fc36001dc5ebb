"""Rules for the degrees of parallelism, checked before any work starts.

Nothing here communicates or imports megatron-core, so a plan can ask about a cluster that is not there.

TP tensor · PP pipeline · CP context · EP expert · expert-TP tensor parallelism inside the experts.
"""

from __future__ import annotations

from megatron_evomoe.config import ConfigError, RunConfig
from megatron_evomoe.config.kinds import StageKind


def validate(config: RunConfig, world_size: int) -> None:
    """Check that `world_size` ranks can hold the configured degrees, the model and the batch.

    Raises:
        ConfigError: names the value, the rule, and what would fit.
    """
    _check_world(config, world_size)
    _check_model(config)
    _check_options(config)
    _check_batch(config, world_size)


def virtual_stages(config: RunConfig) -> int | None:
    """Chunks per pipeline rank of the interleaved schedule, at least 2; none without interleaving.

    Raises:
        ConfigError: there is only one pipeline stage, or its layers do not split evenly into several chunks.
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


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Replicas: how many ranks hold the same weights outside the experts and read different samples."""
    return world_size // _replica_size(config)


def microbatches(config: RunConfig, replicas: int) -> int:
    """Forward passes of each replica in one optimizer step."""
    return config.train.global_batch_size // (config.train.micro_batch_size * replicas)


def _replica_size(config: RunConfig) -> int:
    p = config.parallel
    return p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size


def _check_world(config: RunConfig, world_size: int) -> None:
    p = config.parallel
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    ep, expert_tp = p.expert_model_parallel_size, p.expert_tensor_parallel_size
    if world_size % (tp * pp * cp):
        raise ConfigError(
            f"TP {tp} x PP {pp} x CP {cp} = {tp * pp * cp} does not divide the {world_size} ranks of this "
            f"run; the product must be one of {_divisors(world_size)}"
        )
    if world_size % (expert_tp * ep * pp):
        raise ConfigError(
            f"expert-TP {expert_tp} x EP {ep} x PP {pp} = {expert_tp * ep * pp} does not divide the "
            f"{world_size} ranks of this run; EP x expert-TP must be one of {_divisors(world_size // pp)}"
        )


def _check_model(config: RunConfig) -> None:
    p, language, vision = config.parallel, config.language, config.vision
    tp, pp, ep = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.expert_model_parallel_size
    for what, count, name, degree in (
        ("num_experts", config.moe.num_experts, "EP", ep),
        ("num_layers", language.num_layers, "PP", pp),
    ):
        if count % degree:
            raise ConfigError(
                f"{what} {count} cannot be split over {name} {degree}; {name} must be one of "
                f"{_divisors(count)}"
            )
    for what, width, name, degree in (
        ("num_attention_heads", language.num_attention_heads, "TP", tp),
        ("vision_num_attention_heads", vision.num_attention_heads, "TP", tp),
        ("hidden_size", language.hidden_size, "TP", tp),
        ("ffn_hidden_size", language.ffn_hidden_size, "TP", tp),
        (
            "ffn_hidden_size of an expert,",
            language.ffn_hidden_size,
            "expert-TP",
            p.expert_tensor_parallel_size,
        ),
        ("vision_ffn_hidden_size", vision.ffn_hidden_size, "TP", tp),
    ):
        if width % degree:
            raise ConfigError(
                f"{what} {width} cannot be split over {name} {degree}; use a divisor of {width}"
            )


def _check_options(config: RunConfig) -> None:
    p = config.parallel
    tp = p.tensor_model_parallel_size
    routed = any(stage.kind == StageKind.ROUTE for stage in config.stages)
    if tp > 1 and p.sequence_parallel is False and routed:
        raise ConfigError(
            f"mixtures under TP {tp} need sequence_parallel (a rule of megatron-core's MoELayer); leave it "
            "out, or use TP 1"
        )
    if p.context_parallel_size > 1:
        raise ConfigError(
            f"context_parallel_size {p.context_parallel_size} cannot be used, because samples are not split "
            "over context-parallel ranks yet; use 1, and a larger tensor_model_parallel_size for long "
            "sequences"
        )
    if p.overlap_param_gather and not p.use_distributed_optimizer:
        raise ConfigError(
            "overlap_param_gather gathers what the distributed optimizer shards, and "
            "use_distributed_optimizer is false; leave one of the two at its default"
        )


def _check_batch(config: RunConfig, world_size: int) -> None:
    train, pp = config.train, config.parallel.pipeline_model_parallel_size
    replicas = data_parallel_size(config, world_size)
    if config.data.packing == "pack":  # each step has as many microbatches as its samples need
        groups = config.data.packing_replicas
        if groups is not None and groups % replicas:
            raise ConfigError(
                f"packing_replicas {groups} is not a multiple of data parallel {replicas}; use a common "
                "multiple of all data-parallel sizes that the run may have, or leave it out"
            )
        return
    samples = train.micro_batch_size * replicas
    if train.global_batch_size % samples:
        raise ConfigError(
            f"global_batch_size {train.global_batch_size} is not a multiple of micro_batch_size "
            f"{train.micro_batch_size} x data parallel {replicas} = {samples}; change one of them"
        )
    count = microbatches(config, replicas)
    if virtual_stages(config) and count % pp:
        raise ConfigError(
            f"the interleaved schedule needs microbatches ({count}) in multiples of PP {pp}; change "
            "global_batch_size or micro_batch_size, or do not interleave"
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
