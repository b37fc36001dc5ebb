"""Finds samples with the same content: the same turns, and pictures of the same bytes.

Records may differ in everything else, such as their ids. Pictures are read only where the turns are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.shards import ShardDataset

MOST_SAMPLES = 200_000
"""Samples whose turns are compared; reading one takes about 0.15 ms."""
_MOST_PICTURES = 20_000


@dataclass
class Duplicates:
    """What was found among the first `compared` samples of `total`."""

    groups: list[list[int]]
    """The numbers of the samples of each group of equal ones, in stored order; the largest groups first."""
    compared: int
    total: int
    unread: int = 0
    """Samples of equal turns whose pictures were not compared, because there are too many."""

    @property
    def superfluous(self) -> int:
        """The samples that could be left out without losing any content."""
        return sum(len(group) - 1 for group in self.groups)


def find_duplicates(
    dataset: ShardDataset, *, at: Callable[[int], None] = lambda _: None, most: int = MOST_SAMPLES
) -> Duplicates:
    """The groups of samples with the same content.

    Args:
        at: is told now and then how many samples have been read.
        most: samples that are read, from the first on.
    """
    count = min(len(dataset), most)
    of_turns = np.zeros((count, 2), np.uint64)
    for i in range(count):
        of_turns[i] = _digest([_turns(dataset, i)])
        if i % 1000 == 0:
            at(i)
    at(count)
    groups: list[list[int]] = []
    unread, budget = 0, _MOST_PICTURES
    for same in _equal(of_turns):
        pictures = sum(len(dataset.images_of(i)[1]) for i in same)
        budget -= pictures
        if budget < 0:
            unread += len(same)
            continue
        of_pictures = np.array([_digest(_pictures(dataset, i)) for i in same], np.uint64)
        groups += [[same[k] for k in alike] for alike in _equal(of_pictures)]
    return Duplicates(sorted(groups, key=lambda group: (-len(group), group)), count, len(dataset), unread)


def _turns(dataset: ShardDataset, i: int) -> bytes:
    """The turns of a sample as bytes; those of an unusable sample are like no other's."""
    try:
        return json.dumps(dataset.record(i)["conversations"], sort_keys=True).encode()
    except SampleError:
        return f"unusable {i}".encode()


def _pictures(dataset: ShardDataset, i: int) -> list[bytes]:
    try:
        return dataset.images(i)
    except SampleError:
        return [f"unusable {i}".encode()]


def _digest(parts: Iterable[bytes]) -> np.ndarray:
    """A digest of some byte strings, uint64 [2]."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return np.frombuffer(digest.digest(), np.uint64)


def _equal(digests: np.ndarray) -> list[list[int]]:
    """The numbers of equal rows of uint64 [n, 2], in groups of at least two."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    changes = np.flatnonzero((np.diff(digests[order], axis=0) != 0).any(axis=1)) + 1
    return [sorted(group.tolist()) for group in np.split(order, changes) if len(group) > 1]
