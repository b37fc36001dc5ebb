"""Deals the samples of a global batch into microbatches, by the samples' lengths alone.

`none` takes samples as they come, `sort` puts samples of like length together, and `pack` puts several
samples into one row. All three take the same samples in the same step, so the loss of a step does not depend
on the choice. Nothing here depends on workers, ranks or the contents of a sample: each rank makes the same
plan from the same lengths. Work is therefore counted in whole numbers, whose sums are the same on every
processor.

Shapes: G samples of a global batch · K microbatches of a step, over all replicas.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from typing import Literal

import numpy as np

Packing = Literal["none", "sort", "pack"]

_BISECTIONS = 6
"""Attempts at balancing full bins; each halves the difference between the best known and the least possible
length of the longest bin."""
_EVEN_PERCENT = 101
"""Bins whose work is at most this much of the mean are not evened out further."""
_WORK_UNIT = 1024
"""Units of work in one position."""


def plan_step(
    lengths: np.ndarray,
    *,
    packing: Packing,
    micro_batch_size: int,
    seq_length: int,
    replicas: int,
    packing_replicas: int | None = None,
    rounds: int = 1,
    multiple: int = 1,
    attention_cost: float = 0.0,
) -> list[list[int]]:
    """The offsets into the global batch that each microbatch of a step holds.

    Microbatch m of replica r is number m·replicas + r. Its offsets are rows with `none` and `sort`, and with
    `pack` the segments of its only row. Consecutive microbatches are of like work, so that replicas that
    exchange tokens in each microbatch wait little for each other, and the sums over a replica's microbatches
    are balanced too.

    Args:
        lengths: int [G], tokens of each sample after cutting. A sample that is known to be left out has a
            length of 0 or less: with `pack` it is in no microbatch, otherwise its row is empty.
        micro_batch_size: rows of a microbatch with `none` and `sort`; with `pack`, a microbatch holds up to
            micro_batch_size·seq_length tokens.
        replicas: the data-parallel size.
        packing_replicas: with `pack`, the number of microbatches is a multiple of this number, a multiple of
            `replicas` (None: `replicas`). Equal values give equal microbatches at any number of replicas.
        rounds: with `pack`, microbatches of each replica are a multiple of this number, as interleaved
            pipeline schedules need.
        multiple: rows are padded to a multiple of this number of positions, which counts as work.
        attention_cost: work of a pair of positions in attention, if the work of one position in everything
            else is 1 (`plan.work.attention_cost`).

    Returns:
        K lists. With `none` and `sort`, K is G / micro_batch_size; with `pack` it is the smallest multiple of
        packing_replicas·rounds in which best fit places all samples. A list is empty where there are fewer
        samples than microbatches.
    """
    lengths = np.maximum(np.asarray(lengths, dtype=np.int64), 0)
    if packing == "pack":
        group = (packing_replicas or replicas) * rounds
        assert group % replicas == 0, (packing_replicas, rounds, replicas)
        capacity = micro_batch_size * seq_length
        bins = _packed(lengths, _work(lengths, lengths**2, attention_cost), capacity, group)
        positions = rounded_up(_sums(lengths, bins), multiple)
        return _dealt(bins, _work(positions, _sums(lengths**2, bins), attention_cost), replicas)
    assert len(lengths) % (micro_batch_size * replicas) == 0, (len(lengths), micro_batch_size, replicas)
    if packing == "none":
        return np.arange(len(lengths)).reshape(-1, micro_batch_size).tolist()
    order = np.argsort(-lengths, kind="stable").reshape(-1, micro_batch_size)
    longest = rounded_up(lengths[order[:, 0]], multiple)
    return _dealt(order.tolist(), _work(longest, longest**2, attention_cost), replicas)


def rounded_up(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """The next multiples of `multiple` that are not below `lengths`."""
    return -(-lengths // multiple) * multiple


def _work(positions: np.ndarray, squares: np.ndarray, attention_cost: float) -> np.ndarray:
    """Work of so many positions and pairs of positions, int64."""
    return np.rint(_WORK_UNIT * (positions + attention_cost * squares)).astype(np.int64)


def _sums(values: np.ndarray, bins: list[list[int]]) -> np.ndarray:
    """The sum of whole numbers over each of K bins of indices, int64 [K]."""
    of_bin = np.repeat(np.arange(len(bins)), [len(held) for held in bins])
    indices = np.fromiter(itertools.chain.from_iterable(bins), dtype=np.int64, count=len(of_bin))
    # in float64, which is exact up to 2^53
    return np.bincount(of_bin, weights=values[indices], minlength=len(bins)).astype(np.int64)


def _dealt(microbatches: list[list[int]], work: np.ndarray, replicas: int) -> list[list[int]]:
    """Deal microbatches to replicas in rounds of like work, so that the sums of work are balanced.

    In each round, the most work goes to the replica that has the least so far.
    """
    order = np.argsort(-work, kind="stable").tolist()
    total = [0] * replicas
    dealt: list[list[int]] = []
    for first in range(0, len(order), replicas):
        to = sorted(range(replicas), key=lambda r: (total[r], r))
        of_replica = dict(zip(to, order[first : first + replicas], strict=True))
        for r in range(replicas):
            total[r] += int(work[of_replica[r]])
            dealt.append(microbatches[of_replica[r]])
    return dealt


def _packed(lengths: np.ndarray, work: np.ndarray, capacity: int, group: int) -> list[list[int]]:
    """K bins of offsets, K a multiple of `group`; no bin holds more than `capacity` tokens.

    Best fit decides K. Where that leaves room, samples are spread by work, the largest first, each to the
    bin that has the least. Where a sample does not fit there, best fit into as short bins as possible
    replaces it. At last, exchanges even out the work that is left.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[: np.count_nonzero(lengths)]
    lengths, work = lengths[order], work[order]
    longest_first = lengths.tolist()
    fitting = _best_fit(longest_first, capacity)
    assert fitting is not None, f"a sample of {longest_first[0]} tokens does not fit into {capacity}"
    count = max(-(-len(fitting) // group), 1) * group
    bins = _spread(longest_first, work.tolist(), capacity, count)
    if bins is None:
        bins = _shortest(longest_first, capacity, count, fitting)
    _even_out(bins, lengths, work, capacity)
    return [sorted(order[held].tolist()) for held in bins]


def _best_fit(lengths: list[int], capacity: int, most: int | None = None) -> list[list[int]] | None:
    """Best-fit decreasing: each length, the longest first, goes to the fullest bin that it fits into.

    None if more than `most` bins would be needed.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free positions, bin), in ascending order
    for i, length in enumerate(lengths):
        at = bisect.bisect_left(free, (length, -1))
        if at < len(free):
            room, number = free.pop(at)
            bins[number].append(i)
        else:
            if length > capacity or len(bins) == most:
                return None
            room, number = capacity, len(bins)
            bins.append([i])
        bisect.insort(free, (room - length, number))
    return bins


def _spread(lengths: list[int], work: list[int], capacity: int, count: int) -> list[list[int]] | None:
    """`count` bins of balanced work: each sample goes to the bin with the least; None if it does not fit."""
    bins: list[list[int]] = [[] for _ in range(count)]
    free = [capacity] * count
    least = [(0, k) for k in range(count)]
    for i, length in enumerate(lengths):
        so_far, k = least[0]
        if length > free[k]:
            return None
        bins[k].append(i)
        free[k] -= length
        heapq.heapreplace(least, (so_far + work[i], k))
    return bins


def _shortest(lengths: list[int], capacity: int, count: int, fitting: list[list[int]]) -> list[list[int]]:
    """`count` bins as best fit fills them when the longest is as short as possible (found by bisection)."""
    best, enough = fitting, capacity
    too_short = max(-(-sum(lengths) // count), lengths[0]) - 1
    for _ in range(_BISECTIONS):
        if enough - too_short < 2:
            break
        middle = (enough + too_short) // 2
        found = _best_fit(lengths, middle, count)
        if found is None:
            too_short = middle
        else:
            best, enough = found, middle
    return best + [[] for _ in range(count - len(best))]


def _even_out(bins: list[list[int]], lengths: np.ndarray, work: np.ndarray, capacity: int) -> None:
    """Move or exchange samples between the bins with the most and the least work, in place.

    Each exchange is the one that brings the two bins' work nearest to each other. The search ends where no
    bin has much more work than the mean, where no exchange helps, or after one exchange a bin.
    """
    total = _sums(work, bins).tolist()
    enough = _EVEN_PERCENT * sum(total) // (100 * len(bins))
    for _ in bins:
        most, least = total.index(max(total)), total.index(min(total))
        if total[most] <= enough:
            return
        room = capacity - int(lengths[bins[least]].sum())
        difference = total[most] - total[least]
        # a row for each sample that could leave the first bin; the last column takes nothing in return
        given, taken = np.array(bins[most]), np.array([*bins[least], -1])
        longer = lengths[given, None] - np.where(taken < 0, 0, lengths[taken])
        more = work[given, None] - np.where(taken < 0, 0, work[taken])
        left = np.where(longer <= room, np.abs(difference - 2 * more), difference)
        i, j = divmod(int(left.argmin()), len(taken))
        if left[i, j] >= difference:
            return
        bins[most].remove(given[i])
        bins[least].append(int(given[i]))
        if taken[j] >= 0:
            bins[least].remove(taken[j])
            bins[most].append(int(taken[j]))
        total[most] -= int(more[i, j])
        total[least] += int(more[i, j])
