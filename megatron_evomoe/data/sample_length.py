"""Counts the tokens of samples as `conversation.encode` would write them, many samples at a time.

Pictures are not decoded and no ids are kept. The result is a row of four numbers for each sample, from which
follows what training makes of the sample at any `seq_length`: see `Column`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from megatron_evomoe.data.conversation import (
    Piece,
    Template,
    least_length,
    merged,
    pieces_of,
    template_named,
    turns_to_learn,
)
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.tokenizer import Tokenizer

REASONS = (
    "no-conversation",
    "two-conversations",
    "tool-turn",
    "unread-media",
    "missing-image",
    "media-placeholder",
    "image-url",
    "bad-text",
    "record-too-large",
    "bad-turn",
    "turn-order",
    "empty-answer",
    "image-count",
    "no-supervision",
    "bad-json",
    "read-error",
    "stale-index",
    "unread-member",
    "pickle-member",
    "not-a-file",
    "sparse-member",
)
"""Why a sample is unusable whatever the length of a row. Reason k has the code k + 1; the order is that of
files on disk, so new reasons come at the end."""
_CODES = {reason: code for code, reason in enumerate(REASONS, start=1)}
# texts are handed to the tokenizer when they have this many characters together: enough for one call to cost
# little, few enough for the memory of a process
_CHARACTERS = 1 << 20
_LARGEST = 2**31 - 1


class Column(IntEnum):
    """The numbers of a sample."""

    LENGTH = 0
    """Tokens of the whole sample; −code of the reason if it is unusable, and then the others are 0."""
    LEAST = 1
    """The smallest seq_length at which the sample is tokenized at all (`conversation.check_length`)."""
    SUPERVISED = 2
    """The first position that has a label."""
    IMAGE = 3
    """The first position of the only image; −1 without images; −2 − p if there are several, whose number and
    first positions begin at p of `Measured.several`."""


@dataclass
class Measured:
    """The numbers of n samples in a row."""

    rows: np.ndarray
    """int32 [n, 4]: see `Column`."""
    several: list[int] = field(default_factory=list)
    """For each sample with k > 1 images: k and the first position of each image."""
    problems: dict[int, SampleError] = field(default_factory=dict)
    """The unusable samples, by their place among the n."""


def measure(
    dataset: ShardDataset, samples: Iterable[int], tokenizer: Tokenizer, template: str, tokens_per_image: int
) -> Measured:
    """The numbers of some samples, in the order given.

    Raises:
        ConfigError: the template is unknown.
    """
    written, found = template_named(template), Measured(np.zeros((0, len(Column)), np.int32))
    rows: list[tuple[int, int, int, int]] = []
    for outlines in _batches(dataset, samples, tokenizer, written):
        counts = iter(tokenizer.count([piece.text for one in outlines for piece in one.texts()]))
        for one in outlines:
            try:
                rows.append(_row(one, counts, tokenizer, tokens_per_image, found.several))
            except SampleError as error:
                found.problems[len(rows)] = error
                rows.append((-_CODES[error.reason], 0, 0, 0))
    found.rows = np.array(rows, np.int32).reshape(-1, len(Column))
    return found


@dataclass
class _Outline:
    """A sample before its texts are tokenized."""

    pieces: list[Piece] = field(default_factory=list)
    least: int = 0
    problem: SampleError | None = None

    def texts(self) -> Iterator[Piece]:
        return (piece for piece in self.pieces if piece.kind == "text")


def _batches(
    dataset: ShardDataset, samples: Iterable[int], tokenizer: Tokenizer, template: Template
) -> Iterator[list[_Outline]]:
    batch, characters = [], 0
    for i in samples:
        batch.append(_outline(dataset, i, tokenizer, template))
        characters += sum(len(piece.text) for piece in batch[-1].texts())
        if characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _outline(dataset: ShardDataset, i: int, tokenizer: Tokenizer, template: Template) -> _Outline:
    try:
        turns = turns_to_learn(dataset.record(i)["conversations"], len(dataset.images_of(i)[1]))
    except SampleError as error:
        return _Outline(problem=error)
    return _Outline(list(merged(pieces_of(turns, template), tokenizer)), least_length(turns))


def _row(
    outline: _Outline, counts: Iterator[int], tokenizer: Tokenizer, tokens_per_image: int, several: list[int]
) -> tuple[int, int, int, int]:
    if outline.problem is not None:
        raise outline.problem
    position, supervised, images = int(tokenizer.bos_id is not None), -1, []
    for piece in outline.pieces:
        if piece.kind == "image":
            images.append(position)
        size = {"image": tokens_per_image, "text": -1}.get(piece.kind, 1)
        size = next(counts) if size < 0 else size
        # position i has the label of token i + 1, so nothing predicts the first token
        if piece.answer and supervised < 0 and position + size > max(position, 1):
            supervised = max(position, 1) - 1
        position += size
    if supervised < 0:
        raise SampleError("no-supervision", "no token of this sample is supervised")
    image = min(images[0], _LARGEST) if images else -1
    if len(images) > 1:
        image = -2 - len(several)
        several += [len(images), *(min(at, _LARGEST) for at in images)]
    return min(position, _LARGEST), outline.least, min(supervised, _LARGEST), image
