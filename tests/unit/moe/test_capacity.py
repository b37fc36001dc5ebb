"""The tokens that an expert keeps under a capacity factor, compared with a rule written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_evomoe.moe.capacity import within_capacity

pytestmark = pytest.mark.usefixtures("one_rank")


def by_hand(probs, chosen, padding, topk, factor, by_position):
    tokens, experts = probs.shape
    capacity = math.ceil(sum(not p for p in padding) * topk / experts * factor)
    kept = torch.zeros(tokens, experts, dtype=torch.bool)
    for n in range(experts):
        asking = [t for t in range(tokens) if chosen[t, n] and not padding[t]]
        if not by_position:
            # Python's sort is stable, so equal probabilities keep the order of their tokens.
            asking.sort(key=lambda t: -round(float(probs[t, n]) * 4096))
        kept[asking[:capacity], n] = True
    return kept


@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 8),
    topk=st.integers(1, 3),
    factor=st.floats(0.01, 4.0),
    by_position=st.booleans(),
    seed=st.integers(0, 10**6),
    kinds=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.3, 0.9]),
)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_most_probable_stay_up_to_the_share_of_real_tokens(
    tokens, experts, topk, factor, by_position, seed, kinds, share
):
    """Only `kinds` tokens are distinct; among equal tokens the position decides."""
    topk, g = min(topk, experts), torch.Generator().manual_seed(seed)
    probs = torch.softmax(torch.randn(kinds, experts, generator=g), dim=-1)[
        torch.randint(kinds, (tokens,), generator=g)
    ]
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, probs.topk(topk).indices, True)
    padding = torch.rand(tokens, generator=g) < share
    # Noise as from a different order of summation must not change which tokens are kept.
    probs = probs * chosen * (1 + 1e-7 * torch.randn(probs.shape, generator=g))
    got = within_capacity(
        probs,
        chosen,
        padding,
        topk=topk,
        factor=factor,
        by_position=by_position,
        group=torch.distributed.group.WORLD,
    )
    assert torch.equal(got, by_hand(probs, chosen, padding, topk, factor, by_position))


def test_enough_capacity_drops_padding_alone():
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    args = dict(topk=1, factor=2.0, by_position=False, group=torch.distributed.group.WORLD)
    padding = torch.tensor([False, True, False])
    assert within_capacity(probs, probs > 0, padding, **args)[:, 0].tolist() == [True, False, True]
    assert within_capacity(probs, probs > 0, None, **args)[:, 0].tolist() == [True, True, True]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    padded=st.integers(0, 5),
    factor=st.floats(0.05, 1.5),
    by_position=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_packed_row_keeps_what_padded_rows_keep(lengths, padded, factor, by_position, seed):
    """Few distinct tokens, so that positions often decide; rows are laid out as the core has them, [s, b]."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.softmax(torch.randn(3, 4, generator=g), dim=-1)
    rows = [kinds[torch.randint(3, (n,), generator=g)] for n in lengths]
    args = dict(topk=1, factor=factor, by_position=by_position, group=torch.distributed.group.WORLD)

    grid = torch.nn.utils.rnn.pad_sequence(rows)  # [s, b, N]
    padding = torch.arange(len(grid))[:, None] >= torch.tensor(lengths)
    kept = within_capacity(*top(grid.flatten(0, 1)), padding.flatten(), **args).view(grid.shape)
    wanted = torch.cat([kept[:n, i] for i, n in enumerate(lengths)])

    row = torch.cat([*rows, torch.zeros(padded, 4)])
    segments = [*lengths, *([padded] if padded else [])]
    starts = torch.cat([torch.arange(n) == 0 for n in segments])
    is_padding = torch.arange(len(row)) >= sum(lengths)
    got = within_capacity(*top(row), is_padding, starts, **args)
    assert torch.equal(got[: sum(lengths)], wanted)


def top(probs):
    """The probability of the chosen expert, and the choice."""
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, probs.argmax(1, keepdim=True), True)
    return probs * chosen, chosen
