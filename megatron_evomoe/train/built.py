"""A stage's model, optimizer and schedule, on this rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.utils import get_model_config

from megatron_evomoe.config import RunConfig, StageConfig
from megatron_evomoe.model.build import build_modules, freeze
from megatron_evomoe.model.llava import LlavaModel
from megatron_evomoe.moe.evolving_mlp import EvolvingMLP
from megatron_evomoe.moe.layer import EvoMoELayer
from megatron_evomoe.train import optimizer as optim
from megatron_evomoe.train.clock import StepClock
from megatron_evomoe.train.tower import StepTower


@dataclass
class Built:
    """A stage's model and what trains it. Lists hold one entry per pipeline chunk of this rank."""

    modules: list[LlavaModel]
    wrapped: list[DistributedDataParallel]
    """The same chunks in megatron-core's data-parallel wrapper."""
    optimizer: Any
    scheduler: Any
    clock: StepClock
    """Is told where each backward ends."""
    tower: StepTower | None
    """Computes the step's image features, on the first pipeline stage; none elsewhere."""

    @property
    def evolving(self) -> list[EvolvingMLP]:
        """This rank's layers whose experts 2…N are updated from expert 1, in order."""
        return [m for chunk in self.modules for m in chunk.modules() if isinstance(m, EvolvingMLP)]

    def mixtures(self) -> list[EvoMoELayer]:
        """The mixture layers of this rank, in order."""
        return [m for chunk in self.modules for m in chunk.modules() if isinstance(m, EvoMoELayer)]

    def gather_weights(self) -> list[LlavaModel]:
        """The modules with all weights of the last update. Communicates: all ranks call it.

        With `overlap_param_gather`, after an optimizer step each rank has the new values of its own shard
        only, and the next forward gathers the rest. Code that reads weights in between (a save, an
        evaluation, a norm, evolution) must take the modules from here.
        """
        for wrapped in self.wrapped:
            if wrapped.ddp_config.overlap_param_gather:
                wrapped.start_param_sync(force_sync=True)
        return self.modules

    def evolve(self, step: int, seed: int) -> None:
        """Update experts 2…N from expert 1 after optimizer step `step`. Communicates, as `gather_weights`."""
        # the ranks of a data-parallel group hold the same layers, so all of them gather or none does
        if evolving := self.evolving:
            self.gather_weights()
            for mlp in evolving:
                mlp.evolve(step, seed)


def build_stage(config: RunConfig, stage: StageConfig) -> Built:
    """Build model, optimizer and schedule of `stage`, whose values `config` already has."""
    modules = build_modules(config, stage.kind)
    for module in modules:
        decoder: Any = module.language_model.decoder
        layers = decoder.layers
        freeze(module, config, stage.kind, first_layer=layers[0].layer_number - 1 if layers else 0)
    wrapped = optim.wrap(modules, config)
    optimizer = optim.build_optimizer(wrapped, config)
    scheduler = optim.build_scheduler(optimizer, config)
    clock = StepClock()
    tower = StepTower(wrapped[0], config, stage.kind) if modules[0].pre_process else None

    def finalize(*args: Any, **kwargs: Any) -> None:
        if tower is not None:
            tower.backward()
        clock.backward_done()
        finalize_model_grads(*args, **kwargs)

    no_sync = wrapped[0].no_sync if len(wrapped) == 1 else [w.no_sync for w in wrapped]
    for core_config in map(get_model_config, modules):
        core_config.finalize_model_grads_func = finalize
        core_config.grad_scale_func = optimizer.scale_loss
        core_config.no_sync_func = no_sync
    return Built(modules, wrapped, optimizer, scheduler, clock, tower)
