"""Small FFNs and mixtures for the tests of evolution.

This is a plain module, so that spawned processes can import it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

HIDDEN, FFN = 16, 24
SEED = 7


def transformer_config(
    *,
    dtype: torch.dtype = torch.float32,
    gated: bool = True,
    bias: bool = False,
    experts: int = 4,
    tp: int = 1,
    ep: int = 1,
    etp: int = 1,
) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        moe_ffn_hidden_size=FFN,
        num_attention_heads=2,
        use_cpu_initialization=True,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
        add_bias_linear=bias,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        num_moe_experts=experts,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_token_dispatcher_type="alltoall",
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        sequence_parallel=tp > 1,
    )


def dense_spec() -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec

    return get_mlp_module_spec(use_te=False)


def dense_mlp(config: Any) -> Any:
    from megatron.core.transformer.mlp import MLP

    spec = dense_spec()
    submodules = spec.submodules if hasattr(spec, "submodules") else spec.keywords["submodules"]
    return MLP(config, submodules, ffn_hidden_size=FFN)


def evolving_mlp(config: Any, moe: Any, layer: int = 2) -> Any:
    from megatron.core.transformer.spec_utils import build_module

    from megatron_evomoe.moe.evolving_mlp import evolving_mlp_spec

    module = build_module(evolving_mlp_spec(dense_spec(), moe), config=config)
    module.set_layer_number(layer)
    return module


def moe_layer(config: Any) -> Any:
    """A real `MoELayer` with `SequentialMLP` experts, as stage III builds it."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection

    spec = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    return spec(config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups(), layer_number=2)


def moe_config(rule: str = "delta", experts: int = 4, ranges: Any = None) -> Any:
    from megatron_evomoe.config import MoEConfig

    default = [(0.9, 0.99), (0.8, 0.89), (0.7, 0.79)]
    ranges = ranges or (
        default if experts == 4 else [(0.1 * i % 1, 0.1 * i % 1 + 0.05) for i in range(1, experts)]
    )
    return MoEConfig(num_experts=experts, evolution_rule=rule, evolution_beta=ranges)


def full_update(name: str, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Update in fp32 of the whole parameter `name` at `step`; step 0 gives its first values."""
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return torch.randn(shape, generator=generator) * (0.3 if step == 0 else 0.01)


def shard(full: torch.Tensor, name: str, rank: int, size: int, gated: bool) -> torch.Tensor:
    """The part of a whole FFN parameter that belongs to one TP rank.

    fc1 is split by rows (within gate and value), and fc2's weight by columns.
    """
    if name.startswith("linear_fc1"):
        halves = full.view(2, -1, *full.shape[1:]) if gated else full[None]
        return halves.chunk(size, dim=1)[rank].reshape(-1, *full.shape[1:])
    return full.chunk(size, dim=1)[rank] if full.ndim == 2 else full


def train(module: Any, steps: range, rank: int = 0, size: int = 1) -> None:
    """Simulate optimizer steps: add `full_update`, set it as the gradient, then evolve.

    Step 0 sets θ_1 and calls `begin`.
    """
    gated = module.config.gated_linear_unit
    for step in steps:
        for name, p in module.named_parameters():
            whole = list(p.shape)
            if size > 1 and not name.endswith("fc2.bias"):
                whole[0 if "fc1" in name else 1] *= size
            update = shard(full_update(name, step, tuple(whole)), name, rank, size, gated)
            with torch.no_grad():
                p.copy_(update if step == 0 else p.float() + update)
            p.main_grad = update.clone()
        if step == 0:
            module.begin()
        else:
            module.evolve(step, SEED)


def whole_shapes(gated: bool = True, bias: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter without tensor parallelism."""
    rows = 2 * FFN if gated else FFN
    shapes: dict[str, tuple[int, ...]] = {
        "linear_fc1.weight": (rows, HIDDEN),
        "linear_fc2.weight": (HIDDEN, FFN),
    }
    return {**shapes, "linear_fc1.bias": (rows,), "linear_fc2.bias": (HIDDEN,)} if bias else shapes
