"""The norm of the whole model's parameters, under any layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_evomoe.parallel import backend, topology


@torch.no_grad()
def params_norm(modules: Sequence[torch.nn.Module]) -> float:
    """L2 norm of the whole model's weights, each counted once under any layout. Communicates."""
    place = topology.current()
    # of the experts' parameters, and of those that all replicas hold
    squares = torch.zeros(2, dtype=torch.float64, device=backend.device())
    for parameter in (p for module in modules for p in module.parameters()):
        shared = getattr(parameter, "allreduce", True)  # false for an expert's parameters
        group = (place.tensor if shared else place.expert_tensor).group
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
            parameter, tp_group=group
        ):
            squares[int(shared)] += parameter.double().square().sum()
    for i, group in enumerate((place.expert_model_group, place.model_group)):
        dist.all_reduce(squares[i], group=group)
    return float(squares.sum().sqrt())
