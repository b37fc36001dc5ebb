"""What a replica computes in a step, from known lengths, from their mean, or from the longest rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_evomoe.config import from_mapping
from megatron_evomoe.data.packing import plan_step
from megatron_evomoe.model import inventory
from megatron_evomoe.plan.flops import flops
from megatron_evomoe.plan.work import (
    SampleLengths,
    Work,
    attention_cost,
    full_microbatch,
    sequences_of,
    step_work,
)

SEQ, WORLD, G = 256, 4, 64


def config_of(packing: str, static: bool = False, **data):
    return from_mapping(
        {
            "language": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}
            | {"vocab_size": 64},
            "data": {"seq_length": SEQ, "packing": packing, "pad_to_seq_length": static, **data},
            "train": {"micro_batch_size": 2, "global_batch_size": G},
        }
    )


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("packing", ["none", "sort", "pack"])
def test_the_longest_samples_fill_the_same_rows_with_every_packing(packing, static):
    config = config_of(packing, static)
    m = G // WORLD // 2
    wanted = Work(microbatches=m, positions=2 * m * SEQ, squares=2 * m * SEQ**2, images=2 * m)
    assert step_work(config, "warmup", WORLD) == wanted
    assert step_work(config, "warmup", WORLD, SampleLengths(known=np.full(100, SEQ))) == (wanted)
    one = full_microbatch(config)
    assert (one.positions * m, one.squares * m) == (wanted.positions, wanted.squares)


def test_a_mean_length():
    """64 samples of 100 positions on 4 replicas; rows of 2 x 256 positions take 5 of them."""
    lengths = SampleLengths(mean=100)
    rows = Work(microbatches=8, positions=1600, squares=16 * 100**2, images=16)
    assert step_work(config_of("none"), "warmup", WORLD, lengths) == rows
    assert step_work(config_of("sort"), "warmup", WORLD, lengths) == rows
    static = step_work(config_of("none", static=True), "warmup", WORLD, lengths)
    assert static == step_work(config_of("none"), "warmup", WORLD)
    # 6400 positions are 12.5 rows, so 13, and with a multiple of four 16
    packed = step_work(config_of("pack"), "warmup", WORLD, lengths)
    assert packed == Work(microbatches=4, positions=1600, squares=16 * 100**2, images=16)
    padded = step_work(config_of("pack", static=True), "warmup", WORLD, lengths)
    assert (padded.microbatches, padded.positions) == (4, 4 * 512)
    assert padded.squares == 16 * 100**2 + 4 * 112**2
    in_eights = step_work(config_of("pack", packing_replicas=24), "warmup", WORLD, lengths)
    assert (in_eights.microbatches, in_eights.positions) == (6, 1600)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("packing", ["none", "sort", "pack"])
@given(lengths=st.lists(st.integers(0, SEQ), min_size=G, max_size=G), multiple=st.sampled_from([1, 16]))
def test_sequences_hold_the_samples_and_fill_the_rows(packing, static, lengths, multiple):
    lengths = np.array(lengths)
    options = dict(packing=packing, micro_batch_size=2, seq_length=SEQ, multiple=multiple)
    plan = plan_step(lengths, replicas=1, **options)
    sequences = sequences_of([lengths[held] for held in plan], static=static, **options)
    positions = np.array([rows.sum() for rows in sequences])
    assert all(n >= lengths[held].sum() for n, held in zip(positions, plan, strict=True))
    assert not (positions % multiple).any()
    if static:
        assert set(positions) == {2 * SEQ}
    elif packing == "pack":
        assert all(n < lengths[held].sum() + multiple for n, held in zip(positions, plan, strict=True))
    elif packing == "none":
        assert set(positions) == {2 * -(-lengths.max() // multiple) * multiple}
    else:
        # each pair of rows is as long as its longer sample
        assert positions.sum() == 2 * sum(-(-n // multiple) * multiple for n in np.sort(lengths)[1::2])


def test_known_lengths_show_what_packing_saves():
    """Rows of 50 or 250 positions: `none` computes 250 for each, `sort` and `pack` what there is."""
    known = np.tile([50, 250], 50)
    positions = {
        packing: step_work(config_of(packing), "warmup", WORLD, SampleLengths(known=known)).positions
        for packing in ("none", "sort", "pack")
    }
    assert positions["none"] == 16 * 250
    # the mean of 8 steps of 64 draws each is within 10 % of the expectation; the slowest replica has more
    assert 16 * 150 * 0.9 < positions["pack"] < 16 * 150 * 1.15
    assert positions["pack"] <= positions["sort"] < positions["none"]


def test_samples_that_are_left_out_are_no_work():
    known = np.array([SEQ + 1, -3, 0, 100])
    assert SampleLengths(known=known).usable(SEQ, "skip").tolist() == [0, 0, 0, 100]
    assert SampleLengths(known=known).usable(SEQ, "truncate").tolist() == [SEQ, 0, 0, 100]


@pytest.mark.parametrize("kind", ["warmup", "route"])
def test_attention_cost_is_that_of_the_flops(kind):
    """The same quotient from the FLOP of a forward without images."""
    config = config_of("none")

    def forward(positions: int, squares: int) -> float:
        return flops(config, kind, 0, Work(microbatches=1, positions=positions, squares=squares, images=0))[0]

    per_pair, per_position = forward(0, 1), forward(1, 0)
    # `flops` counts half of the router's weights that serve one modality alone
    tolerance = 1e-12 if kind == "warmup" else 0.3
    assert attention_cost(config, kind) == pytest.approx(per_pair / per_position, rel=tolerance)


def test_attention_cost_is_the_same_in_every_layout():
    """The vocabulary is padded for 4 TP ranks, and the plan of a step does not change."""
    config = config_of("pack")
    config = replace(config, language=replace(config.language, make_vocab_size_divisible_by=48))
    split = replace(
        config,
        parallel=replace(
            config.parallel,
            tensor_model_parallel_size=4,
            pipeline_model_parallel_size=2,
            expert_model_parallel_size=2,
        ),
    )
    assert inventory.padded_vocab_size(split) > inventory.padded_vocab_size(config)
    assert attention_cost(split, "route") == attention_cost(config, "route")
