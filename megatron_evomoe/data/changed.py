"""Describes how the training data differs from that of a checkpoint, and what a resume on it would mean."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from megatron_evomoe.data.order import SampleOrder

Shard = tuple[str, int, str]
"""File name, number of samples, digest: an entry of `ShardDataset.contents`."""

_NAMED = 3  # shards that a message names
# samples up to which repeated and lost samples are counted; the two orders of 10^8 samples take 2 GB and two
# minutes
_COUNTED = 50_000_000


def differences(before: Sequence[Shard], now: Sequence[Shard]) -> list[str]:
    """The differences of two data sets in words, shard by shard.

    The list is empty where both hold the same samples in the same order, whatever the files are called.
    """
    if [s[2] for s in before] == [s[2] for s in now]:
        return []
    gone, new = _less(before, now), _less(now, before)
    if not gone and not new:
        return [f"the same {len(now)} shards in another order"]
    renewed: dict[str, list[int]] = {}  # two directories may each have a shard of one name
    for name, count, _ in new:
        renewed.setdefault(name, []).append(count)
    found = []
    for name, count, _ in gone:
        if not renewed.get(name):
            found.append(f"{name} ({count} samples) is gone")
        elif (other := renewed[name].pop(0)) != count:
            found.append(f"{name} holds {other} samples, {count} before")
        else:
            found.append(f"{name} holds other contents in its {count} samples")
    found += [f"{name} ({count} samples) is new" for name, counts in renewed.items() for count in counts]
    return found if len(found) <= _NAMED else [*found[:_NAMED], f"{len(found) - _NAMED} more shards differ"]


def _less(some: Sequence[Shard], others: Sequence[Shard]) -> list[Shard]:
    """The shards of `some` whose digest `others` do not have, or have less often."""
    there = collections.Counter(digest for _, _, digest in others)
    left = []
    for shard in some:
        if there[shard[2]]:
            there[shard[2]] -= 1
        else:
            left.append(shard)
    return left


def meaning(
    before: Sequence[Shard], old: SampleOrder, now: Sequence[Shard], new: SampleOrder, position: int
) -> str:
    """What it means to resume at `position` in another order, in words.

    The text tells how many samples of the epoch repeat and how many are left out.

    Args:
        old: the order of the shards `before`.
        new: the order of the shards `now`.
    """
    where = (
        f"position {position} lies in epoch {old.epoch(position)} of {old.num_samples} samples before, in "
        f"epoch {new.epoch(position)} of {new.num_samples} now"
    )
    if max(old.num_samples, new.num_samples) > _COUNTED:
        return (
            f"{where}; from there on the order differs, so some samples of this epoch repeat and others are "
            "left out"
        )
    numbers = _numbers(before, now)
    order = numbers[old.permutation(old.epoch(position))]
    seen, unseen = np.split(order, [position % old.num_samples])
    coming = new.permutation(new.epoch(position))[position % new.num_samples :]
    repeat = np.isin(coming, seen).sum()
    lost = (~np.isin(unseen[unseen >= 0], coming)).sum()
    unknown = new.num_samples - (numbers >= 0).sum()
    return (
        f"{where}; of the samples in unchanged shards, {repeat} that this epoch has shown come again before "
        f"it ends, and {lost} that it has not shown are left out; {unknown} samples lie in other shards"
    )


def _numbers(before: Sequence[Shard], now: Sequence[Shard]) -> np.ndarray:
    """The new number of each old sample, int64 [n]; −1 where its shard has changed or is gone."""
    places: dict[str, collections.deque[int]] = collections.defaultdict(collections.deque)
    start = 0
    for _, count, digest in now:
        places[digest].append(start)
        start += count
    parts = []
    for _, count, digest in before:
        there = places[digest]
        parts.append(np.arange(count) + there.popleft() if there else np.full(count, -1))
    return np.concatenate(parts)
