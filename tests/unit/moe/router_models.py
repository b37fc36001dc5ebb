"""Small configurations and modules for the tests of routers and MoE layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_evomoe.config import MoEConfig
from megatron_evomoe.moe.router import router_builder
from megatron_evomoe.moe.routers.base import TypedRouter


def transformer_config(moe: MoEConfig, **changes) -> TransformerConfig:
    values = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=48,
        moe_ffn_hidden_size=48,
        num_moe_experts=moe.num_experts,
        moe_router_topk=moe.moe_router_topk,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=moe.moe_aux_loss_coeff,
        moe_z_loss_coeff=moe.moe_z_loss_coeff,
        moe_expert_capacity_factor=moe.moe_expert_capacity_factor,
        moe_token_dispatcher_type=moe.moe_token_dispatcher_type,
        moe_router_dtype="fp32",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    return TransformerConfig(**{**values, **changes})


def build_router(moe: MoEConfig, seed: int = 0, **changes) -> TypedRouter:
    torch.manual_seed(seed)
    router = router_builder(moe)(
        config=transformer_config(moe, **changes), pg_collection=get_default_pg_collection()
    )
    router.set_layer_number(1)
    return router


def batch(s: int = 12, b: int = 3, width: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Hidden states [s, b, C] that require a gradient, and token types [b, s].

    All three types occur in every sample.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(s, b, width, generator=generator).to(dtype).requires_grad_()
    types = torch.randint(0, 2, (b, s), generator=generator)
    for i in range(b):
        types[i, s - 1 - i :] = 2  # right padding of a different length in each sample
    return hidden, types
