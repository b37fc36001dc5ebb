"""Figures of a step that do not depend on timing."""

from __future__ import annotations

import pytest
import torch

from megatron_evomoe.plan.flops import flops
from megatron_evomoe.train.built import build_stage
from megatron_evomoe.train.meter import flop_per_gpu
from megatron_evomoe.train.parameters import params_norm
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("kind", ["warmup", "evolve", "route"])
def test_params_norm_is_of_every_weight_once(kind):
    """The norm counts every weight once; in other layouts, tests/distributed compares it."""
    config = tiny_config(kind)
    modules = build_stage(config.for_stage(kind), config.stages[0]).modules
    weights = torch.cat([p.detach().double().flatten() for p in modules[0].parameters()])
    assert params_norm(modules) == pytest.approx(float(weights.norm()), rel=1e-12)


def test_flop_per_gpu_leaves_recompute_out_and_splits_over_stages():
    plain = tiny_config("warmup")
    recomputing = tiny_config("warmup", train={"recompute_granularity": "full"})
    assert sum(flops(recomputing, "warmup", 0, 64)) > sum(flops(plain, "warmup", 0, 64))
    wanted = 2 * sum(flops(plain, "warmup", 0, 64))  # two microbatches
    assert flop_per_gpu(recomputing, "warmup", 64) == flop_per_gpu(plain, "warmup", 64) == wanted
    assert flop_per_gpu(plain, "warmup", 32) < wanted
    halved = tiny_config("warmup", parallel={"pipeline_model_parallel_size": 2})
    assert flop_per_gpu(halved, "warmup", 64) == pytest.approx(wanted / 2)
