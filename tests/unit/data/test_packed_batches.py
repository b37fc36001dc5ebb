"""Sorted and packed microbatches hold the samples of their step, whole, and what was left out is counted."""

from __future__ import annotations

import itertools
import logging
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_evomoe.config import DataConfig
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.data.errors import DataError
from megatron_evomoe.data.image import ImageProcessor
from megatron_evomoe.data.lengths import open_lengths
from megatron_evomoe.data.shards import ShardDataset, write_shards

from .helpers import TOKENS_PER_IMAGE, chat, jpeg, loader, samples, take

SETTINGS = dict(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), max_examples=25
)
PACKINGS = ("none", "sort", "pack")
BAD = {
    "image-count": ({"conversations": chat("no marker")}, [jpeg()]),
    "corrupt-image": ({"conversations": chat()}, [jpeg()[:300]]),
    "too-long": ({"conversations": chat(" ".join(["How many are there of 3?"] * 100), "2")}, []),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """50 samples, three of them unusable for different reasons."""
    folder = tmp_path_factory.mktemp("mixed")
    good = samples(47)
    write_shards([*good[:10], *BAD.values(), *good[10:]], folder, samples_per_shard=20)
    return ShardDataset(folder)


def lengths_of(dataset, tokenizer, **config):
    return open_lengths(dataset, tokenizer, DataConfig(**config), TOKENS_PER_IMAGE, workers=1)


def steps_of(dataset, sp, count, *, replicas=1, packing, **kwargs):
    """The steps of each replica: [replica][step]."""
    lengths = None if packing == "none" else lengths_of(dataset, sp)
    loaders = [
        loader(
            dataset,
            sp,
            ImageProcessor(8),
            packing=packing,
            lengths=lengths,
            data_parallel_rank=rank,
            data_parallel_size=replicas,
            **kwargs,
        )
        for rank in range(replicas)
    ]
    return [take(one, count) for one in loaders]


def contents(micro):
    """Each sample of a microbatch: its tokens, labels, types, and images, as comparable values."""
    tokens, labels, types = (getattr(micro, n).tolist() for n in ("tokens", "labels", "token_types"))
    rows = list(zip(tokens, labels, types, strict=True))
    if micro.segments is not None:
        ends = list(itertools.accumulate(micro.segments))
        [row] = rows
        rows = [tuple(a[end - n : end] for a in row) for end, n in zip(ends, micro.segments, strict=True)]
    images, found = list(micro.images), []
    for tokens, labels, types in rows:
        kept = [i for i, kind in enumerate(types) if kind != TokenType.PADDING]
        assert kept == list(range(len(kept)))  # padding comes last
        assert all(label == IGNORE_INDEX for label in labels[len(kept) :])
        count = types.count(TokenType.VISION) // TOKENS_PER_IMAGE
        pictures, images = images[:count], images[count:]
        if kept:
            pixels = [bytes(picture.flatten().tolist()) for picture in pictures]
            found.append((tokens[: len(kept)], labels[: len(kept)], types[: len(kept)], pixels))
    assert not images
    return found


def step_contents(replicas, step):
    return sorted(itertools.chain(*(contents(m) for steps in replicas for m in steps[step].microbatches)))


def skipped(replicas, step):
    return sum((Counter(steps[step].skipped) for steps in replicas), Counter())


def stream(replicas):
    """The keys of each microbatch of each step, in the order of the plan."""
    return [
        [
            micro.keys
            for round_ in zip(*(step.microbatches for step in steps), strict=True)
            for micro in round_
        ]
        for steps in zip(*replicas, strict=True)
    ]


@settings(**SETTINGS)
@given(
    st.sampled_from(["sort", "pack"]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 8]),
    st.booleans(),
    st.sampled_from(["skip", "truncate"]),
)
def test_a_step_has_the_same_samples_in_every_packing(mixed, sp, packing, replicas, b, multiple, full, long):
    sizes = dict(micro_batch_size=b, global_batch_size=24, long_samples=long, replicas=replicas)
    padding = dict(pad_to_multiple_of=multiple, pad_to_seq_length=full)
    plain = steps_of(mixed, sp, 3, packing="none", **sizes)
    dealt = steps_of(mixed, sp, 3, packing=packing, **sizes, **padding)
    for step in range(3):  # the third passes the end of an epoch
        assert step_contents(plain, step) == step_contents(dealt, step)
        assert skipped(plain, step) == skipped(dealt, step)
        assert len({len(steps[step].microbatches) for steps in dealt}) == 1
    for micro in (m for steps in dealt for step in steps for m in step.microbatches):
        rows, positions = micro.tokens.shape
        assert positions % multiple == 0 and rows == (1 if packing == "pack" else b)
        if packing == "pack":
            assert sum(micro.segments) == positions <= b * 512 and min(micro.segments) > 0
        if full:
            assert positions == (b * 512 if packing == "pack" else 512)


@settings(**SETTINGS)
@given(
    st.sampled_from(PACKINGS),
    st.sampled_from(PACKINGS),
    st.sampled_from([(1, 0), (2, 1), (4, 2)]),
    st.integers(0, 3),
)
def test_a_resume_takes_the_same_samples(mixed, sp, before, after, layout, done):
    """At another data-parallel size, with other workers and another packing, in the middle of an epoch."""
    replicas, workers = layout
    sizes = dict(global_batch_size=16, packing_replicas=4, micro_batch_size=2)
    whole = stream(steps_of(mixed, sp, 5, packing=before, replicas=2, **sizes))
    resumed = stream(
        steps_of(
            mixed,
            sp,
            5 - done,
            packing=after,
            replicas=replicas,
            start_position=16 * done,
            workers=workers,
            **sizes,
        )
    )
    if before == after:
        assert [sorted(map(tuple, step)) for step in resumed] == [
            sorted(map(tuple, step)) for step in whole[done:]
        ]
    known = {mixed.key(i) for i in range(10, 13)}  # the unusable ones are in no packed microbatch
    for one, other in zip(resumed, whole[done:], strict=True):
        assert sorted(set(itertools.chain(*one)) - known) == sorted(set(itertools.chain(*other)) - known)


def test_a_bad_picture_leaves_its_segment(mixed, sp):
    [steps] = steps_of(mixed, sp, 1, packing="pack", shuffle=False, global_batch_size=13, micro_batch_size=4)
    [step] = steps
    key = mixed.key(11)
    [(micro, at)] = [(m, m.keys.index(key)) for m in step.microbatches if key in m.keys]
    start, end = sum(micro.segments[:at]), sum(micro.segments[: at + 1])
    assert end - start == int(lengths_of(mixed, sp)[[11]][0])
    assert set(micro.token_types[0, start:end].tolist()) == {TokenType.PADDING}
    assert step.skipped == dict.fromkeys(BAD, 1)


@pytest.mark.parametrize("packing", ["sort", "pack"])
def test_a_wrong_length_is_named_and_makes_no_wrong_row(mixed, sp, packing):
    class Wrong:
        path = "lengths-of-yesterday"

        def usable(self, samples, seq_length, long_samples):
            found = lengths_of(mixed, sp).usable(samples, seq_length, long_samples)
            return found + (samples == 3) - (samples == 4)

        def __getitem__(self, samples):
            return lengths_of(mixed, sp)[samples]

    train = loader(
        mixed, sp, ImageProcessor(8), packing=packing, lengths=Wrong(), shuffle=False, global_batch_size=10
    )
    [step] = take(train, 1)
    assert step.skipped == train.skipped == {"stale-length": 2} and train.read == 10
    [expected] = steps_of(mixed, sp, 1, packing="none", shuffle=False, global_batch_size=10)
    kept = {key for micro in expected[0].microbatches for key in micro.keys} - {mixed.key(3), mixed.key(4)}
    usable = sorted(content for m in expected[0].microbatches for content in contents(m))
    found = sorted(content for m in step.microbatches for content in contents(m))
    assert len(found) == len(kept) == 8 and all(content in usable for content in found)


def test_a_wrong_length_says_what_to_do(mixed, sp, caplog, tmp_path):
    write_shards(samples(4), tmp_path)
    dataset = ShardDataset(tmp_path)
    lengths = lengths_of(dataset, sp)
    write_shards([({"conversations": chat("How many?", "7 or 8")}, []), *samples(3)], tmp_path / "other")
    (tmp_path / "other" / "shard-000000.tar").replace(tmp_path / "shard-000000.tar")
    with caplog.at_level(logging.WARNING):
        train = loader(
            ShardDataset(tmp_path),
            sp,
            ImageProcessor(8),
            packing="pack",
            lengths=lengths,
            global_batch_size=4,
        )
        [step] = take(train, 1)
    assert step.skipped["stale-length"] >= 1
    lines = [r.getMessage() for r in caplog.records if "stale-length" in r.getMessage()]
    assert lines and all(str(lengths.path) in line and "delete that file" in line for line in lines)


@pytest.mark.parametrize("packing", ["sort", "pack"])
def test_samples_that_are_not_read_are_judged_too(tmp_path, sp, packing):
    write_shards([*samples(100), *[BAD["image-count"]] * 20], tmp_path)
    dataset = ShardDataset(tmp_path)
    train = loader(
        dataset,
        sp,
        ImageProcessor(8),
        packing=packing,
        lengths=lengths_of(dataset, sp),
        max_bad_sample_rate=0.05,
    )
    with pytest.raises(DataError, match=r"image-count: \d+.*repair or remove them"):
        take(train, 15)
    assert train.read == 104


def test_there_are_more_microbatches_than_samples(tmp_path, sp):
    write_shards([({"conversations": chat("1 + 1?", "2")}, [])] * 2, tmp_path)
    replicas = steps_of(
        ShardDataset(tmp_path),
        sp,
        1,
        packing="pack",
        replicas=2,
        rounds=2,
        global_batch_size=1,
        pad_to_multiple_of=16,
    )
    found = [micro for [step] in replicas for micro in step.microbatches]
    assert [len(step.microbatches) for [step] in replicas] == [2, 2]
    empty = [micro for micro in found if not micro.keys]
    assert len(empty) == 3
    for micro in empty:
        assert micro.tokens.shape == (1, 16) and micro.segments == (16,) and len(micro.images) == 0
        assert (micro.token_types == TokenType.PADDING).all() and (micro.labels == IGNORE_INDEX).all()
