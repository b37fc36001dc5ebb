"""Layouts: how the ranks are split, what is recomputed, which layouts to consider and which cannot run.

Nothing here allocates or communicates. The rules of feasibility are the trainer's own: `degrees.validate`,
`degrees.virtual_stages`, `evolution_rules.check_rule` and megatron-core's `TransformerConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_evomoe.config import ConfigError, GpuConfig, RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.model import precision
from megatron_evomoe.model.transformer_config import language_transformer_config
from megatron_evomoe.moe.evolution_rules import check_rule, validate_ranges
from megatron_evomoe.parallel import degrees

RECOMPUTE = ("none", "selective", "full")
MOST_CHUNKS = 4
"""Largest number of chunks per rank that the search considers.

More chunks reduce the pipeline bubble little and need much more point-to-point traffic.
"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism as in `ParallelConfig`, and the activation recompute.

    The data-parallel degree is the number of ranks divided by the other degrees.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    layers_per_chunk: int | None = None
    recompute: str = "none"

    @property
    def degrees(self) -> tuple[int, int, int, int, int | None]:
        """All that holds for a whole run; `recompute` may differ between its stages."""
        return self.tp, self.pp, self.ep, self.etp, self.layers_per_chunk

    def without_experts(self) -> Layout:
        """The same layout for a stage that has no experts: how they would be split changes nothing."""
        return replace(self, ep=1, etp=1)


def of_config(config: RunConfig) -> Layout:
    """The layout a configuration asks for."""
    p = config.parallel
    return Layout(
        tp=p.tensor_model_parallel_size,
        pp=p.pipeline_model_parallel_size,
        ep=p.expert_model_parallel_size,
        etp=p.expert_tensor_parallel_size,
        layers_per_chunk=p.num_layers_per_virtual_pipeline_stage,
        recompute=config.train.recompute_granularity or "none",
    )


def applied(config: RunConfig, layout: Layout) -> RunConfig:
    """`config` with `layout` in it."""
    # "true" is the default wherever TP > 1, and refused where TP is 1
    sequence_parallel = config.parallel.sequence_parallel if layout.tp > 1 else None
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_layers_per_virtual_pipeline_stage=layout.layers_per_chunk,
        sequence_parallel=sequence_parallel,
    )
    recompute: Any = None if layout.recompute == "none" else layout.recompute
    return replace(config, parallel=parallel, train=replace(config.train, recompute_granularity=recompute))


def candidates(
    config: RunConfig, *, world_size: int, gpus_per_node: int, held: dict[str, object] | None = None
) -> Iterator[Layout]:
    """Every layout worth asking about, feasible or not.

    TP stays inside a node and expert-TP divides TP; PP covers the divisors of the layers, and powers of two
    so that a refusal of the usual ones is seen; EP divides the experts.

    Args:
        held: `Layout` field -> the only value to consider.
    """
    held = held or {}
    layers = config.language.num_layers
    pps = sorted({d for d in (*_divisors(layers), 2, 4, 8, 16) if d <= world_size})

    def choose(name: str, values: list) -> list:
        return [held[name]] if name in held else values

    for tp in choose("tp", _divisors(gpus_per_node)):
        for pp in choose("pp", pps):
            for ep in choose("ep", _divisors(config.moe.num_experts)):
                for etp in choose("etp", _divisors(tp)):
                    for chunk in choose("layers_per_chunk", _chunk_lengths(layers, pp)):
                        for recompute in choose("recompute", list(RECOMPUTE)):
                            yield Layout(
                                tp=tp, pp=pp, ep=ep, etp=etp, layers_per_chunk=chunk, recompute=recompute
                            )


def _chunk_lengths(layers: int, pp: int) -> list[int | None]:
    if pp == 1 or layers % pp:
        return [None]
    per_rank = layers // pp
    return [None, *(d for d in _divisors(per_rank) if 2 <= per_rank // d <= MOST_CHUNKS)]


def check(config: RunConfig, kind: StageKind, world_size: int) -> None:
    """Refuse what could not be built or started on `world_size` ranks. `config` has the layout applied.

    Raises:
        ConfigError: names the value, the rule and what would fit.
    """
    degrees.validate(config, world_size)
    config.check(kind)  # again, because FP8's rules depend on the tensor-parallel size
    precision.check_sequence(config)
    p = config.parallel
    if kind == StageKind.EVOLVE:
        validate_ranges(config.moe.num_experts, config.moe.evolution_ranges)
        replicas = degrees.data_parallel_size(config, world_size)
        check_rule(config.moe.evolution_rule, p.use_distributed_optimizer, replicas)
    _check_core(config)


def _check_core(config: RunConfig) -> None:
    """Run megatron-core's own checks of the configuration.

    The plan may be made without Transformer Engine or a GPU, so options that need them are removed first.
    """
    assume_te = transformer_engine(config)
    language, moe, parallel = config.language, replace(config.moe, dtr_kernel="torch"), config.parallel
    train, gpu = config.train, config.gpu
    if assume_te:
        groups, tp = (
            language.query_groups,
            config.parallel.tensor_model_parallel_size,
        )
        if groups % tp and tp % groups:
            raise ConfigError(f"num_query_groups {groups} must be a multiple or a divisor of TP {tp}")
        language = replace(language, num_query_groups=None)
        moe, gpu = replace(moe, moe_grouped_gemm=False), GpuConfig()
        parallel = replace(parallel, context_parallel_size=1)
        portable = [m for m in train.recompute_modules if m not in ("layernorm", "moe_act")]
        train = replace(train, transformer_impl="local", recompute_modules=portable or ["core_attn"])
    language_transformer_config(
        replace(config, language=language, moe=moe, parallel=parallel, train=train, gpu=gpu)
    )


def transformer_engine(config: RunConfig) -> bool:
    """Whether the planned run has Transformer Engine.

    `auto` is assumed to find it, even if the machine that makes the plan does not have it.
    """
    return config.train.transformer_impl != "local"


def expert_data_parallel(config: RunConfig, world_size: int) -> int:
    """Ranks that hold the same experts."""
    p = config.parallel
    return world_size // (
        p.expert_tensor_parallel_size * p.expert_model_parallel_size * p.pipeline_model_parallel_size
    )


def microbatches(config: RunConfig, world_size: int) -> int:
    """Forward passes per optimizer step and replica."""
    return degrees.microbatches(config, degrees.data_parallel_size(config, world_size))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


LAYOUT_FLAGS = dict(
    zip(
        (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "num_layers_per_virtual_pipeline_stage",
            "recompute_granularity",
        ),
        (f.name for f in fields(Layout)),
        strict=True,
    )
)
"""Configuration field -> `Layout` field: a flag that names one holds it."""
