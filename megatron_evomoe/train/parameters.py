"""Counts and norm of the whole model's parameters, under any layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_evomoe.config import RunConfig
from megatron_evomoe.parallel import backend


@torch.no_grad()
def params_norm(modules: Sequence[torch.nn.Module]) -> float:
    """L2 norm of the whole model's weights, each counted once whatever the layout. Communicates."""
    squares = torch.zeros(
        2, dtype=torch.float64, device=backend.device()
    )  # of experts, and of what all replicas hold
    for parameter in (p for module in modules for p in module.parameters()):
        shared = getattr(parameter, "allreduce", True)  # the core's mark of what is not an expert's
        group = ps.get_tensor_model_parallel_group() if shared else ps.get_expert_tensor_parallel_group()
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
            parameter, tp_group=group
        ):
            squares[int(shared)] += parameter.double().square().sum()
    for i, group in enumerate(
        (ps.get_expert_tensor_model_pipeline_parallel_group(), ps.get_model_parallel_group())
    ):
        dist.all_reduce(squares[i], group=group)
    return float(squares.sum().sqrt())


def count_parameters(modules: Sequence[torch.nn.Module], config: RunConfig) -> dict[str, int]:
    """Parameters of the whole model: all, trained, and active for one token. Communicates over pipeline
    stages.
    """
    tp, ep, etp = (
        ps.get_tensor_model_parallel_world_size(),
        ps.get_expert_model_parallel_world_size(),
        ps.get_expert_tensor_parallel_world_size(),
    )
    total = trained = idle = 0
    for name, p in ((n, p) for m in modules for n, p in m.named_parameters()):
        sharded = getattr(p, "tensor_model_parallel", False)
        is_expert = ".experts." in name
        size = p.numel() * ((etp if sharded else 1) * ep if is_expert else (tp if sharded else 1))
        if name.endswith("output_layer.weight") and config.language.tie_word_embeddings:
            continue  # the copy of a tied embedding on the last stage
        total += size
        trained += size if p.requires_grad else 0
        idle += (
            size * (config.moe.num_experts - config.moe.moe_router_topk) // config.moe.num_experts
            if is_expert
            else 0
        )
    counts = torch.tensor([total, trained, idle], dtype=torch.int64, device=backend.device())
    dist.all_reduce(counts, group=ps.get_pipeline_model_parallel_group())
    total, trained, idle = counts.tolist()
    return {"parameters": total, "trainable": trained, "active": total - idle}
