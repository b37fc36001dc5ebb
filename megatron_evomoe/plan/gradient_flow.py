"""Which layers of a chunk need gradients, and so keep activations and compute in the backward. Exact.

A layer keeps activations if its input needs a gradient or something in it trains. The first chunk's input
needs one if something before the decoder trains; hidden states from another chunk always do, because
megatron-core's schedules receive them so. Re-entrant recompute needs an input with a gradient, so
`LlavaModel.embed` then makes one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import trained_parts
from megatron_evomoe.plan.rank_tensors import chunk_layers, is_first


@dataclass(frozen=True)
class LayerFlow:
    """One decoder layer in one stage kind."""

    mixture: bool
    """Whether the layer has a router and experts in this stage kind (`route`)."""
    input_grad: bool
    trains_attention: bool
    """Whether the attention and the norms train."""
    trains_ffn: bool
    """Whether the FFN trains, or the experts of a mixture."""
    trains_router: bool
    fp8: bool = False
    """Whether its linear layers compute in FP8."""

    @property
    def ffn_input_grad(self) -> bool:
        """Whether the FFN's input needs a gradient."""
        return self.input_grad or self.trains_attention

    @property
    def output_grad(self) -> bool:
        """Whether the next layer's input needs one."""
        return self.ffn_input_grad or self.trains_ffn or self.trains_router


def chunk_flow(config: RunConfig, kind: StageKind, pp_rank: int, chunk: int) -> list[LayerFlow]:
    """Flows of the chunk's layers, in order; `config` has layout and overrides applied."""
    parts = trained_parts(config, kind)
    language = "language" in parts
    grad = (
        not is_first(pp_rank, chunk)
        or language
        or "projector" in parts
        or "vision" in parts
        or reentrant(config)
    )
    flows = []
    for layer in chunk_layers(config, pp_rank, chunk):
        designated = config.moe.is_moe_layer(layer)
        mixture = designated and kind == StageKind.ROUTE
        if mixture:
            ffn = language or "experts" in parts
        else:
            ffn = "first_expert" in parts if designated and kind == StageKind.EVOLVE else language
        router = mixture and (language or "router" in parts)
        flows.append(LayerFlow(mixture, grad, language, ffn, router, in_fp8(config, layer)))
        grad = flows[-1].output_grad
    return flows


def in_fp8(config: RunConfig, layer: int) -> bool:
    """Whether decoder layer `layer` (global, from 0) computes in FP8.

    megatron-core decides the same with `fp8_utils.is_first_last_bf16_layer`.
    """
    gpu = config.gpu
    if gpu.fp8_format is None or not gpu.first_last_layers_bf16:
        return gpu.fp8_format is not None
    return (
        gpu.num_layers_at_start_in_bf16 <= layer < config.language.num_layers - gpu.num_layers_at_end_in_bf16
    )


def reentrant(config: RunConfig) -> bool:
    """Whether recompute makes the decoder's input need a gradient."""
    return config.train.recompute_granularity == "full" or "mlp" in recomputed_modules(config)


def recomputed_modules(config: RunConfig) -> set[str]:
    """Modules that selective recompute covers."""
    return set(config.train.recompute_modules) if config.train.recompute_granularity == "selective" else set()
