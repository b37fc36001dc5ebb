"""megatron-core's MoE layer, told each token's modality, and the spec that plugs it into a transformer layer.

Shapes: s sequence · b batch · C width.

The layer may communicate: dispatching tokens to expert-parallel ranks is the core's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_evomoe.config import MoEConfig
from megatron_evomoe.moe.planes import to_planes
from megatron_evomoe.moe.router import router_builder


class EvoMoELayer(MoELayer):
    """A `MoELayer` that reads token types out of the `padding_mask` argument and hands them to its router.

    Types are an argument all the way down, never state: under pipelining and recompute the backward of one
    microbatch runs while another is current.

    Raises:
        ValueError: a setting under which the core would drop the types on their way here.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        _check_types_arrive(config)
        super().__init__(config, *args, **kwargs)
        if config.expert_tensor_parallel_size != config.tensor_model_parallel_size:
            # TP ranks then feed their copies of an expert different tokens. At EP 1 the core (0.16.1) still
            # reduces the gradients as if they were dense parameters', over data parallelism alone, and the
            # copies drift apart.
            for parameter in self.experts.parameters():
                parameter.allreduce = False

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mix experts over hidden_states [s, b, C].

        `padding_mask` (megatron-core fixes this name) holds the `token_types` of this rank's tokens, int64
        [b, s]; it may also be bool, True for padding. None makes every token text. Returns the output
        [s, b, C] and None for a bias.
        """
        if padding_mask is not None:
            if padding_mask.shape != (hidden_states.shape[1], hidden_states.shape[0]):
                raise ValueError(
                    f"token types of shape {tuple(padding_mask.shape)} for hidden states of shape "
                    f"{tuple(hidden_states.shape)}: they must be [batch, sequence], scattered along the "
                    "sequence as the hidden states are"
                )
            padding_mask = to_planes(padding_mask)  # [b, s, 2]; the core transposes it to [s, b, 2]
        if self.moe_layer_recompute and self._has_trainable() and not hidden_states.requires_grad:
            # A re-entrant checkpoint whose inputs need no gradient gives its parameters none either. In the
            # `route` stage everything below the first router is frozen, and that router would silently never
            # learn.
            hidden_states = hidden_states.detach().requires_grad_()
        return super().forward(hidden_states, intermediate_tensors, padding_mask)

    def _has_trainable(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())


def moe_layer_spec(moe: MoEConfig, use_te: bool) -> Any:
    """megatron-core's MoE spec with our layer and `moe.router` in it: what `TransformerLayerSubmodules.mlp`
    takes.

    A `ModuleSpec` on 0.16.1, a builder on newer cores, as the core's own is.
    """
    spec = get_moe_module_spec(
        use_te=use_te, num_experts=moe.num_experts, moe_grouped_gemm=moe.moe_grouped_gemm
    )
    is_module_spec = isinstance(spec, ModuleSpec)
    submodules = spec.submodules if is_module_spec else spec.keywords["submodules"]
    submodules.router = router_builder(moe)
    if not is_module_spec:
        return functools.partial(EvoMoELayer, submodules=submodules)
    spec.module = EvoMoELayer
    return spec


def _check_types_arrive(config: TransformerConfig) -> None:
    """Refuse what is known to lose the `padding_mask` on its way: all tokens would count as text, with no
    error.
    """
    losing = {
        # TransformerBlock calls the layers beyond recompute_num_layers without padding_mask (0.16.1; 0.19.2
        # mends it).
        "recompute_method='block' (use 'uniform')": config.recompute_granularity == "full"
        and config.recompute_method == "block",
        # TransformerLayer calls mlp(chunk) without it.
        "mlp_chunks_for_prefill > 1": config.mlp_chunks_for_prefill > 1,
        # models/gpt/fine_grained_callables.py calls mlp.route(hidden_states).
        "overlap_moe_expert_parallel_comm": config.overlap_moe_expert_parallel_comm,
        # TransformerLayer._te_cuda_graph_replay calls mlp.route(hidden_states).
        "cuda_graph_impl='transformer_engine'": config.cuda_graph_impl == "transformer_engine",
    }
    for setting, is_on in losing.items():
        if is_on:
            raise ValueError(
                f"{setting} loses the token types before they reach the router (a limit of megatron-core)"
            )
