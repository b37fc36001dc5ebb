"""Types for argparse: numbers within a range; the message of an error names the argument."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import TypeVar

_Number = TypeVar("_Number", int, float)


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """A type for argparse: a whole number from `low` to `high`, in decimal digits."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]{1,20}", text.strip()):
            raise argparse.ArgumentTypeError(f"{_shown(text)} is not a whole number")
        return _within(int(text), low, high)

    return read


def number(low: float, high: float = 1e12, *, above: bool = False) -> Callable[[str], float]:
    """A type for argparse: a finite number from `low` to `high`; with `above`, not `low` itself."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{_shown(text)} is not a finite number")
        if above and value <= low:
            raise argparse.ArgumentTypeError(f"must be more than {low:g}, got {value:g}")
        return _within(value, low, high)

    return read


def _within(value: _Number, low: float, high: float) -> _Number:
    if value < low:
        raise argparse.ArgumentTypeError(f"must be at least {low:g}, got {value:g}")
    if value > high:
        raise argparse.ArgumentTypeError(f"must be at most {high:,}, got {value:g}")
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}…")
