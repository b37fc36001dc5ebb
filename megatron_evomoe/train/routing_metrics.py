"""Routing metrics of a `route` stage: shares by token type, and megatron-core's auxiliary losses."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils

from megatron_evomoe.config import RunConfig
from megatron_evomoe.diagnose.collect import Watch
from megatron_evomoe.diagnose.routing import share_metrics
from megatron_evomoe.parallel import backend, topology


def routing_metrics(watch: Watch, config: RunConfig, *, microbatches: int) -> dict[str, float]:
    """Shares by modality, and auxiliary losses, since the last call. Resets `watch`. Communicates.

    Args:
        microbatches: those of all replicas since then that hold more than padding; the auxiliary losses are
            their means.
    """
    counts = watch.total()
    watch.shares.reset()
    place = topology.current()
    captured = _Capture()
    names = ["load_balancing_loss"] if config.moe.moe_aux_loss_coeff else []
    names += ["z_loss"] if config.moe.moe_z_loss_coeff else []
    if names:
        pattern = config.moe.layer_pattern(config.language.num_layers)
        # a pipeline rank without a MoE layer would not know the reduce group, and would skip its replicas
        for name in names:
            moe_utils.save_to_aux_losses_tracker(
                name,
                torch.zeros((), device=backend.device()),
                1,
                len(pattern),
                reduce_group=place.tensor_and_context_group,
            )
        moe_utils.track_moe_metrics(
            # megatron-core adds microbatches up, and takes the mean over replicas
            loss_scale=place.data.size / max(1, microbatches),
            iteration=0,
            writer=captured,
            per_layer_logging=True,
            force_initialize=True,
            track_names=names,
            num_layers=len(pattern),
            moe_layer_freq=pattern,
        )
    return {**share_metrics(counts, watch.layers), **captured.values}


def forget_auxiliary_losses() -> None:
    """Clear megatron-core's sums of auxiliary losses.

    megatron-core keeps them per process and would carry them from one stage into the next.
    """
    newer = getattr(moe_utils, "get_moe_metrics_tracker", None)  # from 0.17 on
    (newer().metrics if newer else moe_utils.get_moe_layer_wise_logging_tracker()).clear()


class _Capture:
    """Collects the numbers that megatron-core gives to a TensorBoard writer."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        self.values[name] = float(value)
