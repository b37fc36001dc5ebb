"""The order of samples, as a function of (seed, key, epoch, position) alone.

The order does not depend on the number of workers or ranks, nor on batch sizes. A run that stops at position
p can therefore continue at p with other numbers of them, and the position is the whole state of the order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from megatron_evomoe.config import ConfigError

NAME = "mixed-radix Feistel"
"""Names the rule in checkpoints, because another rule would give the same seed another order."""
ARGSORT = "argsort of Philox"
"""The rule of versions up to 0.1. A run that was begun with it keeps it. It knows no keys."""
NAMES = (NAME, ARGSORT)

_ROUNDS = 16
# splitmix64's constants; numpy wraps products of uint64 around
_STEP, _MIX_1, _MIX_2 = (
    np.array(c, np.uint64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_SHIFTS = tuple(np.array(s, np.uint64) for s in (30, 27, 31))


class SampleOrder:
    """Maps a position (0, 1, 2 … over all epochs) to the number of a sample.

    Each epoch is a permutation of its own, or without `shuffle` the stored order.
    """

    def __init__(
        self, num_samples: int, seed: int, shuffle: bool = True, *, key: str = "", name: str = NAME
    ) -> None:
        """See the class.

        Args:
            key: orders of other keys are unrelated. Training gives each stage its name.
            name: the rule, one of `NAMES`.

        Raises:
            ConfigError: there is no sample.
        """
        if num_samples < 1:
            raise ConfigError("a data set without samples has no order; check the paths in train_data")
        self.num_samples, self.seed, self.shuffle, self.key, self.name = num_samples, seed, shuffle, key, name
        self._permuted = {NAME: self._feistel, ARGSORT: self._argsort}[name]
        self._last: tuple[int, np.ndarray] | None = None  # an epoch, and its permutation or round keys

    def epoch(self, position: int) -> int:
        """The pass over the data, from 0, to which `position` belongs."""
        return position // self.num_samples

    def index(self, position: int) -> int:
        """The number of the sample at `position`."""
        return int(self.indices([position])[0])

    def indices(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The numbers of the samples at k positions, int64 [k]."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        if not self.shuffle:
            return offsets
        found = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():  # mostly one
            chosen = epochs == epoch
            found[chosen] = self._permuted(epoch, offsets[chosen])
        return found

    def permutation(self, epoch: int) -> np.ndarray:
        """The sample numbers of an epoch in their order, int64 [n]."""
        first = epoch * self.num_samples
        return self.indices(np.arange(first, first + self.num_samples))

    def _feistel(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """A bijection of 0 … n − 1 that is computed for each offset by itself.

        With a ≈ b ≈ √n, an offset is written as two digits, l·b + r. In turn, a function of one digit and a
        key is added to the other, modulo a or b. Each such round can be undone, so all of them together
        permute the a·b ≥ n numbers. A result that is not below n is permuted again until it is, which
        leaves a permutation of the n numbers.
        """
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, _round_keys(self.seed, self.key, epoch)
        keys = self._last[1]
        a, b = _radices(self.num_samples)
        found = _rounds(offsets.astype(np.uint64), a, b, keys)
        limit = np.array(self.num_samples, np.uint64)
        while (beyond := np.flatnonzero(found >= limit)).size:
            found[beyond] = _rounds(found[beyond], a, b, keys)
        return found.astype(np.int64)

    def _argsort(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """The permutation sorts raw 64-bit Philox output, which numpy guarantees to stay the same.

        It takes 16 bytes of memory a sample.
        """
        if self._last is None or self._last[0] != epoch:
            key = np.array([self.seed % 2**64, epoch], dtype=np.uint64)
            draws = np.random.Philox(key=key).random_raw(self.num_samples)
            self._last = epoch, np.argsort(draws, kind="stable")
        return self._last[1][offsets]


def _radices(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The radices a and b, whose product is at least n, and above it by a share of at most 2/√n.

    a is even: adding to a digit of an odd radix only ever gives even permutations.
    """
    a = math.isqrt(n - 1) + 1
    a += a % 2
    return np.array(a, np.uint64), np.array(-(-n // a), np.uint64)


def _round_keys(seed: int, key: str, epoch: int) -> np.ndarray:
    """The keys of the rounds of an epoch, uint64 [rounds]."""
    text = f"{seed % 2**64} {epoch} {key}"
    return np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * _ROUNDS), "<u8").astype(np.uint64)


def _rounds(numbers: np.ndarray, a: np.ndarray, b: np.ndarray, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(numbers, b)
    for first, second in keys.reshape(-1, 2):
        left = (left + _hash(right, first) % a) % a
        right = (right + _hash(left, second) % b) % b
    return left * b + right


def _hash(digits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """64 bits that depend on all bits of a digit and of the key (splitmix64)."""
    x = digits * _STEP + key
    x = (x ^ (x >> _SHIFTS[0])) * _MIX_1
    x = (x ^ (x >> _SHIFTS[1])) * _MIX_2
    return x ^ (x >> _SHIFTS[2])
