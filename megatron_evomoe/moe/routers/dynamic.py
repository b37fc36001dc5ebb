"""The paper's Dynamic Token-aware Router (DTR) as a module; its maths is `moe/dtr/maths.py`.

Shape legend: s sequence · b batch · T = s·b tokens · C width · N experts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.moe.dtr import kernel, maths
from megatron_evomoe.moe.routers.base import TypedRouter
from megatron_evomoe.parallel import backend


class HyperNetwork(nn.Module):
    """The parameters of one modality's hypernetwork (Eq. 5); `maths.HyperWeights` names their shapes."""

    weight1: Tensor
    bias1: Tensor
    weight2_down: Tensor
    weight2_up: Tensor

    def forward(self) -> maths.HyperWeights:
        """The parameters of this hypernetwork.

        Call the module to get them: only a call makes `overlap_param_gather` wait for their last update.
        """
        return maths.HyperWeights(self.weight1, self.bias1, self.weight2_down, self.weight2_up)


class DynamicTokenRouter(TypedRouter):
    """`text` and `vision` hypernetworks write each token's own router; `phi` maps its output to logits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused = kernel.fused(self.moe.dtr_kernel, self.gate_dtype)
        # counting the image tokens, which gathering needs, would be a device synchronisation in every layer
        self.gathers = not backend.on_gpu()

    def make_parameters(self) -> None:
        self.text, self.vision = HyperNetwork(), HyperNetwork()
        super().make_parameters()

    def weights(self) -> maths.DtrWeights:
        """All that the router learns."""
        return maths.DtrWeights(self.text(), self.vision(), self.phi)

    def logits(self, hidden: Tensor, token_types: Tensor) -> Tensor:
        z_TC, is_vision_T = hidden.flatten(0, 1), (token_types == TokenType.VISION).flatten()
        if self.fused is not None:
            logits_TN = self.fused(z_TC, is_vision_T, self.weights(), activation=self.moe.dtr_activation)
        else:
            logits_TN = maths.dtr_logits(
                z_TC,
                is_vision_T,
                self.weights(),
                activation=self.moe.dtr_activation,
                dtype=self.gate_dtype,
                gather=self.gathers,
            )
        return logits_TN.view(*hidden.shape[:2], -1)
