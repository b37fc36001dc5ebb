"""Reads the samples of a planned microbatch and puts them into its arrays; runs in worker processes.

Shapes: b rows, s positions, n images, as in `batch.MicroBatch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.batch import MicroBatch, Preparer, Row
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.data.step_plan import Task


class Skipped(NamedTuple):
    """A sample that turned out to be unusable, or is known to be."""

    key: str
    shard: str
    reason: str
    message: str


@dataclass
class Assembled:
    """A microbatch as a worker hands it over: few tensors, because each takes time to cross processes."""

    text: torch.Tensor
    """int32 [3, b, s]: tokens, labels and token types."""
    images: torch.Tensor
    """The images, as in `MicroBatch`."""
    segments: tuple[int, ...] | None
    keys: list[str]
    skipped: list[Skipped] = field(default_factory=list)

    def micro_batch(self) -> MicroBatch:
        """The microbatch, in the same memory."""
        tokens, labels, types = self.text
        return MicroBatch(
            tokens=tokens,
            labels=labels,
            token_types=types,
            images=self.images,
            segments=self.segments,
            keys=self.keys,
        )


class Assembler(Dataset):
    """Maps a task to its microbatch."""

    def __init__(self, preparer: Preparer, lengths_file: str = "") -> None:
        """See the class.

        Args:
            lengths_file: where the lengths of tasks come from, for messages.
        """
        self._preparer, self._lengths_file = preparer, lengths_file

    def __getitems__(self, task: Task) -> Assembled:
        """The microbatch of a task.

        A sample that is unusable leaves its row or its segment as padding, without labels and images.
        """
        rows = list(self._rows(task))
        longest = max((len(row.sample.tokens) for row in rows if row.sample is not None), default=1)
        text = blank(task.rows, task.positions or longest, self._preparer.tokenizer.pad_id)
        for row, (at, start) in zip(rows, _places(task), strict=True):
            if row.sample is not None:
                end = start + len(row.sample.tokens)
                text[0, at, start:end] = torch.tensor(row.sample.tokens, dtype=torch.int32)
                text[1, at, start:end] = torch.tensor(row.sample.labels, dtype=torch.int32)
                text[2, at, start:end] = torch.tensor(row.sample.token_types, dtype=torch.int32)
        return Assembled(
            text,
            self._preparer.stack([image for row in rows for image in row.images]),
            segments_of(task) if task.packed else None,
            [row.key for row in rows],
            [Skipped(row.key, row.shard, *row.problem) for row in rows if row.problem is not None],
        )

    def _rows(self, task: Task) -> Iterator[Row]:
        for i, sample in enumerate(task.samples):
            row = self._preparer.row(sample)
            if task.lengths is not None and row.sample is not None:
                found, known = len(row.sample.tokens), task.lengths[i]
                if found != known:
                    message = (
                        f"{found} tokens, and {self._lengths_file} says {known}; delete that file, and the "
                        "lengths are counted again when training starts"
                    )
                    row = Row(row.key, row.shard, None, problem=("stale-length", message))
            yield row


def blank(rows: int, positions: int, pad_id: int) -> torch.Tensor:
    """The arrays of a microbatch that is all padding, int32 [3, rows, positions]."""
    text = torch.empty(3, rows, positions, dtype=torch.int32)
    text[0], text[1], text[2] = pad_id, IGNORE_INDEX, TokenType.PADDING
    return text


def segments_of(task: Task) -> tuple[int, ...]:
    """The lengths of the segments of a packed row; padding at the end is a segment of its own."""
    assert task.lengths is not None and task.positions is not None
    padding = task.positions - sum(task.lengths)
    return (*task.lengths, padding) if padding else tuple(task.lengths)


def _places(task: Task) -> Iterator[tuple[int, int]]:
    """Row and first position of each sample."""
    start = 0
    for i in range(len(task.samples)):
        if task.packed:
            assert task.lengths is not None
            yield 0, start
            start += task.lengths[i]
        else:
            yield i, 0
