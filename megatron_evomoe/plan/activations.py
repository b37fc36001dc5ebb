"""Bytes of activations kept for the backward: an estimate after Korthikanti et al. 2022 (arXiv 2205.05198).

Their layer keeps s·b·h·(34 + 5·a·s/h) bytes, with dropout masks, stored s × s scores, a GELU FFN of width
4h, and everything trained. Here the same is counted for our layers: no dropout; a flash attention that keeps
its inputs, its output and a log-sum-exp instead of scores; FFNs with or without a gate, of any width;
mixtures whose experts share the tokens evenly; linear layers that keep no input if they are frozen, and an
FP8 input if they compute in FP8. Temporary tensors, the allocator's fragmentation and communication buffers
are not counted.

Shape legend: T tokens of a microbatch, of all TP ranks together · C width · F width of the FFN · e bytes of
    an
activation · t TP size. Under sequence parallelism activations between the TP regions are split too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import trained_parts
from megatron_evomoe.data.feature_cache import image_form
from megatron_evomoe.model.inventory import padded_vocab_size
from megatron_evomoe.moe.router import router_tensors
from megatron_evomoe.plan import fp8, layout
from megatron_evomoe.plan.gradient_flow import LayerFlow, chunk_flow, recomputed_modules
from megatron_evomoe.plan.rank_tensors import chunks, is_first, is_last
from megatron_evomoe.plan.states import element_bytes
from megatron_evomoe.plan.work import Work, full_microbatch


@dataclass(frozen=True)
class Sizes:
    """The quantities of the formulas."""

    e: int
    C: int
    T: int
    """Positions of one microbatch, or of other work, on one context-parallel rank."""
    R: int
    """Positions outside the TP regions: T, over TP under sequence parallelism."""
    t: int
    squares: int
    """Sum of the squared lengths of the sequences within which attention is computed."""
    fused: bool
    """Whether layers are Transformer Engine's and SwiGLU is fused."""
    on_gpu: bool
    """Whether a GPU runs it; the DTR in PyTorch has another form on a CPU (moe/routers/dynamic.py)."""


def sizes_of(config: RunConfig, work: Work | None = None, *, on_gpu: bool = True) -> Sizes:
    """Sizes for some work, or for one microbatch of the longest rows that the stage allows."""
    p, work = config.parallel, work or full_microbatch(config)
    t = p.tensor_model_parallel_size
    T = work.positions // p.context_parallel_size
    split = p.sequence_parallel if p.sequence_parallel is not None else t > 1
    return Sizes(
        e=element_bytes(config),
        C=config.language.hidden_size,
        T=T,
        R=T // t if split else T,
        t=t,
        squares=work.squares // p.context_parallel_size,
        fused=layout.transformer_engine(config),
        on_gpu=on_gpu,
    )


def activation_bytes(
    config: RunConfig,
    kind: StageKind,
    pp_rank: int,
    microbatches: int,
    *,
    step_images: int | None = None,
    on_gpu: bool = True,
) -> int:
    """The most that one rank of pipeline stage `pp_rank` keeps at a time, with the step's images.

    Args:
        config: has layout and overrides applied.
        microbatches: a replica's number of them in a step.
        step_images: a replica's number of images in a step; None takes one for each row.
        on_gpu: whether to plan what a GPU runs, or what a CPU runs, for comparisons on a CPU.
    """
    z = sizes_of(config, on_gpu=on_gpu)
    count = microbatches * config.train.micro_batch_size if step_images is None else step_images
    total = step_images_bytes(config, z, kind, count) if is_first(pp_rank, 0) else 0
    for chunk, count in enumerate(in_flight(config, pp_rank, microbatches)):
        flows = chunk_flow(config, kind, pp_rank, chunk)
        total += count * _layers(config, z, flows)
        if is_first(pp_rank, chunk):
            total += count * projector(config, z, kind)
        if is_last(config, pp_rank, chunk):
            total += head(config, z, kind)  # its backward follows at once, whatever else is in flight
    return total + recomputed_block(config, z, kind, pp_rank)


def in_flight(config: RunConfig, pp_rank: int, microbatches: int) -> list[int]:
    """For each chunk of the rank, the largest number of microbatches that wait for their backward.

    The schedule is 1F1B, or interleaved if there are several chunks.
    """
    pp, v = config.parallel.pipeline_model_parallel_size, chunks(config)
    if v == 1:
        return [min(microbatches, pp - pp_rank)]
    outstanding = min(microbatches * v, 2 * (pp - pp_rank - 1) + (v - 1) * pp + 1)
    counts = [0] * v
    for i in range(outstanding):  # the schedule runs PP microbatches through a chunk, then turns to the next
        counts[i // pp % v] += 1
    return counts


def _layers(config: RunConfig, z: Sizes, flows: list[LayerFlow]) -> int:
    if config.train.recompute_granularity != "full":
        return sum(layer(config, z, flow) for flow in flows)
    blocks = -(-len(flows) // config.train.recompute_num_layers)
    return blocks * z.R * z.C * z.e


def recomputed_block(config: RunConfig, z: Sizes, kind: StageKind, pp_rank: int) -> int:
    """Under full recompute, the activations of the block whose backward runs."""
    if config.train.recompute_granularity != "full":
        return 0
    n = config.train.recompute_num_layers
    flows = [chunk_flow(config, kind, pp_rank, chunk) for chunk in range(chunks(config))]
    return max(
        sum(layer(config, z, flow) for flow in of_chunk[i : i + n])
        for of_chunk in flows
        for i in range(0, len(of_chunk), n)
    )


def layer(config: RunConfig, z: Sizes, flow: LayerFlow) -> int:
    """Activations of one decoder layer and microbatch under the configured selective recompute."""
    fed = _mixture(config, z, flow) if flow.mixture else _dense_ffn(config, z, flow)
    return _attention(config, z, flow) + fed


def _attention(config: RunConfig, z: Sizes, flow: LayerFlow) -> int:
    if not flow.ffn_input_grad:
        return 0
    lm = config.language
    heads, groups, head_size = lm.num_attention_heads, lm.query_groups, lm.head_size
    recomputed = recomputed_modules(config)
    kept = z.R * z.C  # the norm's input
    inputs = 0
    if flow.trains_attention and "layernorm" not in recomputed:
        inputs += z.R * z.C  # its output, the projection's input
    if flow.trains_attention:
        kept += _normalized(config, z)
    # the projection's output, which the values are a view of; queries and keys again after their rotation
    kept += z.T * ((heads + 2 * groups) + (heads + groups)) * head_size // z.t
    if config.language.qk_layernorm:
        kept += z.T * (heads + groups) * head_size // z.t
    context = z.T * heads * head_size // z.t
    recomputes = "core_attn" in recomputed
    if flow.trains_attention or not recomputes:
        kept += context
    if flow.trains_attention and not recomputes and _segment_by_segment(config, z):
        kept += context  # the segments' outputs are kept, and joined to the projection's input
    if flow.fp8 and flow.trains_attention and fp8.projection_keeps_copy(config):
        inputs += context
    return kept * z.e + _inputs(config, z, flow, inputs) + (0 if recomputes else _log_sum_exp(z.T, heads, z))


def _segment_by_segment(config: RunConfig, z: Sizes) -> bool:
    """Whether packed rows attend without a kernel that knows segments (model/attention.py)."""
    return config.data.packing == "pack" and not z.fused and (not z.on_gpu or z.e == 4)


def _inputs(config: RunConfig, z: Sizes, flow: LayerFlow, elements: int) -> int:
    """Bytes of what linear layers keep of their inputs for their weights' gradients."""
    return fp8.input_bytes(config, elements) if flow.fp8 else elements * z.e


def _normalized(config: RunConfig, z: Sizes) -> int:
    """What PyTorch's unfused RMSNorm keeps for a trained weight's gradient: the values before scaling."""
    return z.R * z.C if not z.fused and config.language.normalization == "RMSNorm" else 0


def _log_sum_exp(positions: int, heads: int, z: Sizes) -> int:
    """Bytes of the fp32 number that flash attention keeps for each query and head."""
    return 4 * positions * heads // z.t


def _dense_ffn(config: RunConfig, z: Sizes, flow: LayerFlow) -> int:
    recomputed = recomputed_modules(config)
    if not (flow.ffn_input_grad or flow.trains_ffn):
        return 0
    kept = inputs = 0
    if flow.ffn_input_grad and not config.language.parallel_residual:
        # the norm's input; a parallel residual has one norm, counted with the attention
        kept += z.R * z.C + (_normalized(config, z) if flow.trains_attention else 0)
    if "mlp" in recomputed:
        return (kept + z.R * z.C) * z.e
    # With a parallel residual the FFN and the attention have one input, of which each makes an FP8 copy.
    shares_input = config.language.parallel_residual and flow.trains_attention and not flow.fp8
    if flow.trains_ffn and not shares_input and "layernorm" not in recomputed:
        inputs += z.R * z.C
    kept += inner(config, z, z.T // z.t)
    inputs += z.T * config.language.ffn_hidden_size // z.t if flow.trains_ffn else 0
    return kept * z.e + _inputs(config, z, flow, inputs)


def inner(config: RunConfig, z: Sizes, rows: int) -> int:
    """Elements that the activation between an FFN's two matrices keeps for `rows` tokens."""
    F = config.language.ffn_hidden_size
    if not config.language.gated_linear_unit:
        return rows * F
    # unfused: act(gate), and a copy of the other half too
    return rows * F * (2 if z.fused and config.language.activation == "silu" else 4)


def _mixture(config: RunConfig, z: Sizes, flow: LayerFlow) -> int:
    if not (flow.ffn_input_grad or flow.trains_router or flow.trains_ffn):
        return 0
    recomputed = recomputed_modules(config)
    kept = inputs = 0
    if flow.ffn_input_grad and not config.language.parallel_residual:
        kept += z.R * z.C + (_normalized(config, z) if flow.trains_attention else 0)
    kept += z.R * z.C  # what router and dispatcher read
    if "moe" in recomputed:
        return kept * z.e
    routed = z.R * config.moe.moe_router_topk  # an even share, whatever EP is
    fused = z.fused and config.language.gated_linear_unit  # one kernel for activation and router probability
    if flow.ffn_input_grad or flow.trains_ffn or fused:
        kept += inner(config, z, routed)
    if not fused:
        kept += routed * config.language.ffn_hidden_size  # the product with the probability keeps its factor
    if flow.trains_ffn:
        inputs += routed * z.C * config.parallel.expert_tensor_parallel_size
        inputs += 0 if "moe_act" in recomputed else routed * config.language.ffn_hidden_size
    logits = 4 * z.R * 4 * config.moe.num_experts  # and probabilities, in fp32
    return (
        kept * z.e
        + _inputs(config, z, flow, inputs)
        + logits
        + (dtr_bytes(config, z) if config.moe.router == "dtr" else 0)
    )


def dtr_bytes(config: RunConfig, z: Sizes) -> int:
    """What the hypernetworks keep beside the tokens and their own parameters, all of it in fp32.

    This depends on the form that computes them.
    """
    moe = config.moe
    N, h, r = moe.num_experts, moe.dtr_hidden_size, moe.dtr_rank
    projected = h + (h + 1) * 2 * r
    tensors = router_tensors(moe, config.language) if z.e != 4 else []  # of these an fp32 copy is kept
    copied = {t.name: math.prod(t.shape) for t in tensors}
    if moe.dtr_kernel == "triton":  # keeps the projections, and the order of the tokens in int64
        read = sum(numel for name, numel in copied.items() if name == "phi" or name.endswith("weight2_up"))
        return 4 * (z.R * (projected + 2) + read)
    per_token = (h + 1) * (2 * r + N + 1) + 4 * r + (h if moe.dtr_activation != "none" else 0)
    if not z.on_gpu:  # sorts tokens by modality, and keeps their order in int64 and the sorted logits
        return 4 * (z.R * (per_token + 2 + N) + sum(copied.values()))
    # All tokens meet both hypernetworks and one result is kept. The backward also keeps the mask, and the
    # joined projection matrices in the tokens' own dtype.
    read = sum(numel for name, numel in copied.items() if name == "phi" or name.endswith("weight2_up"))
    return 4 * (z.R * (per_token + h) + read) + z.R + 2 * projected * z.C * z.e


def images(config: RunConfig, count: int) -> int:
    """A step's images, uint8 pixels or cached features, which the first stage holds during the whole step."""
    shape, dtype = image_form(config)
    return count * math.prod(shape) * dtype.itemsize


def step_images_bytes(config: RunConfig, z: Sizes, kind: StageKind, count: int) -> int:
    """What the first stage holds of a step's `count` images during the whole step, as train/tower.py does.

    Pixels, the features of all of them, and for a trained tower their gradients, and activations of the one
    batch that is not computed again. Cached features take the place of pixels, and no tower runs.
    """
    if config.data.cache_vision_features:
        return images(config, count)
    v, trains = config.vision, "vision" in trained_parts(config, kind)
    features = count * v.tokens_per_image * v.hidden_size * z.e
    kept = tower(config, z, min(count, vision_batch_size(config, kind))) if trains else 0
    return images(config, count) + features * (2 if trains else 1) + kept


def vision_batch_size(config: RunConfig, kind: StageKind) -> int:
    """The most images that the vision tower computes at a time in a stage of this kind."""
    default = 8 if "vision" in trained_parts(config, kind) else 32
    return config.train.vision_batch_size or default


def tower(config: RunConfig, z: Sizes, count: int) -> int:
    """Activations of the vision tower for `count` images that it keeps for its backward."""
    v = config.vision
    positions = count * ((v.image_size // v.patch_size) ** 2 + int(v.model_type == "clip"))
    per_layer = 4 * v.hidden_size + (4 * v.hidden_size + 3 * v.ffn_hidden_size) // z.t
    extra = v.num_layers_used * _log_sum_exp(positions, v.num_attention_heads, z)
    return positions * v.num_layers_used * per_layer * z.e + extra


def microbatch_images(config: RunConfig) -> int:
    """The most images of a microbatch: one for each row, or as many as have room in a packed row."""
    b = config.train.micro_batch_size
    if config.data.packing != "pack":
        return b
    return min(
        max(1, b * config.data.seq_length // (config.vision.tokens_per_image + 1)),
        config.train.global_batch_size,
    )


def projector(config: RunConfig, z: Sizes, kind: StageKind) -> int:
    """Activations of the projector in a microbatch; its input is among the step's features."""
    parts = trained_parts(config, kind)
    tokens = microbatch_images(config) * config.vision.tokens_per_image
    kept = 2 if "projector" in parts else 1 if "vision" in parts else 0
    return kept * tokens * z.C // z.t * z.e


def head(config: RunConfig, z: Sizes, kind: StageKind) -> int:
    """Last norm, logits and loss: fp32 logits that become their softmax, and in bf16 their gradient."""
    logits = z.T * padded_vocab_size(config) // z.t * (4 if z.e == 4 else 4 + z.e)
    trains = "language" in trained_parts(config, kind)
    return logits + (z.R * z.C * (2 if trains else 1) + (_normalized(config, z) if trains else 0)) * z.e
