"""megatron-core's MoE layer with token types, and the spec that puts it into a transformer layer.

The layer communicates: megatron-core dispatches tokens to the expert-parallel ranks.

Shape legend: s sequence · b batch · C width.
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
    """A `MoELayer` that takes token types in the `padding_mask` argument and passes them to its router.

    Token types are always an argument and never state, because under pipelining and recompute the backward of
    one microbatch runs between the forwards of others.

    Raises:
        ValueError: with one of the settings megatron-core would drop the types on their way to this layer.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        _check_types_arrive(config)
        super().__init__(config, *args, **kwargs)
        if config.expert_tensor_parallel_size != config.tensor_model_parallel_size:
            # TP ranks then give their copies of an expert different tokens. At EP 1 megatron-core (0.16.1)
            # would reduce the gradients as those of dense parameters, over data parallelism alone, and the
            # copies would drift apart.
            for parameter in self.experts.parameters():
                parameter.allreduce = False

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mix experts over hidden_states [s, b, C].

        `padding_mask` (megatron-core fixes this name) holds the `token_types` of this rank's tokens, int64
        [b, s], which may mark the starts of segments (`planes.mark_starts`); it may also be bool, True for
        padding. None makes every token text. Returns the output [s, b, C] and None for a bias.
        """
        if padding_mask is not None:
            if padding_mask.shape != (hidden_states.shape[1], hidden_states.shape[0]):
                raise ValueError(
                    f"token types of shape {tuple(padding_mask.shape)} for hidden states of shape "
                    f"{tuple(hidden_states.shape)}: they must be [batch, sequence], scattered along the "
                    "sequence as the hidden states are"
                )
            padding_mask = to_planes(padding_mask)  # [b, s, 3]; the core transposes it to [s, b, 3]
        needs_input_gradient = self.moe_layer_recompute or self.config.moe_permute_fusion
        if needs_input_gradient and self._has_trainable() and not hidden_states.requires_grad:
            # In `route` everything below the first router is frozen, and that router would silently not learn
            # from the task: a re-entrant checkpoint whose inputs need no gradient gives its parameters none
            # either, and Transformer Engine's fused permutation computes the gradient of the probabilities
            # only with that of the tokens (transformer_engine/pytorch/permutation.py).
            hidden_states = hidden_states.detach().requires_grad_()
        return super().forward(hidden_states, intermediate_tensors, padding_mask)

    def _has_trainable(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())


def moe_layer_spec(moe: MoEConfig, use_te: bool) -> Any:
    """What `TransformerLayerSubmodules.mlp` takes: megatron-core's MoE spec with our layer and `moe.router`.

    It is a `ModuleSpec` with megatron-core 0.16.1 and a builder with newer versions.
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
    """Refuse settings that are known to drop the `padding_mask`: all tokens would silently count as text."""
    losing = {
        # TransformerBlock calls the layers beyond recompute_num_layers without padding_mask (in 0.16.1; not
        # in 0.19.2).
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
