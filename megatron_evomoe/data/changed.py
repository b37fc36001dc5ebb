"""Training data that is other than what a checkpoint was trained on: in what, and what going on with it would
mean.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from megatron_evomoe.data.order import SampleOrder

Shard = tuple[str, int, str]
"""File name, samples, digest: an entry of `ShardDataset.contents`."""

_NAMED = 3  # shards a message names
# samples up to which repeated and lost ones are counted: the orders of 10^8 take 2 GB and half a minute
_COUNTED = 50_000_000


def differences(before: Sequence[Shard], now: Sequence[Shard]) -> list[str]:
    """What differs, in words, shard by shard; nothing where both hold the same samples in the same order,
    whatever files are called.
    """
    if [s[2] for s in before] == [s[2] for s in now]:
        return []
    gone, new = _less(before, now), _less(now, before)
    if not gone and not new:
        return [f"the same {len(now)} shards in another order"]
    renewed: dict[str, list[int]] = {}  # two folders may each have a shard of one name
    for name, count, _ in new:
        renewed.setdefault(name, []).append(count)
    found = []
    for name, count, _ in gone:
        if not renewed.get(name):
            found.append(f"{name} ({count} samples) is not there any more")
        elif (other := renewed[name].pop(0)) != count:
            found.append(f"{name} holds {other} samples, {count} before")
        else:
            found.append(f"{name} holds other contents in its {count} samples")
    found += [f"{name} ({count} samples) is new" for name, counts in renewed.items() for count in counts]
    return found if len(found) <= _NAMED else [*found[:_NAMED], f"{len(found) - _NAMED} more shards differ"]


def _less(some: Sequence[Shard], others: Sequence[Shard]) -> list[Shard]:
    """Those of `some` whose digest `others` lack, counted as often as it occurs."""
    there = collections.Counter(digest for _, _, digest in others)
    left = []
    for shard in some:
        if there[shard[2]]:
            there[shard[2]] -= 1
        else:
            left.append(shard)
    return left


def meaning(
    before: Sequence[Shard], before_seed: int, now: Sequence[Shard], now_seed: int, position: int
) -> str:
    """What it means to go on at `position` in another order, in words: which samples of the epoch repeat,
    which are left out.
    """
    old = SampleOrder(sum(count for _, count, _ in before), before_seed)
    new = SampleOrder(sum(count for _, count, _ in now), now_seed)
    where = (
        f"position {position} lies in epoch {old.epoch(position)} of {old.num_samples} samples before, in "
        "epoch "
        f"{new.epoch(position)} of {new.num_samples} now"
    )
    if max(old.num_samples, new.num_samples) > _COUNTED:
        return (
            f"{where}; from there the order is another, so samples of this epoch repeat and others are "
            "left out of it"
        )
    numbers = _numbers(before, now)
    order = numbers[old.permutation(old.epoch(position))]
    seen, unseen = np.split(order, [position % old.num_samples])
    coming = new.permutation(new.epoch(position))[position % new.num_samples :]
    repeat = np.isin(coming, seen).sum()
    lost = (~np.isin(unseen[unseen >= 0], coming)).sum()
    unknown = new.num_samples - (numbers >= 0).sum()
    return (
        f"{where}; of the samples in shards that are the same, {repeat} shown in this epoch come again "
        "before it ends, and "
        f"{lost} not shown yet are left out of it; {unknown} samples lie in shards that are not the same"
    )


def _numbers(before: Sequence[Shard], now: Sequence[Shard]) -> np.ndarray:
    """Number now of each sample before; −1 where its shard is not the same any more."""
    places = collections.defaultdict(collections.deque)
    start = 0
    for _, count, digest in now:
        places[digest].append(start)
        start += count
    parts = []
    for _, count, digest in before:
        there = places[digest]
        parts.append(np.arange(count) + there.popleft() if there else np.full(count, -1))
    return np.concatenate(parts)
