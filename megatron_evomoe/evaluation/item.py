"""What every benchmark is turned into: questions with images, and a way to score the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_evomoe.errors import UserError

Metrics = dict[str, Any]
"""Name -> number, or a mapping of the same kind (by category). Empty where the ground truth is not public."""
Answers = Mapping[str, str]
"""Item id -> what the model said."""


class BenchmarkError(UserError):
    """Files, flags or answers that an evaluation cannot go on with; the message names the file and the line
    or field.
    """


@dataclass(frozen=True)
class Item:
    """One question as the model gets it."""

    id: str
    """Unique within a benchmark; under it the answer is stored."""
    prompt: str
    """The user's message without the image."""
    images: tuple[Path | bytes, ...] = ()
    """Files, or encoded images where the benchmark carries them itself."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What scoring needs; plain data. ``answer`` is None where the ground truth is not public."""
    group: str | None = None
    """Questions that are only scored together (MME's two per image, MMBench's rotations) share this."""


@dataclass(frozen=True)
class Source:
    """Where a benchmark's published files lie."""

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
    """One entry of the registry."""

    name: str
    read: Callable[[Source], list[Item]]
    """Raises `BenchmarkError`."""
    score: Callable[[Sequence[Item], Answers], Metrics]
    """Every item has an answer."""
    submission: Callable[[Sequence[Item], Answers, Path], list[Path]] | None = None
    """Writes what the benchmark's server or official script takes into a folder; returns the files."""


def first_groups(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items, and the rest of the groups they belong to; all when `limit` is None."""
    if limit is None:
        return list(items)
    kept = {item.group or item.id for item in items[:limit]}
    return [item for item in items if (item.group or item.id) in kept]
