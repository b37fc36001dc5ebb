"""The types of tokens."""

from __future__ import annotations

from enum import IntEnum


class TokenType(IntEnum):
    """What stands at a position of a sequence; int64 in tensors named `token_types`."""

    TEXT = 0
    VISION = 1
    PADDING = 2
