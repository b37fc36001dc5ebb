"""Bytes kept for the backward: an estimate, after Korthikanti et al. 2022 (arXiv 2205.05198).

Their layer keeps s·b·h·(34 + 5·a·s/h) bytes: dropout masks, stored s × s scores, a GELU FFN of 4h, everything trained. Here the
same inventory is taken anew: no dropout; with Transformer Engine a flash attention that keeps its inputs, its output and a
log-sum-exp instead of scores (without, an fp32 softmax and its copy in the parameters' type); FFNs gated or not, of any width;
mixtures whose experts share the tokens evenly; and a frozen linear layer keeps no input. What exists for a moment only, the
allocator's fragmentation and communication buffers are not in it.

T tokens of a microbatch (all TP ranks' together) · C width · F FFN width · e bytes of an activation · t the TP size. Under sequence
parallelism what lies between the TP regions is split too.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_evomoe.config import RunConfig
from megatron_evomoe.plan import layout
from megatron_evomoe.plan.counts import attention_heads, chunks, is_first, is_last, router
from megatron_evomoe.plan.flow import LayerFlow, chunk_flow, recomputed_modules
from megatron_evomoe.plan.states import element_bytes
from megatron_evomoe.train.stages import trained_parts


@dataclass(frozen=True)
class Sizes:
    """What the formulas are made of."""

    e: int
    C: int
    T: int
    """Positions of one microbatch on one context-parallel rank."""
    R: int
    """Positions outside the TP regions: T, over TP under sequence parallelism."""
    t: int
    seq: int
    fused: bool
    """Transformer Engine's attention and the fused SwiGLU."""


def sizes_of(config: RunConfig, seq_length: int | None = None) -> Sizes:
    """Of the longest sequence the stage allows, unless `seq_length` says otherwise."""
    p = config.parallel
    seq, t = seq_length or config.data.seq_length, p.tensor_model_parallel_size
    T = seq * config.train.micro_batch_size // p.context_parallel_size
    split = p.sequence_parallel if p.sequence_parallel is not None else t > 1
    return Sizes(e=element_bytes(config), C=config.language.hidden_size, T=T, R=T // t if split else T, t=t, seq=seq,
                 fused=layout.transformer_engine(config))


def activation_bytes(config: RunConfig, kind: str, pp_rank: int, microbatches: int) -> int:
    """The most one rank of pipeline stage `pp_rank` keeps at a time; `config` has layout and overrides applied."""
    z = sizes_of(config)
    total = 0
    for chunk, count in enumerate(in_flight(config, pp_rank, microbatches)):
        flows = chunk_flow(config, kind, pp_rank, chunk)
        total += count * _layers(config, z, flows)
        if is_first(pp_rank, chunk):
            total += count * projector(config, z, kind)
        if is_last(config, pp_rank, chunk):
            total += head(config, z, kind)  # its backward follows at once, whatever else is in flight
    return total + recomputed_block(config, z, kind, pp_rank)


def in_flight(config: RunConfig, pp_rank: int, microbatches: int) -> list[int]:
    """For each chunk of the rank, the microbatches whose backward is still to come when most are (1F1B, or interleaved)."""
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


def recomputed_block(config: RunConfig, z: Sizes, kind: str, pp_rank: int) -> int:
    """Under full recompute one block at a time is whole again during its backward."""
    if config.train.recompute_granularity != "full":
        return 0
    n = config.train.recompute_num_layers
    flows = [chunk_flow(config, kind, pp_rank, chunk) for chunk in range(chunks(config))]
    return max(sum(layer(config, z, flow) for flow in of_chunk[i : i + n])
               for of_chunk in flows for i in range(0, len(of_chunk), n))


def layer(config: RunConfig, z: Sizes, flow: LayerFlow) -> int:
    """One decoder layer and microbatch, selective recompute taken into account."""
    fed = _mixture(config, z, flow) if flow.mixture else _dense_ffn(config, z, flow)
    return _attention(config, z, flow) + fed


def _attention(config: RunConfig, z: Sizes, flow: LayerFlow) -> int:
    if not flow.ffn_input_grad:
        return 0
    heads, groups, head_size = attention_heads(config)
    recomputed = recomputed_modules(config)
    kept = z.R * z.C  # the norm's input
    if flow.trains_attention and "layernorm" not in recomputed:
        kept += z.R * z.C  # its output, the projection's input
    if flow.trains_attention:
        kept += _normalized(config, z)
    # the projection's output, which the values are a view of; queries and keys again after their rotation
    kept += z.T * ((heads + 2 * groups) + (heads + groups)) * head_size // z.t
    if config.language.qk_layernorm:
        kept += z.T * (heads + groups) * head_size // z.t
    context = z.T * heads * head_size // z.t
    extra = 0
    if z.fused:
        kept += context
        extra = 0 if "core_attn" in recomputed else 4 * z.T * heads // z.t
    else:
        kept += context if flow.trains_attention else 0
        extra = 0 if "core_attn" in recomputed else score_bytes(z) * z.T * z.seq * heads // z.t
    return kept * z.e + extra


def _normalized(config: RunConfig, z: Sizes) -> int:
    """PyTorch's RMSNorm on a CPU is made of parts: the gradient of a trained weight needs the values before scaling."""
    return z.R * z.C if not z.fused and config.language.normalization == "RMSNorm" else 0


def score_bytes(z: Sizes) -> int:
    """Per score of an attention that stores them: the fp32 softmax, and its copy where parameters are not fp32."""
    return 4 if z.e == 4 else 4 + z.e


def _dense_ffn(config: RunConfig, z: Sizes, flow: LayerFlow) -> int:
    recomputed = recomputed_modules(config)
    if not (flow.ffn_input_grad or flow.trains_ffn):
        return 0
    kept = 0
    if flow.ffn_input_grad and not config.language.parallel_residual:
        # the norm's input; a parallel residual has one norm, counted with the attention
        kept += z.R * z.C + (_normalized(config, z) if flow.trains_attention else 0)
    shares_input = config.language.parallel_residual and flow.trains_attention
    if "mlp" in recomputed:
        return (kept + z.R * z.C) * z.e
    if flow.trains_ffn and not shares_input and "layernorm" not in recomputed:
        kept += z.R * z.C
    kept += inner(config, z, z.T // z.t) + (z.T * config.language.ffn_hidden_size // z.t if flow.trains_ffn else 0)
    return kept * z.e


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
    kept = 0
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
        kept += routed * z.C * config.parallel.expert_tensor_parallel_size
        kept += 0 if "moe_act" in recomputed else routed * config.language.ffn_hidden_size
    return kept * z.e + router_bytes(config, z)


def router_bytes(config: RunConfig, z: Sizes) -> int:
    """Logits and probabilities, and what the hypernetworks of a DTR keep: all in fp32."""
    moe = config.moe
    per_token = 4 * moe.num_experts
    weights = 0
    if moe.router == "dtr":
        h, r = moe.dtr_hidden_size, moe.dtr_rank
        per_token += (h + 1) * (2 * r + moe.num_experts + 1) + h + 4 * r
        weights = 4 * sum(numel for _, numel in router(config)) if z.e != 4 else 0  # their fp32 copies
    return 4 * z.R * per_token + weights


def projector(config: RunConfig, z: Sizes, kind: str) -> int:
    """Tower and projector; a frozen tower runs without autograd. One image per sample is assumed."""
    parts = trained_parts(config, kind)
    v, images = config.vision, config.train.micro_batch_size
    tokens = images * v.tokens_per_image
    kept = 0
    if "projector" in parts:
        kept += tokens * (v.hidden_size + 2 * z.C // z.t)
    elif "vision" in parts:
        kept += tokens * z.C // z.t
    if "vision" in parts:
        positions = images * ((v.image_size // v.patch_size) ** 2 + int(v.model_type == "clip"))
        per_layer = 4 * v.hidden_size + (4 * v.hidden_size + 3 * v.ffn_hidden_size) // z.t
        kept += positions * v.num_layers_used * per_layer
        if not z.fused:
            kept += positions * v.num_layers_used * positions // images * v.num_attention_heads // z.t * score_bytes(z) // z.e
    return kept * z.e


def head(config: RunConfig, z: Sizes, kind: str) -> int:
    """Last norm, logits and loss: fp32 logits that become their softmax, and under bf16 the gradient's bf16 copy beside them."""
    from megatron_evomoe.model.language import padded_vocab_size

    logits = z.T * padded_vocab_size(config) // z.t * (4 if z.e == 4 else 4 + z.e)
    trains = "language" in trained_parts(config, kind)
    return logits + (z.R * z.C * (2 if trains else 1) + (_normalized(config, z) if trains else 0)) * z.e
