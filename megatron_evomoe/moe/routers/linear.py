"""Routers that are linear maps of the token.

Shape legend: s sequence · b batch · C width · N experts.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from torch import Tensor

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.moe.routers.base import TypedRouter


class LinearRouter(TypedRouter):
    """One linear map for all tokens (MoE-LLaVA): the core's router, always in fp32 or fp64."""

    def make_parameters(self) -> None:
        """Keep the core's own parameters, which it has made, drawn and marked."""

    def logits(self, hidden: Tensor, token_types: Tensor) -> Tensor:
        return router_gating_linear(hidden, self.weight, self.bias, self.gate_dtype)


class ModalityLinearRouter(TypedRouter):
    """One linear map for each modality, without bias."""

    def logits(self, hidden: Tensor, token_types: Tensor) -> Tensor:
        # Both maps meet every token: 2N columns cost what N do, because reading the tokens takes the time.
        weights = torch.cat([self.weight_text, self.weight_vision])
        of_text, of_vision = router_gating_linear(hidden, weights, None, self.gate_dtype).chunk(2, dim=-1)
        is_vision = token_types == TokenType.VISION
        return torch.where(is_vision[..., None], of_vision, of_text).contiguous()
