"""Specs of the FFN for megatron-core's `TransformerLayer`, for the versions 0.16 and 0.19.

Shape legend: C width · tokens are the rows of an expert's input.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec


def dense_mlp_spec(linear_fc1: type, linear_fc2: type) -> Any:
    """What `TransformerLayerSubmodules.mlp` takes: a `ModuleSpec` with 0.16.1, a builder with 0.19.2.

    Newer versions turn a `ModuleSpec` into that builder themselves, with a warning for each layer.
    """
    submodules = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2)
    if hasattr(MLP, "as_mlp_submodule"):
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


class BiasedExpertOutput(RowParallelLinear):
    """`RowParallelLinear` for experts that have biases (Phi-2's).

    megatron-core's `MLP` adds an expert's output bias in place (0.16.1 and 0.19.2). Without expert
    parallelism that output is a view which an autograd function made, and autograd refuses to change it
    ("is a view and is being modified inplace").
    """

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[tokens, FFN width / TP] to [tokens, C], and the bias, not yet added."""
        output, bias = super().forward(input_)
        return output if self.explicit_expert_comm else output.clone(), bias


def allow_expert_biases(moe_spec: Any) -> Any:
    """Change the spec of a local MoE layer, in place, so that it trains with ``add_bias_linear``."""
    experts = _submodules(_submodules(moe_spec).experts)
    assert experts.linear_fc2 is RowParallelLinear, "only the local experts need this"
    experts.linear_fc2 = BiasedExpertOutput
    return moe_spec


def _submodules(spec: Any) -> Any:
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]
