"""Build a stage's model on this rank, and freeze what the stage does not train."""

from __future__ import annotations

import torch

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import is_trained, trained_parts
from megatron_evomoe.model.inventory import part_of
from megatron_evomoe.model.llava import LlavaModel
from megatron_evomoe.parallel import backend, topology


def build_modules(config: RunConfig, kind: StageKind) -> list[LlavaModel]:
    """The model chunks of this pipeline rank, on their device, with fresh weights.

    One chunk, or with the interleaved schedule `topology.Topology.chunks` of them. The first chunk of the
    first pipeline stage embeds, and the last chunk of the last stage computes the loss.
    """
    place = topology.current()
    last = place.chunks - 1
    modules = [
        LlavaModel(
            config,
            stage_kind=kind,
            pre_process=place.first_stage and chunk == 0,
            post_process=place.last_stage and chunk == last,
            vp_stage=chunk if place.chunks > 1 else None,
        )
        for chunk in range(place.chunks)
    ]
    dtype = torch.bfloat16 if config.train.bf16 else None
    return [module.to(backend.device(), dtype=dtype) for module in modules]


def freeze(model: torch.nn.Module, config: RunConfig, stage_kind: StageKind, first_layer: int) -> None:
    """Let only the parameters that the stage trains require gradients.

    Args:
        model: one chunk of the model.
        first_layer: global index (from 0) of the chunk's first decoder layer.
    """
    parts = trained_parts(config, stage_kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(part_of(name, config, stage_kind, first_layer), parts))
