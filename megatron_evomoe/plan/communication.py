"""Bytes that one rank sends per optimizer step, by kind: an estimate from megatron-core's collectives.

For an all-gather or a reduce-scatter each of n ranks in a ring sends (n−1)/n of the whole tensor, for an
all-reduce twice that. Small messages are left out: scalars, reductions of the loss, the step's tokens and
pixels (or features), and gradients of norms and routers over TP. Evolution does not communicate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import trained_parts
from megatron_evomoe.parallel.degrees import data_parallel_size
from megatron_evomoe.plan import layout
from megatron_evomoe.plan.activations import Sizes, sizes_of
from megatron_evomoe.plan.gradient_flow import LayerFlow, chunk_flow, recomputed_modules
from megatron_evomoe.plan.rank_tensors import chunks, is_first, is_last
from megatron_evomoe.plan.states import GRADIENT_BYTES, States
from megatron_evomoe.plan.work import Work, step_work


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Bytes a rank sends per optimizer step."""

    tp: int = 0
    """Tensor parallel: activations between the ranks of a layer."""
    pp: int = 0
    """Pipeline: hidden states to the next stage, and their gradients to the stage before."""
    ep: int = 0
    """Tokens to their experts and back (all-to-all), and to the experts' TP ranks."""
    gradients: int = 0
    """Gradient reduction over replicas; that of the tied matrix also between first and last stage."""
    parameters: int = 0
    """Updated parameters gathered from their shards (distributed optimizer)."""

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return sum(asdict(self).values())


def volume_of(
    config: RunConfig,
    kind: StageKind,
    states: States,
    *,
    world_size: int,
    pp_rank: int,
    work: Work | None = None,
) -> Volume:
    """What a rank in pipeline stage `pp_rank` sends; `config` has layout and overrides applied.

    Args:
        work: a step's, of one replica. None takes full rows.
    """
    work = work or step_work(config, kind, world_size)
    z = sizes_of(config, work)
    tp = ep = 0
    for chunk in range(chunks(config)):
        for flow in chunk_flow(config, kind, pp_rank, chunk):
            tp += _tensor_parallel(config, z, flow)
            ep += _expert_parallel(config, z, flow)
        tp += _ends(config, z, kind, pp_rank, chunk, work.images)
    gradients, parameters = _data_parallel(config, states, world_size)
    return Volume(tp=tp, pp=_pipeline(config, z, pp_rank), ep=ep, gradients=gradients, parameters=parameters)


def _tensor_parallel(config: RunConfig, z: Sizes, flow: LayerFlow) -> int:
    """TP traffic around attention and a dense FFN; a mixture exchanges tokens through its dispatcher instead.

    A forward makes one gather and one scatter (or one all-reduce, which sends as much), and so does a
    backward. With sequence parallelism the backward gathers the input of a trained weight once more.
    """
    if z.t == 1:
        return 0
    full, modules = config.train.recompute_granularity == "full", recomputed_modules(config)
    split = z.R != z.T
    blocks = [(flow.ffn_input_grad, flow.trains_attention, full)]
    if not flow.mixture:
        blocks.append((flow.ffn_input_grad or flow.trains_ffn, flow.trains_ffn, full or "mlp" in modules))
    passes = 0
    for backward, trains, recomputes in blocks:
        passes += 2 * (1 + int(recomputes and backward) + int(backward)) + int(trains and split)
    return passes * _ring(z.t, z.T * z.C * z.e)


def _expert_parallel(config: RunConfig, z: Sizes, flow: LayerFlow) -> int:
    """Dispatch and combine in forward, backward and recomputed forward, with evenly spread tokens."""
    if not flow.mixture:
        return 0
    p = config.parallel
    backward = flow.ffn_input_grad or flow.trains_router or flow.trains_ffn
    recomputes = backward and (
        config.train.recompute_granularity == "full" or "moe" in recomputed_modules(config)
    )
    passes = 1 + int(backward) + int(recomputes)
    tokens = z.R * config.moe.moe_router_topk * z.C * z.e
    over_ep = 2 * _ring(p.expert_model_parallel_size, tokens)
    over_etp = 2 * _ring(p.expert_tensor_parallel_size, tokens * p.expert_tensor_parallel_size)
    return passes * (over_ep + over_etp)


def _ends(config: RunConfig, z: Sizes, kind: StageKind, pp_rank: int, chunk: int, images: int) -> int:
    """TP traffic of embedding, tower, projector and output layer."""
    total = 0
    if z.t == 1:
        return 0
    hidden, parts = _ring(z.t, z.T * z.C * z.e), trained_parts(config, kind)
    if is_first(pp_rank, chunk):
        v = config.vision
        positions = images * ((v.image_size // v.patch_size) ** 2 + int(v.model_type == "clip"))
        # two all-reduces per layer
        tower = v.num_layers_used * 4 * _ring(z.t, positions * v.hidden_size * z.e)
        total += 0 if config.data.cache_vision_features else tower * (2 if "vision" in parts else 1)
        total += 2 * hidden  # the embedding's all-reduce
        if "language" in parts or "projector" in parts:
            total += hidden  # the scattered gradient is gathered
    if is_last(config, pp_rank, chunk):
        total += (2 if z.R != z.T else 0) * hidden + (0 if z.R != z.T else 2 * hidden)
    return total


def _pipeline(config: RunConfig, z: Sizes, pp_rank: int) -> int:
    """Every chunk but the last sends hidden states, every chunk but the first gradients."""
    if config.parallel.pipeline_model_parallel_size == 1:
        return 0
    hidden = z.R * z.C * z.e
    sends = sum(
        int(not is_last(config, pp_rank, c)) + int(not is_first(pp_rank, c)) for c in range(chunks(config))
    )
    return sends * hidden


def _data_parallel(config: RunConfig, states: States, world_size: int) -> tuple[int, int]:
    """(gradients, parameters) per step."""
    replicas = data_parallel_size(config, world_size) * config.parallel.context_parallel_size
    same_experts = layout.expert_data_parallel(config, world_size)
    once = _ring(replicas, states.dense_reduced) + _ring(same_experts, states.expert_reduced)
    tied = states.tied * GRADIENT_BYTES  # an all-reduce between two ranks
    if config.parallel.use_distributed_optimizer:
        return once * GRADIENT_BYTES + tied, once * (2 if config.train.bf16 else 4)
    return 2 * once * GRADIENT_BYTES + tied, 0


def _ring(n: int, whole: int) -> int:
    return whole * (n - 1) // n
