"""Rows that replicas hold unequal numbers of are spread evenly, and each result returns to its owner."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_evomoe.parallel.exchange import WORTH, Exchange, even_shares, moved
from megatron_evomoe.parallel.topology import Axis

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=9)


def axis(counts: list[int], rank: int) -> Axis:
    return Axis(size=len(counts), rank=rank, group=None)


@given(COUNTS)
def test_shares_are_even_and_no_row_moves_in_vain(counts):
    shares = even_shares(counts)
    assert sum(shares) == sum(counts) and max(shares) - min(shares) <= 1
    everyone = [moved(counts, shares, rank) for rank in range(len(counts))]
    for rank, (gives, takes) in enumerate(everyone):
        assert counts[rank] - sum(gives) + sum(takes) == shares[rank]
        assert not (any(gives) and any(takes)), "a rank gives or takes"
        assert list(takes) == [everyone[other][0][rank] for other in range(len(counts))]


@given(COUNTS)
def test_all_ranks_exchange_or_none_does(counts):
    found = [Exchange.of(counts, axis(counts, rank)) for rank in range(len(counts))]
    even = -(-sum(counts) // len(counts))
    assert all((one is not None) == (max(counts) > WORTH * even) for one in found)


def test_a_small_excess_stays():
    assert Exchange.of([22, 20, 18], axis([22, 20, 18], 0)) is None
    assert Exchange.of([23, 20, 17], axis([23, 20, 17], 0)).given == (0, 0, 3)
    assert Exchange.of([0, 0], axis([0, 0], 0)) is None
