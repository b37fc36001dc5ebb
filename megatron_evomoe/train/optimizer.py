"""AdamW over what trains, and its schedule: megatron-core's, set up from our configuration."""

from __future__ import annotations

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
    """Linear warmup, then `lr_decay_style` down to `min_lr` at `train_iters`; one step a time."""
    o, steps = config.optimizer, config.train.train_iters
    # rounded up, as in Hugging Face's schedules that MoE-LLaVA uses
    warmup = min(steps - 1, math.ceil(o.lr_warmup_fraction * steps))
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=max(0, warmup),
        lr_decay_steps=max(1, steps),
        lr_decay_style=o.lr_decay_style,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=max(1, steps),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=True,
    )
