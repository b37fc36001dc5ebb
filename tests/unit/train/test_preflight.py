"""What a stage could not run with is reported before the first stage begins."""

from __future__ import annotations

import pytest

from megatron_evomoe.config import ConfigError
from megatron_evomoe.train import preflight
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        ("evolve", {"moe": {"evolution_rule": "dleta"}}, "unknown evolution_rule 'dleta'"),
        (
            "evolve",
            {"moe": {"evolution_beta": [[0.5, 0.6]]}},
            "evolution_beta has 1 ranges, but num_experts 4 evolves 3",
        ),
        ("evolve", {"moe": {"num_experts": 1}}, "leaves nothing to evolve"),
        ("route", {"moe": {"moe_token_dispatcher_type": "flex"}}, "flex sends tokens between ranks"),
        (
            "align",
            {"train": {"trainable": ["router"]}},
            "trainable names router, which a stage of kind align does not have",
        ),
        ("route", {"train": {"trainable": ["first_expert", "router"]}}, "trainable names first_expert"),
        (
            "align",
            {"train": {"profile": True, "profile_ranks": [0, 3]}},
            "profile_ranks names [3], and this run has ranks 0 to 0",
        ),
        ("align", {"train": {"global_batch_size": 3}}, "global_batch_size 3 is not a multiple"),
    ],
)
def test_refused_by_name(kind, sections, message):
    config = tiny_config(kind, **sections)
    with pytest.raises(ConfigError) as error:
        preflight.check_stage(config.for_stage(kind), kind, world_size=1)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["align", "warmup", "dense", "evolve", "route"])
@pytest.mark.parametrize("experts", [2, 4, 64])
def test_every_kind_of_stage_may_begin(kind, experts):
    config = tiny_config(kind, moe={"num_experts": experts})
    preflight.check_stage(config.for_stage(kind), kind, world_size=1)


def test_experts_are_the_language_models_where_they_are_not_apart():
    config = tiny_config("dense", train={"trainable": ["language", "experts"]})
    preflight.check_stage(config.for_stage("dense"), "dense", world_size=1)
