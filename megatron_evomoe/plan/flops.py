"""The arithmetic of a step, in floating-point operations (FLOP), by counting.

Each weight and token costs 2 FLOP in the forward pass. The backward pass costs the same again for the
gradient of the layer's input and for the gradient of each trained weight. Attention counts the causal half of
its scores. What recompute repeats is part of the backward pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import trained_parts
from megatron_evomoe.model import inventory
from megatron_evomoe.moe.router import router_tensors
from megatron_evomoe.plan.activations import sizes_of
from megatron_evomoe.plan.gradient_flow import LayerFlow, chunk_flow, recomputed_modules
from megatron_evomoe.plan.rank_tensors import (
    chunk_layers,
    chunks,
    is_first,
    is_last,
    layer_tensors,
    local_numel,
)
from megatron_evomoe.plan.work import Work, full_microbatch


def flops(config: RunConfig, kind: StageKind, pp_rank: int, work: Work | None = None) -> tuple[float, float]:
    """(forward, backward with recompute) of a replica's work on one rank of the pipeline stage.

    Without `work` it is one microbatch of full rows.
    """
    work = work or full_microbatch(config)
    forward = backward = 0.0
    weights: dict[bool, LayerWeights] = {}  # of a mixture, and of a dense layer
    for chunk in range(chunks(config)):
        layers = chunk_layers(config, pp_rank, chunk)
        for layer, flow in zip(layers, chunk_flow(config, kind, pp_rank, chunk), strict=True):
            if flow.mixture not in weights:
                weights[flow.mixture] = _weights(config, kind, layer)
            f, b = _layer_flops(config, weights[flow.mixture], flow, work)
            forward, backward = forward + f, backward + b
        f, b = _ends_flops(config, kind, pp_rank, chunk, work)
        forward, backward = forward + f, backward + b
    return forward, backward


class LayerWeights(NamedTuple):
    """Weights of one rank that a token meets in a layer."""

    attention: int
    """Weights of the attention and of the layer's norms."""
    ffn: int
    """Weights of the FFN; in a mixture, those of the K experts that a token is sent to."""
    router: float
    """Weights of the router; a tensor that serves one modality alone counts half."""


def _weights(config: RunConfig, kind: StageKind, layer: int) -> LayerWeights:
    attention = ffn = 0
    mixture = False
    for tensor in layer_tensors(config, kind, layer):
        numel = local_numel(config, tensor)
        if tensor.part == "experts":  # expert 0 stands for each of them
            ffn += numel * config.moe.moe_router_topk if tensor.expert == 0 else 0
        elif tensor.part == "router":
            mixture = True
        elif ".mlp." in tensor.name:
            ffn += numel
        else:
            attention += numel
    tensors = router_tensors(config.moe, config.language) if mixture else []
    return LayerWeights(attention, ffn, sum(t.share * math.prod(t.shape) for t in tensors))


def _layer_flops(
    config: RunConfig, weights: LayerWeights, flow: LayerFlow, work: Work
) -> tuple[float, float]:
    z = sizes_of(config, work)
    # T tokens meet the weights that TP splits; a mixture's tokens come to its experts from all ranks alike
    etp = config.parallel.expert_tensor_parallel_size
    attention, ffn = 2 * z.T * weights.attention, 2 * (z.R * etp if flow.mixture else z.T) * weights.ffn
    router = 2 * z.R * weights.router
    heads, head_size = config.language.num_attention_heads, config.language.head_size
    scores = 2 * z.squares * heads * head_size / z.t  # QKᵀ and AV, causal half
    forward = attention + ffn + router + scores
    touched = flow.ffn_input_grad or flow.trains_ffn or flow.trains_router
    backward = 0.0
    if flow.ffn_input_grad:
        backward += 2 * scores + attention * (1 + int(flow.trains_attention)) + ffn + router
    elif flow.mixture and touched:
        backward += ffn / 2  # through the output matrices, back to the probabilities
    backward += ffn * flow.trains_ffn + router * flow.trains_router
    return forward, backward + _recomputed_flops(config, flow, touched, forward, scores, ffn)


def _recomputed_flops(
    config: RunConfig, flow: LayerFlow, touched: bool, forward: float, scores: float, ffn: float
) -> float:
    if config.train.recompute_granularity == "full":
        return forward
    modules = recomputed_modules(config)
    again = scores if "core_attn" in modules and flow.ffn_input_grad else 0.0
    return again + (ffn if ("moe" if flow.mixture else "mlp") in modules and touched else 0.0)


def _ends_flops(
    config: RunConfig, kind: StageKind, pp_rank: int, chunk: int, work: Work
) -> tuple[float, float]:
    z, parts = sizes_of(config, work), trained_parts(config, kind)
    forward = backward = 0.0
    if is_first(pp_rank, chunk) and not config.data.cache_vision_features:
        v = config.vision
        tower = (
            2
            * work.images
            * (v.image_size // v.patch_size) ** 2
            * sum(local_numel(config, t) for t in inventory.vision_model(config))
        )
        forward, backward = forward + tower, backward + (2 * tower if "vision" in parts else 0)
    if is_last(config, pp_rank, chunk):
        logits = 2 * z.T * z.C * inventory.padded_vocab_size(config) / z.t
        forward, backward = forward + logits, backward + logits * (1 + int("language" in parts))
    return forward, backward
