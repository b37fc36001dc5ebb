"""Spread work that replicas hold unequal amounts of: rows move to replicas that have fewer, and results back.

Shape legend: n rows of any shape, such as the images of a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_evomoe.parallel.topology import Axis

WORTH = 1.1
"""Rows are moved if the fullest replica holds more than this many times an even share.

Moving an image and its features takes well under a tenth of the time that CLIP-L/336 needs for the image, at
25 GB/s, so a smaller excess would gain little.
"""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Which of its last rows a replica gives to each other one, and how many it takes from each."""

    given: tuple[int, ...]
    taken: tuple[int, ...]
    axis: Axis

    @classmethod
    def of(cls, counts: Sequence[int], axis: Axis) -> Exchange | None:
        """How to spread `counts[r]` rows of each rank r of `axis`; none where it is not worth it.

        It is a function of `counts`, which all ranks know, so all ranks exchange or none does.
        """
        if max(counts) <= WORTH * -(-sum(counts) // len(counts)):
            return None
        given, taken = moved(counts, even_shares(counts), axis.rank)
        return cls(given=given, taken=taken, axis=axis)

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """From a tensor of this replica's own rows [n, …]: the rows that it computes. Communicates."""
        kept = len(rows) - sum(self.given)
        return self._move(rows, kept, self.given, self.taken)

    def collect(self, rows: torch.Tensor) -> torch.Tensor:
        """From a tensor of what this replica computed: the results of its own rows, in their order.

        Communicates.
        """
        kept = len(rows) - sum(self.taken)
        return self._move(rows, kept, self.taken, self.given)

    def _move(
        self, rows: torch.Tensor, kept: int, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> torch.Tensor:
        found = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(
            found, rows[kept:].contiguous(), list(received), list(sent), group=self.axis.group
        )
        return torch.cat([rows[:kept], found])


def even_shares(counts: Sequence[int]) -> list[int]:
    """As many rows as `counts`, spread so that shares differ by at most one; the fullest keep one more."""
    share, left = divmod(sum(counts), len(counts))
    shares = [share] * len(counts)
    for rank in sorted(range(len(counts)), key=lambda r: -counts[r])[:left]:
        shares[rank] += 1
    return shares


def moved(counts: Sequence[int], shares: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rows that `rank` gives to each rank, and takes from each, so that `counts` become `shares`.

    The rows that are given away, in the order of ranks, fill the places that are free, in the order of ranks.
    So each rank's rows go to ranks in ascending order.
    """
    differences = [count - share for count, share in zip(counts, shares, strict=True)]
    excess = list(itertools.accumulate((max(0, d) for d in differences), initial=0))
    free = list(itertools.accumulate((max(0, -d) for d in differences), initial=0))

    def common(giver: int, taker: int) -> int:
        return max(0, min(excess[giver + 1], free[taker + 1]) - max(excess[giver], free[taker]))

    everyone = range(len(counts))
    return tuple(common(rank, other) for other in everyone), tuple(common(other, rank) for other in everyone)
