"""A stage kind compares and serialises as its plain string, and a token type as its number."""

import json

import pytest
import torch
import yaml

from megatron_evomoe.config import STAGE_KINDS, ConfigError, StageKind, TokenType, from_mapping
from megatron_evomoe.config.kinds import MIXTURE_KINDS


def test_a_stage_holds_a_kind_and_writes_its_plain_value():
    config = from_mapping({"stages": [{"name": "align"}, {"name": "last", "kind": "route"}]})
    assert [stage.kind for stage in config.stages] == [StageKind.ALIGN, StageKind.ROUTE]
    assert all(type(stage.kind) is StageKind for stage in config.stages)
    written = config.to_dict()["stages"][1]["kind"]
    assert type(written) is str and written == "route"
    assert yaml.safe_load(config.to_yaml())["stages"][1]["kind"] == "route"
    assert from_mapping(config.to_dict()) == config


@pytest.mark.parametrize("kind", StageKind)
def test_a_kind_is_its_string(kind):
    value = kind.value
    assert kind == value and {kind: 1}[value] == 1 and value in {kind}
    assert str(kind) == f"{kind}" == ", ".join([kind]) == value
    assert json.dumps({kind: kind}) == json.dumps({value: value})
    assert StageKind(value) is kind and value in STAGE_KINDS
    assert kind.has_mixture == (kind in MIXTURE_KINDS) == (value in ("evolve", "route"))


@pytest.mark.parametrize("kind", ["rout", 3, ["route"], None])
def test_another_kind_is_refused_with_the_known_ones(kind):
    with pytest.raises(
        ConfigError, match=r"stage 'x' has kind .*; known: align, warmup, dense, evolve, route"
    ):
        from_mapping({"stages": [{"name": "x", "kind": kind}]})


def test_token_types_are_numbers_in_tensors():
    types = torch.full((2,), TokenType.PADDING)
    assert types.dtype == torch.int64 and types.tolist() == [2, 2]
    assert torch.tensor([TokenType.TEXT, TokenType.VISION]).tolist() == [0, 1]
    assert json.dumps(list(TokenType)) == "[0, 1, 2]"
