"""Padding is computed as the loader pads, and lengths are summed up as they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_evomoe.config import DataConfig
from megatron_evomoe.data.waste import waste

SEQ, G = 64, 16


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.integers(0, SEQ), min_size=G, max_size=G), min_size=1, max_size=3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
)
def test_padding_of_steps(drawn, micro_batch_size, replicas):
    steps = [np.array(lengths) for lengths in drawn]
    data = DataConfig(seq_length=SEQ)
    none, sort, pack = waste(data, micro_batch_size, replicas, steps)
    tokens = sum(map(sum, drawn))
    assert none.tokens == sort.tokens == pack.tokens == tokens
    b, dp = micro_batch_size, replicas
    padded = 0
    for lengths in drawn:  # microbatch m of replica r takes m·b·DP + r·b + [0, b)
        for r in range(dp):
            mine = [n for at, n in enumerate(lengths) if at // b % dp == r]
            padded += max(1, *mine) * len(mine)
    assert none.positions == padded
    assert sort.positions <= none.positions
    assert tokens <= pack.positions <= tokens + len(steps) * dp * (1 + G)  # a row of nothing has a position
    for one in (none, sort, pack):
        assert one.share == pytest.approx(1 - tokens / one.positions)
        assert 1 <= one.imbalance <= dp
    assert none.microbatches == sort.microbatches == G / b / dp
    assert pack.microbatches <= G


def test_rows_of_fixed_length():
    data = DataConfig(seq_length=SEQ, pad_to_seq_length=True)
    none, sort, pack = waste(data, 2, 1, [np.full(G, SEQ // 2)])
    assert none.positions == sort.positions == G * SEQ and none.share == 0.5
    assert pack.positions == G // 2 * SEQ and pack.share == 0 and pack.microbatches == G / 4
