"""Reads the samples of a planned microbatch and puts them into its arrays; runs in worker processes.

Shapes: b rows, s positions, n images, as in `batch.MicroBatch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.batch import MicroBatch, Preparer, Row
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.data.slots import Form, Slots
from megatron_evomoe.data.step_plan import Task


class Skipped(NamedTuple):
    """A sample that turned out to be unusable, or is known to be."""

    key: str
    shard: str
    reason: str
    message: str


@dataclass(frozen=True)
class Assembled:
    """A microbatch as a worker hands it over."""

    text: torch.Tensor | Form
    """int32 [3, b, s]: tokens, labels and token types."""
    images: torch.Tensor | Form
    """The images, as in `MicroBatch`."""
    segments: tuple[int, ...] | None
    keys: list[str]
    skipped: list[Skipped] = field(default_factory=list)
    slot: int | None = None
    """The block that holds text and images, if only their forms are handed over; else it is unused."""

    def received(self, slots: Slots) -> Assembled:
        """The same with its tensors: in the block, or if they did not fit there, in memory of their own."""
        if isinstance(self.text, Form) and isinstance(self.images, Form):
            assert self.slot is not None
            text, images = slots.receive(self.slot, (self.text, self.images))
        else:
            assert isinstance(self.text, torch.Tensor) and isinstance(self.images, torch.Tensor)
            if self.slot is not None:
                slots.release(self.slot)
            # a tensor that crossed processes keeps a file descriptor open, and a step can have hundreds
            text, images = (t.clone() if t.is_shared() else t for t in (self.text, self.images))
        return replace(self, text=text, images=images, slot=None)

    def micro_batch(self) -> MicroBatch:
        """The microbatch, in the same memory."""
        assert isinstance(self.text, torch.Tensor) and isinstance(self.images, torch.Tensor)
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
    """Maps a task, and the number of the block that is to hold it, to its microbatch."""

    def __init__(self, preparer: Preparer, slots: Slots, lengths_file: str = "") -> None:
        """See the class.

        Args:
            lengths_file: where the lengths of tasks come from, for messages.
        """
        self._preparer, self._slots, self._lengths_file = preparer, slots, lengths_file

    def __getitems__(self, request: tuple[Task, int | None]) -> Assembled:
        """The microbatch of a task.

        A sample that is unusable leaves its row or its segment as padding, without labels and images.
        """
        task, slot = request
        rows = list(self._rows(task))
        pictures = [image for row in rows for image in row.images]
        longest = max((len(row.sample.tokens) for row in rows if row.sample is not None), default=1)
        forms = (
            Form((3, task.rows, task.positions or longest), torch.int32),
            Form((len(pictures), *self._preparer.image_form[0]), self._preparer.image_form[1]),
        )
        tensors = self._slots.tensors(slot, forms) if slot is not None else None
        text, images = tensors or [torch.empty(form.shape, dtype=form.dtype) for form in forms]
        fill_with_padding(text, self._preparer.tokenizer.pad_id)
        _write_text(text.numpy(), rows, task)
        for image, picture in zip(images, pictures, strict=True):
            image.copy_(picture)
        return Assembled(
            text=forms[0] if tensors else text,
            images=forms[1] if tensors else images,
            segments=segments_of(task) if task.packed else None,
            keys=[row.key for row in rows],
            skipped=[Skipped(row.key, row.shard, *row.problem) for row in rows if row.problem is not None],
            slot=slot,
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


def fill_with_padding(text: torch.Tensor, pad_id: int) -> None:
    """Make an int32 [3, b, s] all padding, in place."""
    for plane, value in zip(text, (pad_id, IGNORE_INDEX, TokenType.PADDING), strict=True):
        plane.fill_(value)


def _write_text(text: np.ndarray, rows: Sequence[Row], task: Task) -> None:
    for row, (at, start) in zip(rows, _places(task), strict=True):
        if row.sample is not None:
            sample = row.sample
            end = start + len(sample.tokens)
            for plane, values in zip(text, (sample.tokens, sample.labels, sample.token_types), strict=True):
                plane[at, start:end] = values


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
