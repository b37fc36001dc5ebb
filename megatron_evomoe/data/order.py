"""The order of samples, as a function of (seed, epoch, position) alone.

The order does not depend on the number of workers or ranks, nor on batch sizes. A run that stops at position
p can therefore continue at p with other numbers of them, and the position is the whole state of the order.
"""

from __future__ import annotations

import numpy as np

from megatron_evomoe.config import ConfigError

NAME = "argsort of Philox"
"""Names the rule in checkpoints, because another rule would give the same seed another order."""


class SampleOrder:
    """Maps a position (0, 1, 2 … over all epochs) to the number of a sample.

    Each epoch is a permutation of its own, or without `shuffle` the stored order. The permutation sorts raw
    64-bit Philox output, which numpy guarantees to stay the same between versions; `Generator.permutation`
    has no such guarantee.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        if num_samples < 1:
            raise ConfigError("a data set without samples has no order; check the paths in train_data")
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle
        self._cached: tuple[int, np.ndarray] | None = None  # the last epoch asked for, and its permutation

    def epoch(self, position: int) -> int:
        """The pass over the data, from 0, to which `position` belongs."""
        return position // self.num_samples

    def index(self, position: int) -> int:
        """The number of the sample at `position`."""
        epoch, offset = divmod(position, self.num_samples)
        return int(self.permutation(epoch)[offset]) if self.shuffle else offset

    def permutation(self, epoch: int) -> np.ndarray:
        """The sample numbers of an epoch in their shuffled order, int64 [n]."""
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
    """The positions that one replica reads of the global batch [start, start + G), one list per microbatch.

    Microbatch m of replica r has the b positions from start + m·b·DP + r·b on.
    """
    stride = micro_batch_size * data_parallel_size
    first = start + data_parallel_rank * micro_batch_size
    return [list(range(p, p + micro_batch_size)) for p in range(first, first + global_batch_size, stride)]
