"""The trainer, the plan and megatron-core's configuration share the rules for parallel degrees."""

from __future__ import annotations

import pytest

from megatron_evomoe.config import ConfigError, RunConfig, from_mapping
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.model.transformer_config import language_transformer_config
from megatron_evomoe.parallel import degrees
from megatron_evomoe.plan import layout

LAYERS, WORLD = 8, 4


def configured(pp: int, per_chunk: int | None) -> RunConfig:
    return from_mapping(
        {
            "language": {"num_layers": LAYERS},
            "parallel": {
                "pipeline_model_parallel_size": pp,
                "num_layers_per_virtual_pipeline_stage": per_chunk,
            },
            "train": {"global_batch_size": 16},
        }
    )


@pytest.mark.parametrize(
    ("pp", "per_chunk", "chunks"),
    [(1, None, None), (2, None, None), (2, 2, 2), (2, 1, 4), (4, 1, 2)],
)
def test_chunks_of_the_interleaved_schedule(pp, per_chunk, chunks):
    config = configured(pp, per_chunk)
    assert degrees.virtual_stages(config) == chunks
    assert language_transformer_config(config).virtual_pipeline_model_parallel_size == chunks
    degrees.validate(config, WORLD)
    layout.check(config, StageKind.WARMUP, WORLD)


@pytest.mark.parametrize(
    ("pp", "per_chunk"), [(1, 2), (1, 8), (2, 4), (2, 3), (4, 4)], ids=lambda value: str(value)
)
@pytest.mark.parametrize(
    "check",
    [
        lambda config: degrees.validate(config, WORLD),
        lambda config: layout.check(config, StageKind.WARMUP, WORLD),
        language_transformer_config,
    ],
    ids=["trainer", "plan", "megatron-core"],
)
def test_chunks_that_cannot_be_are_refused_everywhere(check, pp, per_chunk):
    message = (
        rf"num_layers_per_virtual_pipeline_stage {per_chunk} must split the {LAYERS // pp} layers of each of "
        f"{pp} pipeline stages"
    )
    with pytest.raises(ConfigError, match=message):
        check(configured(pp, per_chunk))
