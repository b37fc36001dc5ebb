"""Bytes of states by hand; tests/distributed/test_plan.py compares real runs."""

from __future__ import annotations

import pytest

from megatron_evomoe.config import from_mapping
from megatron_evomoe.plan.states import states_of

EXPERT = 3 * 2048 * 5504
LANGUAGE, PROJECTOR = 1_836_828_672, 1024 * 2048 + 2048 + 2048 * 2048 + 2048
TOWER = 290_909_184


def qwen(kind: str, world: int, parallel: dict | None = None, train: dict | None = None, **where):
    config = from_mapping(
        {"preset": "qwen-1.8b", "parallel": parallel or {}, "train": {"bf16": True, **(train or {})}}
    )
    return states_of(config, kind, world_size=world, **{"pp_rank": 0, **where})


def test_bf16_keeps_two_moments_and_a_master_copy():
    s = qwen("warmup", 1, {"use_distributed_optimizer": False})
    trained = LANGUAGE + PROJECTOR
    assert s.parameter_bytes == 2 * (trained + TOWER)
    assert s.gradient_bytes == 4 * trained and s.optimizer_bytes == 12 * trained


def test_fp32_has_no_master_copy():
    s = qwen("warmup", 1, {"use_distributed_optimizer": False}, {"bf16": False})
    assert s.parameter_bytes == 4 * (LANGUAGE + PROJECTOR + TOWER) and s.optimizer_bytes == 8 * (
        LANGUAGE + PROJECTOR
    )


def test_the_distributed_optimizer_divides_by_the_replicas():
    s = qwen("warmup", 16)
    # The tolerance is for padding.
    assert s.optimizer_bytes == pytest.approx(12 * (LANGUAGE + PROJECTOR) / 16, rel=1e-6)
    assert s.gradient_bytes == pytest.approx(4 * (LANGUAGE + PROJECTOR), rel=1e-6)


def test_frozen_parameters_have_neither():
    s = qwen("align", 1, {"use_distributed_optimizer": False})
    assert (
        s.trainable == PROJECTOR and s.gradient_bytes == 4 * PROJECTOR and s.optimizer_bytes == 12 * PROJECTOR
    )


def test_trained_experts_are_sharded_over_fewer_ranks():
    """With EP 4 on 8 ranks, two ranks share each expert's optimizer state.

    Each rank holds one expert per mixture. All other states are sharded over 8 ranks.
    """
    train = {"trainable": ["language", "projector"]}
    s = qwen("route", 8, {"expert_model_parallel_size": 4}, train)
    router = s.trainable - (LANGUAGE + PROJECTOR)
    assert router == 12 * (2 * (16 * 2048 + 16 + 17 * 48 * 2048) + 4 * 2048)
    dense = LANGUAGE - 12 * EXPERT + PROJECTOR + router
    assert s.expert_reduced == pytest.approx(12 * EXPERT, rel=1e-6) and s.dense_reduced == pytest.approx(
        dense, rel=1e-5
    )
    assert s.optimizer_bytes == pytest.approx(12 * (dense / 8 + 12 * EXPERT / 2), rel=1e-5)


@pytest.mark.parametrize(
    ("world", "dp_rank", "kept"), [(1, None, 3), (2, 0, 2), (2, 1, 1), (8, 0, 1), (8, 3, 0)]
)
@pytest.mark.parametrize(("rule", "previous"), [("delta", 2), ("ema", 0)])
def test_evolved_experts_are_dealt_over_replicas(world, dp_rank, kept, rule, previous):
    """Evolved experts are distributed over the data-parallel replicas.

    Experts 2…4 of 12 layers are kept in fp32. `delta` also keeps expert 1 of the last step in bf16 on each
    rank that has any of them.
    """
    config = from_mapping({"preset": "qwen-1.8b", "train": {"bf16": True}, "moe": {"evolution_rule": rule}})
    s = states_of(config, "evolve", world_size=world, pp_rank=0, dp_rank=dp_rank)
    assert s.evolution_bytes == 12 * EXPERT * (4 * kept + (previous if kept else 0))
