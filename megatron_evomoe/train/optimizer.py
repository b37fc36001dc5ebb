"""AdamW over what trains, and its schedule: megatron-core's, set up from our configuration."""

from __future__ import annotations

import copy
import math

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_evomoe.config import RunConfig


def wrap(chunks: list[torch.nn.Module], config: RunConfig) -> list[DistributedDataParallel]:
    """Each model chunk in megatron-core's data-parallel wrapper; frozen parameters get no gradient buffer."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    return [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]


def build_optimizer(chunks: list[DistributedDataParallel], config: RunConfig) -> MegatronOptimizer:
    """Adam with decoupled weight decay over the parameters that require gradients; fp32 master weights under bf16."""
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


def build_scheduler(optimizer: MegatronOptimizer, config: RunConfig) -> OptimizerParamScheduler:
    """Linear warmup from 0, then `lr_decay_style` towards `min_lr`; stepped after each update, so step 1 takes the rate of 0."""
    o, steps = config.optimizer, config.optimizer.lr_decay_iters or config.train.train_iters
    # rounded up, as in Hugging Face's schedules that MoE-LLaVA uses
    warmup = min(steps - 1, math.ceil(o.lr_warmup_fraction * steps))
    return OptimizerParamScheduler(
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
        use_checkpoint_opt_param_scheduler=True,
    )


def course(scheduler: OptimizerParamScheduler, last: int) -> str:
    """A stage's learning rates in words: of its first step, of the highest, and of its last."""
    schedule = copy.copy(scheduler)
    group = next(iter(scheduler.optimizer.param_groups), {})

    def rate(step: int) -> str:
        schedule.num_steps = step - 1
        return f"{schedule.get_lr(group):.3g}"

    peak = min(schedule.lr_warmup_steps + 1, last)
    rates = [f"{rate(step)} at step {step}" for step in sorted({1, peak, last})]
    style, low, end = schedule.lr_decay_style, schedule.min_lr, schedule.lr_decay_steps
    then = {"constant": "", "inverse-square-root": f", never below min_lr {low:.3g}"}
    return f"lr {', '.join(rates)} of {last} ({style}{then.get(style, f', at min_lr {low:.3g} after step {end}')})"
