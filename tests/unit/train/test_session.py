"""Settings that all stages of a run share are refused where a stage differs."""

from __future__ import annotations

import pytest

from megatron_evomoe.config import ConfigError, from_mapping
from megatron_evomoe.data.tokenizer import train_sentencepiece
from megatron_evomoe.train.session import prepare_config


def test_a_stage_has_no_tokenizer_of_its_own(tmp_path):
    paths = [
        str(train_sentencepiece(["a line of words"] * 5, tmp_path / f"{i}.model", 300)) for i in range(2)
    ]
    other = [{"name": "align"}, {"name": "warmup", "tokenizer": paths[1]}]
    config = from_mapping({"data": {"tokenizer": paths[0]}, "stages": other})
    with pytest.raises(ConfigError, match=r"stage 'warmup' names tokenizer .*1\.model, the run .*0\.model"):
        prepare_config(config)
    same = from_mapping(
        {"data": {"tokenizer": paths[0]}, "stages": [{"name": "align", "tokenizer": paths[0]}]}
    )
    assert prepare_config(same)[0].language.vocab_size == prepare_config(same)[1].vocab_size
