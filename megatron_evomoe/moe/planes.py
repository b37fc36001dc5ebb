"""How token types pass through megatron-core's `MoELayer.forward`, which casts its `padding_mask` to bool.

That cast would merge vision and padding. `EvoMoELayer` therefore hands the core three bool planes, which the
cast and the core's recompute leave as they are, and the router makes token types of them again. No other code
sees planes.

The third plane marks where the segments of packed rows start, for which the model adds a flag to the token
types (`mark_starts`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_evomoe.config.token_types import TokenType

_START = 4
"""Added to the token type of the first position of a segment; more than any type."""


def mark_starts(token_types: Tensor, starts: Tensor) -> Tensor:
    """Token types [...] that also say where segments start; `starts` is bool [...]."""
    return token_types + _START * starts


def to_planes(token_types: Tensor) -> Tensor:
    """Token types [...] as bool planes [..., 3]: whether a token is vision, padding, the first of a segment.

    A bool tensor is read as what megatron-core calls a padding mask (True is padding).
    """
    if token_types.dtype == torch.bool:
        no = torch.zeros_like(token_types)
        return torch.stack([no, token_types, no], dim=-1)
    starts = token_types >= _START
    kinds = token_types - _START * starts
    return torch.stack([kinds == TokenType.VISION, kinds == TokenType.PADDING, starts], dim=-1)


def from_planes(planes: Tensor) -> Tensor:
    """The int64 token types [...] from which `to_planes` made planes [..., 3], without marks of starts."""
    is_vision, is_padding, _ = planes.unbind(dim=-1)
    return is_vision * TokenType.VISION + is_padding * TokenType.PADDING


def starts_of(planes: Tensor) -> Tensor:
    """Whether a token is marked as the first of a segment, bool [...]."""
    return planes[..., 2]
