"""A change of the training data is described, and its effect on a resume is counted.

The counts are checked against the samples themselves.
"""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_evomoe.data.changed import differences, meaning
from megatron_evomoe.data.order import ARGSORT, SampleOrder

ORDERS = [
    *({"seed": seed, "name": ARGSORT} for seed in range(2)),
    *({"seed": seed, "key": key} for seed in range(2) for key in "ab"),
]
SHARDS = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 9)), min_size=1, max_size=5)


def contents(shards: list[tuple[str, int]]) -> list[tuple[str, int, str]]:
    """Shards as (name, size, digest): letter and size give the digest, the letter gives the name."""
    return [(f"{letter}.tar", count, f"{letter}{count}") for letter, count in shards]


def samples(shards: list[tuple[str, int, str]]) -> list[tuple[str, int, int]]:
    """Identity of each sample: its shard's digest, the number among equal digests, and its place."""
    seen: dict[str, int] = {}
    found = []
    for _, count, digest in shards:
        seen[digest] = seen.get(digest, 0) + 1
        found += [(digest, seen[digest], i) for i in range(count)]
    return found


@settings(derandomize=True, deadline=None, max_examples=200)
@given(SHARDS, SHARDS)
def test_any_difference_is_named_and_none_is_made_up(one, other):
    before, now = contents(one), contents(other)
    found = differences(before, now)
    assert bool(found) == ([d for *_, d in before] != [d for *_, d in now])
    assert (
        differences(before, before)
        == []
        == differences(before, [(f"x{name}", n, d) for name, n, d in before])
    )
    if found and sorted(before) == sorted(now):
        assert found == [f"the same {len(now)} shards in another order"]
    gone = [s for s in before if s[2] not in {d for *_, d in now}]
    if gone and len(found) <= 3:
        assert all(any(name in text for text in found) for name, *_ in gone)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(SHARDS, SHARDS, st.sampled_from(ORDERS), st.sampled_from(ORDERS), st.integers(0, 60))
def test_repeated_and_lost_samples_are_counted_exactly(one, other, old_rule, new_rule, position):
    before, now = contents(one), contents(other)
    old, new = SampleOrder(len(samples(before)), **old_rule), SampleOrder(len(samples(now)), **new_rule)
    text = meaning(before, old, now, new, position)
    start = old.epoch(position) * old.num_samples
    seen = {samples(before)[old.index(p)] for p in range(start, position)}
    unseen = set(samples(before)) - seen
    end = (new.epoch(position) + 1) * new.num_samples
    coming = {samples(now)[new.index(p)] for p in range(position, end)}
    repeat, lost, unknown = map(
        int, re.search(r"shards, (\d+) that .* and (\d+) that .* not .*; (\d+) samples lie", text).groups()
    )
    assert repeat == len(coming & seen)
    assert lost == len((unseen & set(samples(now))) - coming)
    assert unknown == len(set(samples(now)) - set(samples(before)))
    assert f"epoch {old.epoch(position)} of {old.num_samples} samples before" in text


def test_one_sample_fewer_in_the_first_shard_is_told():
    before = [("a.tar", 1000, "1"), ("b.tar", 1000, "2")]
    now = [("a.tar", 999, "3"), ("b.tar", 1000, "2")]
    assert differences(before, now) == ["a.tar holds 999 samples, 1000 before"]
    assert differences(before, before[::-1]) == ["the same 2 shards in another order"]
    assert differences(before, [("a.tar", 1000, "9"), before[1]]) == [
        "a.tar holds other contents in its 1000 samples"
    ]
    assert differences(before, before[:1]) == ["b.tar (1000 samples) is gone"]
    assert differences(before, [*before, ("c.tar", 5, "5")]) == ["c.tar (5 samples) is new"]
    many = [(f"{i}.tar", 1, str(i)) for i in range(9)]
    assert differences(many, [(name, n, f"x{d}") for name, n, d in many])[-1] == "6 more shards differ"
