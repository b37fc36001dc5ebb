"""The order of samples, as a function of (seed, epoch, position) alone.

Nothing about who reads enters: not workers, not ranks, not batch sizes. So a run that stops at position p
goes on at p with any other number of each, and one integer is the whole state.
"""

from __future__ import annotations

import numpy as np

from megatron_evomoe.config import ConfigError

NAME = "argsort of Philox"
"""Identifies the rule in checkpoints: two rules give one seed two orders."""


class SampleOrder:
    """Position (0, 1, 2 … over all epochs) to sample number.

    Each epoch is a permutation of its own, or the stored order without `shuffle`. The permutation sorts raw
    64-bit Philox output, which numpy guarantees to stay the same between versions; `Generator.permutation`
    has no such guarantee.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        if num_samples < 1:
            raise ConfigError("a data set without samples has no order")
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle
        self._cached: tuple[int, np.ndarray] | None = (
            None  # one epoch; a step across the border recomputes once
        )

    def epoch(self, position: int) -> int:
        """Which pass over the data `position` belongs to."""
        return position // self.num_samples

    def index(self, position: int) -> int:
        """Number of the sample at `position`."""
        epoch, offset = divmod(position, self.num_samples)
        return int(self.permutation(epoch)[offset]) if self.shuffle else offset

    def permutation(self, epoch: int) -> np.ndarray:
        """Sample numbers of an epoch of a shuffled order, int64 [n]."""
        if self._cached is None or self._cached[0] != epoch:
            key = np.array([self.seed % 2**64, epoch], dtype=np.uint64)
            draws = np.random.Philox(key=key).random_raw(self.num_samples)
            self._cached = (epoch, np.argsort(draws, kind="stable"))
        return self._cached[1]


def replica_positions(
    start: int,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> list[list[int]]:
    """The positions of one replica in the global batch [start, start + G), one list per microbatch.

    Microbatch m of replica r has start + m·b·DP + r·b + [0, b).
    """
    stride = micro_batch_size * data_parallel_size
    first = start + data_parallel_rank * micro_batch_size
    return [list(range(p, p + micro_batch_size)) for p in range(first, first + global_batch_size, stride)]
