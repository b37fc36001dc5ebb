"""A stage's model, optimizer and schedule, on this rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config

from megatron_evomoe.config import RunConfig, StageConfig
from megatron_evomoe.model.build import build_modules, freeze
from megatron_evomoe.model.llava import LlavaModel
from megatron_evomoe.moe.evolving_mlp import EvolvingMLP
from megatron_evomoe.moe.layer import EvoMoELayer
from megatron_evomoe.train import optimizer as optim
from megatron_evomoe.train.clock import StepClock


@dataclass
class Built:
    """What a stage trains with. Lists hold one entry per pipeline chunk of this rank."""

    modules: list[LlavaModel]
    wrapped: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    clock: StepClock = field(default_factory=StepClock)

    @property
    def evolving(self) -> list[EvolvingMLP]:
        """The layers whose experts follow the first, in order."""
        return [m for chunk in self.modules for m in chunk.modules() if isinstance(m, EvolvingMLP)]

    def mixtures(self) -> list[torch.nn.Module]:
        """The mixture layers of this rank, in order."""
        return [m for chunk in self.modules for m in chunk.modules() if isinstance(m, EvoMoELayer)]

    def gather_weights(self) -> list[LlavaModel]:
        """The modules, with the last update's weights in place. Communicates: all ranks call it.

        With `overlap_param_gather` the optimizer step leaves each rank with the new values of its own shard,
        and the next forward gathers the rest. Whatever reads weights between the two (a save, an evaluation,
        a norm, evolution) takes the modules from here.
        """
        for wrapped in self.wrapped:
            if wrapped.ddp_config.overlap_param_gather:
                wrapped.start_param_sync(force_sync=True)
        return self.modules

    def evolve(self, step: int, seed: int) -> None:
        """Let the evolved experts follow the first after optimizer step `step`. Communicates as
        `gather_weights` does.
        """
        if (
            evolving := self.evolving
        ):  # on all ranks of a data-parallel group or on none: they hold the same layers
            self.gather_weights()
            for mlp in evolving:
                mlp.evolve(step, seed)


def build_stage(config: RunConfig, stage: StageConfig) -> Built:
    """Everything for training `stage` (config already resolved for it). Communicates: DDP broadcasts nothing,
    groups exist.
    """
    modules = build_modules(config, stage.kind)
    for module in modules:
        first = (
            module.language_model.decoder.layers[0].layer_number - 1
            if module.language_model.decoder.layers
            else 0
        )
        freeze(module, config, stage.kind, first)
    wrapped = optim.wrap(modules, config)
    optimizer = optim.build_optimizer(wrapped, config)
    scheduler = optim.build_scheduler(optimizer, config)
    clock = StepClock()

    def finalize(*args: Any, **kwargs: Any) -> None:
        clock.backward_done()
        finalize_model_grads(*args, **kwargs)

    core = get_model_config(modules[0])
    core.finalize_model_grads_func = finalize
    core.grad_scale_func = optimizer.scale_loss
    core.no_sync_func = wrapped[0].no_sync if len(wrapped) == 1 else [w.no_sync for w in wrapped]
    for module in modules[1:]:
        other = get_model_config(module)
        other.finalize_model_grads_func, other.grad_scale_func, other.no_sync_func = (
            core.finalize_model_grads_func,
            core.grad_scale_func,
            core.no_sync_func,
        )
    return Built(
        modules=modules,
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=scheduler,
        clock=clock,
    )
