"""The order is a permutation of each epoch, looks random, and stays what it was recorded to be.

The statistical tests draw from fixed seeds, so they do not fail by chance; their limits are the quantiles
that a random permutation exceeds once in 10^5 or 10^6 times.
"""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.order import ARGSORT, NAME, NAMES, SampleOrder

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=150)
SEEDS = st.integers(-(1 << 64), (1 << 64) - 1)


@EXAMPLES
@given(st.integers(1, 3000), SEEDS, st.text(max_size=8), st.integers(0, 1 << 20), st.sampled_from(NAMES))
def test_each_epoch_is_a_permutation(n, seed, key, epoch, name):
    order = SampleOrder(n, seed, key=key, name=name)
    assert np.array_equal(np.sort(order.permutation(epoch)), np.arange(n))


@EXAMPLES
@given(st.integers(1, 10**18), SEEDS, st.data())
def test_no_sample_is_met_twice_in_an_epoch_of_any_size(n, seed, data):
    order = SampleOrder(n, seed)
    epoch = data.draw(st.integers(0, 2**62 // n))
    offsets = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=50))
    found = order.indices([epoch * n + offset for offset in offsets])
    assert len(set(found.tolist())) == len(offsets) and 0 <= found.min() <= found.max() < n


@EXAMPLES
@given(
    st.integers(1, 400),
    st.lists(st.integers(0, 2000), max_size=40),
    st.sampled_from(NAMES),
    st.booleans(),
)
def test_indices_are_those_of_single_positions(n, positions, name, shuffle):
    order, other = (SampleOrder(n, 3, shuffle, key="a", name=name) for _ in range(2))
    found = order.indices(positions)
    assert found.dtype == np.int64 and found.tolist() == [other.index(p) for p in positions]


def test_seed_key_and_epoch_each_give_another_order():
    def first(seed=5, key="a", epoch=0):
        return tuple(SampleOrder(50, seed, key=key).permutation(epoch))

    orders = {first(), first(seed=6), first(seed=-5), first(key="b"), first(key=""), first(epoch=1)}
    assert len(orders) == 6 and first() == first()


def test_orders_stay_what_they_were():
    """The orders were recorded with numpy 2.4.6; an upgrade must not change them for a resumed run."""
    argsort = SampleOrder(10, 1234, name=ARGSORT)
    assert [argsort.index(p) for p in range(20)] == ARGSORT_GOLDEN
    assert SampleOrder(10, 1234, key="align", name=NAME).indices(range(20)).tolist() == GOLDEN
    assert SampleOrder(10**18, 1234, key="align").indices([0, 1, 10**18]).tolist() == GOLDEN_LARGE


ARGSORT_GOLDEN = [8, 9, 7, 3, 0, 1, 4, 2, 5, 6, 0, 9, 5, 6, 4, 2, 8, 1, 7, 3]
GOLDEN = [3, 7, 9, 4, 2, 5, 1, 0, 8, 6, 8, 1, 9, 6, 5, 7, 2, 4, 3, 0]
GOLDEN_LARGE = [340451875470786504, 544949817896267841, 517441973481046429]


def test_the_stored_order():
    order = SampleOrder(50, 5, shuffle=False)
    assert order.indices([0, 49, 50]).tolist() == [0, 49, 0] and (order.epoch(49), order.epoch(50)) == (0, 1)


def test_no_samples():
    with pytest.raises(ConfigError, match="without samples"):
        SampleOrder(0, seed=5)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_permutations_are_equally_frequent(n):
    seeds = 4000
    found = Counter(tuple(SampleOrder(n, seed, key="x").permutation(seed % 7)) for seed in range(seeds))
    counts = [found[p] for p in itertools.permutations(range(n))]
    expected = seeds / math.factorial(n)
    # sum of squares of about normal numbers: mean d, variance 2d; 5 sd and a bit for the long tail
    freedom = len(counts) - 1
    assert sum((c - expected) ** 2 / expected for c in counts) < freedom + 5 * math.sqrt(2 * freedom) + 15


@pytest.mark.parametrize("n", [997, 1000, 1024, 1 << 20, 10**9 + 7, 10**15])
def test_samples_are_uniform_and_neighbours_are_unrelated(n):
    """In each window of an epoch; between neighbours, epochs, seeds and keys."""
    size = min(n, 20000)
    orders = {
        "seed": SampleOrder(n, 8, key="a"),
        "key": SampleOrder(n, 7, key="b"),
        "itself": SampleOrder(n, 7, key="a"),
    }
    for start in (0, n // 3, n - size):
        window = np.arange(start, start + size)
        at = {name: order.indices(window) / n for name, order in orders.items()}
        x = at.pop("itself")
        at["epoch"] = orders["itself"].indices(window + n) / n
        at["position"] = window / n
        if n > size:  # otherwise the window is the whole epoch, which is uniform in any order
            counts = np.histogram(x, bins=64, range=(0, 1))[0]
            assert ((counts - size / 64) ** 2).sum() / (size / 64) < 63 + 5 * math.sqrt(126) + 15
        for lag in (1, 2, 16, 256):
            assert abs(correlation(x[:-lag], x[lag:])) < 5 / math.sqrt(size - lag), lag
        for name, other in at.items():
            assert abs(correlation(x, other)) < 5 / math.sqrt(size), name
        # equal places in two permutations: about one in expectation, whatever n is
        assert all((x == other).sum() <= 12 for name, other in at.items())


def correlation(x, y):
    return float(np.corrcoef(x, y)[0, 1])


@pytest.mark.parametrize("n", [1000, 10**6, 10**12])
def test_a_batch_is_spread_like_a_random_one(n):
    """The gaps between the sorted samples of a batch of 256: their largest, over 200 batches.

    It is ln(256) = 5.5 times the mean gap in expectation; a quasi-random order would stay below 3, one with
    clusters exceed 20.
    """
    order = SampleOrder(n, 11)
    largest = []
    for batch in range(200):
        found = np.sort(order.indices(np.arange(batch * 256, (batch + 1) * 256) % n))
        largest.append(np.diff(found).max() / (n / 256))
    assert 5 < np.mean(largest) < 7.5 and max(largest) < 16


def test_memory_does_not_grow_with_the_samples():
    tracemalloc.start()
    order = SampleOrder(10**12, 1)
    for position in (0, 10**12 - 128, 5 * 10**12):
        order.indices(np.arange(position, position + 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
