"""How token types pass through megatron-core's `MoELayer.forward`, which casts its `padding_mask` to bool.

That cast would merge vision and padding. `EvoMoELayer` therefore hands the core two bool planes, which the
cast and the core's recompute leave as they are, and the router makes token types of them again. No other code
sees planes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_evomoe.config.token_types import TokenType


def to_planes(token_types: Tensor) -> Tensor:
    """Token types [...] as two bool planes [..., 2]: whether a token is vision, and whether it is padding.

    A bool tensor is read as what megatron-core calls a padding mask (True is padding).
    """
    if token_types.dtype == torch.bool:
        return torch.stack([torch.zeros_like(token_types), token_types], dim=-1)
    return torch.stack([token_types == TokenType.VISION, token_types == TokenType.PADDING], dim=-1)


def from_planes(planes: Tensor) -> Tensor:
    """The int64 token types [...] from which `to_planes` made planes [..., 2]."""
    is_vision, is_padding = planes.unbind(dim=-1)
    return is_vision * TokenType.VISION + is_padding * TokenType.PADDING
