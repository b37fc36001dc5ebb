"""Figures of a step that do not depend on timing."""

from __future__ import annotations

import pytest
import torch

from megatron_evomoe.plan.flops import flops
from megatron_evomoe.plan.work import full_microbatch
from megatron_evomoe.train.built import build_stage
from megatron_evomoe.train.meter import flop_per_gpu
from megatron_evomoe.train.parameters import params_norm
from megatron_evomoe.train.step import StepResult
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("kind", ["warmup", "evolve", "route"])
def test_params_norm_is_of_every_weight_once(kind):
    """The norm counts every weight once; in other layouts, tests/distributed compares it."""
    config = tiny_config(kind)
    modules = build_stage(config.for_stage(kind), config.stages[0]).modules
    weights = torch.cat([p.detach().double().flatten() for p in modules[0].parameters()])
    assert params_norm(modules) == pytest.approx(float(weights.norm()), rel=1e-12)


def result_of(config, lengths: list[int], images: int) -> StepResult:
    """A step over sequences of these lengths."""
    return StepResult(
        loss=1.0,
        grad_norm=1.0,
        learning_rate=1e-3,
        supervised_tokens=1,
        tokens=sum(lengths),
        image_tokens=images * config.vision.tokens_per_image,
        microbatches=2,
        filled_microbatches=2,
        positions=sum(lengths),
        squares=sum(length**2 for length in lengths),
    )


def test_flop_per_gpu_leaves_recompute_out_and_splits_over_stages():
    plain = tiny_config("warmup")
    recomputing = tiny_config("warmup", train={"recompute_granularity": "full"})
    full = full_microbatch(plain)
    assert sum(flops(recomputing, "warmup", 0)) > sum(flops(plain, "warmup", 0))
    wanted = 2 * sum(flops(plain, "warmup", 0))  # two microbatches
    rows = [plain.data.seq_length] * (2 * full.images)
    step = result_of(plain, rows, len(rows))
    assert flop_per_gpu(recomputing, "warmup", step) == flop_per_gpu(plain, "warmup", step) == wanted
    assert flop_per_gpu(plain, "warmup", result_of(plain, rows[1:], len(rows))) < wanted
    assert flop_per_gpu(plain, "warmup", result_of(plain, rows, len(rows) - 1)) < wanted
    halved = tiny_config("warmup", parallel={"pipeline_model_parallel_size": 2})
    assert flop_per_gpu(halved, "warmup", step) == pytest.approx(wanted / 2)


@pytest.mark.parametrize("kind", ["warmup", "route"])
def test_flop_of_sequences_add_up(kind):
    """Sequences of different lengths cost what they would cost in steps of their own."""
    config, lengths = tiny_config(kind), [5, 64, 17, 17, 1]
    together = flop_per_gpu(config, kind, result_of(config, lengths, 3))
    apart = [flop_per_gpu(config, kind, result_of(config, [n], int(i < 3))) for i, n in enumerate(lengths)]
    assert together == pytest.approx(sum(apart), rel=1e-12)
    one_row = flop_per_gpu(config, kind, result_of(config, [sum(lengths)], 3))
    assert together < one_row  # no attention between sequences
