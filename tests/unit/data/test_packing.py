"""The plan of a step: which samples share a microbatch, and which replica computes it."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_evomoe.data.packing import plan_step

SEQ = 64


@st.composite
def steps(draw) -> tuple[np.ndarray, dict]:
    """Lengths of a global batch, some of them of left-out samples, and the sizes of a plan."""
    b, replicas, per_replica = (draw(st.integers(1, 4)) for _ in range(3))
    total = b * replicas * per_replica
    lengths = draw(st.lists(st.integers(-3, SEQ), min_size=total, max_size=total))
    sizes = dict(micro_batch_size=b, seq_length=SEQ, replicas=replicas)
    return np.array(lengths), sizes | dict(attention_cost=draw(st.sampled_from([0.0, 1e-3, 1.0])))


def total_lengths(lengths: np.ndarray, plan: list[list[int]]) -> list[int]:
    return [int(lengths[held].sum()) for held in plan]


def composition(plan: list[list[int]]) -> Counter:
    return Counter(tuple(held) for held in plan)


@given(steps())
def test_none_takes_consecutive_samples(step):
    lengths, sizes = step
    plan = plan_step(lengths, packing="none", **sizes)
    assert list(itertools.chain(*plan)) == list(range(len(lengths)))
    assert {len(held) for held in plan} == {sizes["micro_batch_size"]}


@given(steps())
def test_sort_gives_each_sample_a_row_among_rows_of_like_length(step):
    lengths, sizes = step
    plan = plan_step(lengths, packing="sort", **sizes)
    assert sorted(itertools.chain(*plan)) == list(range(len(lengths)))
    assert {len(held) for held in plan} == {sizes["micro_batch_size"]}
    # no length of one microbatch lies strictly inside the range of another
    rows = np.maximum(lengths, 0)
    ranges = sorted((rows[held].min(), rows[held].max()) for held in plan)
    assert all(high <= low for (_, high), (low, _) in itertools.pairwise(ranges))


@given(steps(), st.integers(1, 3), st.integers(1, 3))
def test_pack_places_each_usable_sample_once_within_the_capacity(step, times, rounds):
    lengths, sizes = step
    group = sizes["replicas"] * times
    plan = plan_step(lengths, packing="pack", packing_replicas=group, rounds=rounds, **sizes)
    assert sorted(itertools.chain(*plan)) == np.flatnonzero(lengths > 0).tolist()
    assert all(n <= sizes["micro_batch_size"] * SEQ for n in total_lengths(lengths, plan))
    assert len(plan) > 0 and len(plan) % (group * rounds) == 0
    # best fit leaves no two bins that would fit into one, so more bins than twice the tokens are never needed
    needed = max(1, 2 * int(lengths[lengths > 0].sum()) / (sizes["micro_batch_size"] * SEQ))
    assert len(plan) < needed + group * rounds


@given(steps(), st.sampled_from(["sort", "pack"]))
def test_the_number_of_replicas_changes_only_who_computes(step, packing):
    lengths, sizes = step
    alone = plan_step(
        lengths, packing=packing, packing_replicas=sizes["replicas"], **(sizes | dict(replicas=1))
    )
    together = plan_step(lengths, packing=packing, packing_replicas=sizes["replicas"], **sizes)
    assert composition(alone) == composition(together)


@given(steps(), st.sampled_from(["sort", "pack"]), st.randoms(use_true_random=False))
def test_equal_lengths_in_another_order_give_microbatches_of_equal_lengths(step, packing, random):
    lengths, sizes = step
    shuffled = np.array(random.sample(lengths.tolist(), len(lengths)))
    one, other = (plan_step(x, packing=packing, **sizes) for x in (lengths, shuffled))
    assert [sorted(np.maximum(lengths, 0)[held]) for held in one] == [
        sorted(np.maximum(shuffled, 0)[held]) for held in other
    ]


@pytest.mark.parametrize(
    ("packing", "per_replica", "over_step", "over_rounds"),
    [("sort", 8, 1.02, 1.16), ("pack", 8, 1.02, 1.06), ("pack", 1, 1.06, 1.06)],
)
@pytest.mark.parametrize("cost", [0.0, 1e-3])
def test_replicas_get_like_work(packing, per_replica, over_step, over_rounds, cost):
    """Over a step, and where replicas wait for each other in each round of microbatches.

    The bounds lie just above the largest of 200 draws.
    """
    replicas, b = 8, 4
    sizes = dict(micro_batch_size=b, seq_length=1024, replicas=replicas, attention_cost=cost)
    for seed in range(100):
        lengths = np.random.default_rng(seed).integers(20, 1024, replicas * b * per_replica)
        plan = plan_step(lengths, packing=packing, **sizes)
        if packing == "sort":
            rows = np.array([lengths[held].max() for held in plan])
            work = rows + cost * rows**2
        else:
            work = np.array([(lengths[held] + cost * lengths[held] ** 2).sum() for held in plan])
        work = work.reshape(-1, replicas)
        assert work.sum(0).max() <= over_step * work.sum(0).mean()
        assert work.max(1).sum() <= over_rounds * work.mean(1).sum()


def test_pack_where_no_sample_is_usable():
    plan = plan_step(
        np.array([-1, 0, -7]), packing="pack", micro_batch_size=1, seq_length=8, replicas=2, rounds=2
    )
    assert plan == [[], [], [], []]
