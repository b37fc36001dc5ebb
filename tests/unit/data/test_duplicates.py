"""Samples of the same turns and pictures are found, whatever else their records say."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_evomoe.data import duplicates
from megatron_evomoe.data.duplicates import find_duplicates
from megatron_evomoe.data.shards import ShardDataset, write_shards

from .helpers import chat, jpeg

PICTURES = [jpeg(seed) for seed in range(3)]


@pytest.fixture
def fresh(tmp_path):
    """A function that gives a new folder at each call."""
    made = iter(range(10**6))
    return lambda: tmp_path / str(next(made))


def shards(drawn, folder):
    """A shard of samples, each given as the number of its answer and the numbers of its pictures."""
    records = [
        (
            {"id": i, "conversations": chat("<image>" * len(pictures) + "Which?", f"It is {answer}.")},
            [PICTURES[one] for one in pictures],
        )
        for i, (answer, pictures) in enumerate(drawn)
    ]
    write_shards(records, folder, samples_per_shard=4)
    return ShardDataset(folder)


SAMPLES = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=2)), min_size=1, max_size=12
)


def test_equal_samples_are_grouped(fresh):
    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(SAMPLES)
    def run(drawn):
        expected = defaultdict(list)
        for i, (answer, pictures) in enumerate(drawn):
            expected[answer, tuple(pictures)].append(i)
        found = find_duplicates(shards(drawn, fresh()))
        groups = [group for group in expected.values() if len(group) > 1]
        assert sorted(found.groups) == sorted(groups)
        assert [len(group) for group in found.groups] == sorted(map(len, groups), reverse=True)
        assert found.superfluous == sum(len(group) - 1 for group in groups)
        assert (found.compared, found.total, found.unread) == (len(drawn), len(drawn), 0)

    run()


def test_unusable_samples_are_like_no_other(fresh):
    dataset = shards([(0, [])] * 2, fresh())
    dataset.record = lambda i: (_ for _ in ()).throw(duplicates.SampleError("bad-json"))
    assert find_duplicates(dataset).groups == []


def test_limits_are_told(fresh, monkeypatch):
    dataset = shards([(0, [1])] * 6 + [(1, [2])] * 2, fresh())
    told = []
    found = find_duplicates(dataset, most=4, at=told.append)
    assert found.groups == [[0, 1, 2, 3]] and (found.compared, found.total) == (4, 8) and told[-1] == 4
    monkeypatch.setattr(duplicates, "_MOST_PICTURES", 1)
    assert find_duplicates(dataset).unread == 8 and find_duplicates(dataset).groups == []
