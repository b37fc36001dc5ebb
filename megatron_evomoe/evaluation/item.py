"""What every benchmark is turned into: questions with images, and a way to score the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_evomoe.errors import UserError

Metrics = dict[str, Any]
"""Name -> number, or a mapping of the same form for categories. Empty if the true answers are not public."""
Answers = Mapping[str, str]
"""Item id -> answer of the model."""


class BenchmarkError(UserError):
    """A problem with the files, flags or answers of an evaluation; the message names its place."""


@dataclass(frozen=True)
class Item:
    """One question for the model."""

    id: str
    """Unique within a benchmark; the answer is stored under it."""
    prompt: str
    """The user's message without the image."""
    images: tuple[Path | bytes, ...] = ()
    """Image files, or encoded images if the benchmark's file holds them."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Plain data for scoring. ``answer`` is None if the true answer is not public."""
    group: str | None = None
    """Common to questions that are scored together: MME's two of an image, MMBench's rotations."""


@dataclass(frozen=True)
class Source:
    """Paths of a benchmark's published files."""

    questions: Path
    images: Path | None = None
    annotations: Path | None = None
    """VQAv2's answers."""
    ocr_tokens: Path | None = None
    """TextVQA's Rosetta tokens."""
    split: str = "test"
    """ScienceQA's split."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: how its files are read and its answers are scored."""

    name: str
    read: Callable[[Source], list[Item]]
    """Reads the questions. Raises `BenchmarkError`."""
    score: Callable[[Sequence[Item], Answers], Metrics]
    """Computes the metrics from items that all have an answer."""
    submission: Callable[[Sequence[Item], Answers, Path], list[Path]] | None = None
    """Writes files for the benchmark's server or official script to a folder, and returns their paths."""


def first_groups(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items and the other items of their groups; all items if `limit` is None."""
    if limit is None:
        return list(items)
    kept = {item.group or item.id for item in items[:limit]}
    return [item for item in items if (item.group or item.id) in kept]
