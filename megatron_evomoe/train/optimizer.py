"""AdamW over the trained parameters, and its schedule: megatron-core's, set up from the configuration."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import RunConfig


def wrap(chunks: Sequence[torch.nn.Module], config: RunConfig) -> list[DistributedDataParallel]:
    """Each model chunk in megatron-core's data-parallel wrapper; frozen parameters get no gradient buffer."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    return [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]


def build_optimizer(chunks: list[DistributedDataParallel], config: RunConfig) -> MegatronOptimizer:
    """Adam with decoupled weight decay over the parameters that require gradients.

    With bf16 it keeps fp32 master weights.
    """
    o, bf16 = config.optimizer, config.train.bf16
    core = CoreOptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        adam_eps=o.adam_eps,
        clip_grad=o.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
    )
    return get_megatron_optimizer(core, chunks)


class Schedule(OptimizerParamScheduler):
    """megatron-core's schedule, which records how the configuration and the checkpoint differ on a resume.

    After a resume it follows either the configuration or the checkpoint. The learning rate is a function of
    the step alone. So after a resume under another configuration, every rate equals that of a run which had
    this configuration from its first step on.
    """

    _COMPARED = ("max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style", "start_wd")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.changed: dict[str, tuple[Any, Any]] = {}
        """Values that differ: name -> (in the checkpoint, in the configuration)."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's step and, with `use_checkpoint_opt_param_scheduler`, its schedule.

        Raises:
            CheckpointError: the checkpoint's schedule is to be used and ends before the run does.
        """
        own = self.state_dict()
        self.changed = {
            name: (state_dict[name], own[name]) for name in self._COMPARED if state_dict[name] != own[name]
        }
        ends, steps = state_dict["lr_decay_steps"], own["lr_decay_steps"]
        if (
            self.use_checkpoint_opt_param_scheduler
            and ends < steps
            and state_dict["lr_decay_style"] != "constant"
        ):
            raise CheckpointError(
                f"the checkpoint's schedule ends at step {ends}, and steps {ends + 1} to {steps} would "
                f"train at its last rate, {state_dict['min_lr']:g}; leave use_checkpoint_opt_param_scheduler "
                f"out to get the schedule of train_iters {steps}, or set train_iters {ends}"
            )
        self.num_steps = 0  # megatron-core adds the checkpoint's number
        super().load_state_dict(state_dict)
        for group in self.optimizer.param_groups:  # a group's own values would override the schedule's
            group["max_lr"], group["min_lr"] = self.max_lr, self.min_lr
        self.step(0)  # megatron-core sets the rates before it takes the checkpoint's weight decay

    def __str__(self) -> str:
        """How the checkpoint's schedule differs and which of the two is used; empty if they are equal."""
        if not self.changed:
            return ""
        if self.use_checkpoint_opt_param_scheduler:
            kept = ", ".join(
                f"{name} {there} (configuration: {here})" for name, (there, here) in self.changed.items()
            )
            return f"the checkpoint's schedule goes on: {kept}"
        return "the schedule follows the configuration: " + ", ".join(
            f"{name} {there} → {here}" for name, (there, here) in self.changed.items()
        )


def build_scheduler(optimizer: MegatronOptimizer, config: RunConfig) -> Schedule:
    """Linear warmup from 0, then `lr_decay_style` towards `min_lr`.

    It is stepped after each update, so that step 1 has the rate of position 0.
    """
    o, steps = config.optimizer, config.optimizer.lr_decay_iters or config.train.train_iters
    # rounded up, as in Hugging Face's schedules, which MoE-LLaVA uses
    warmup = min(steps - 1, math.ceil(o.lr_warmup_fraction * steps))
    return Schedule(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=steps,
        lr_decay_style=o.lr_decay_style,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=o.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=not o.use_checkpoint_opt_param_scheduler,
    )


def course(scheduler: OptimizerParamScheduler, last: int) -> str:
    """A stage's learning rates in words: at its first step, at the peak, and at its last step."""
    schedule = copy.copy(scheduler)
    group: dict[str, Any] = next(iter(scheduler.optimizer.param_groups), {})

    def rate(step: int) -> str:
        schedule.num_steps = step - 1
        return f"{schedule.get_lr(group):.3g}"

    peak = min(schedule.lr_warmup_steps + 1, last)
    rates = [f"{rate(step)} at step {step}" for step in sorted({1, peak, last})]
    style, low, end = schedule.lr_decay_style, schedule.min_lr, schedule.lr_decay_steps
    then = {"constant": "", "inverse-square-root": f", never below min_lr {low:.3g}"}
    return (
        f"lr {', '.join(rates)} of {last} "
        f"({style}{then.get(style, f', at min_lr {low:.3g} after step {end}')})"
    )
