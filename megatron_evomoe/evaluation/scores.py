"""Arithmetic for the metrics of several benchmarks. Shares are in percent."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any


def percent(part: float, whole: float) -> float:
    """100 · part / whole, and 0 if `whole` is 0."""
    return 100.0 * part / whole if whole else 0.0


def mean_percent(scores: Sequence[float]) -> float:
    """The mean of scores between 0 and 1, in percent."""
    return percent(sum(scores), len(scores))


def grouped(pairs: Iterable[tuple[Hashable, Any]]) -> dict[Any, list[Any]]:
    """Key -> values, with keys in the order of their first occurrence."""
    out: dict[Any, list[Any]] = {}
    for key, value in pairs:
        out.setdefault(key, []).append(value)
    return out


def mean_by(pairs: Iterable[tuple[Hashable, float]]) -> dict[str, float]:
    """Key -> mean of its scores in percent, sorted by key."""
    found = grouped(pairs)
    return {str(key): mean_percent(found[key]) for key in sorted(found, key=str)}


def leave_one_out(answer: str, references: Sequence[str]) -> float:
    """VQA's soft accuracy: the mean of min(matches / 3, 1) over all ways to leave one reference out.

    Source: visualqa.org/evaluation.html and GT-Vision-Lab/VQA. With ten references, 1 match gives 0.3, 2 give
    0.6, 3 give 0.9, and 4 or more give 1.
    """
    matches = [reference == answer for reference in references]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)
