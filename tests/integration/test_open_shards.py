"""Ranks open shards together: the index is made once, and a shard that cannot be read ends all ranks."""

from __future__ import annotations

import pytest

from megatron_evomoe.data.shards import ShardDataset, write_shards
from tests.runs import run


@pytest.fixture
def shards(digits, tmp_path):
    """Twenty shards of two samples, without tables and indexes."""
    source = ShardDataset(str(digits / "captions"))
    raws = [source.read(i) for i in range(40)]
    write_shards([(raw.record, raw.images) for raw in raws], tmp_path / "shards", samples_per_shard=2)
    for path in (tmp_path / "shards").glob(".*"):
        path.unlink()
    return tmp_path / "shards"


def train(tiny_yaml, folder, shards, *, parallel, expect=0):
    path = tiny_yaml(
        folder,
        stages=[{"name": "align", "train_iters": 1, "conversation_template": "plain"}],
        data={"train_data": [str(shards)], "eval_data": []},
        parallel=parallel,
        log={},
    )
    done = run("train", "--config", str(path), processes=2, expect=expect)
    return done.stdout + done.stderr


@pytest.mark.parametrize("parallel", [{}, {"tensor_model_parallel_size": 2}])
def test_two_ranks(tiny_yaml, tmp_path, shards, parallel):
    for _ in range(2):
        train(tiny_yaml, tmp_path, shards, parallel=parallel)
    hidden = sorted(p.suffix for p in shards.glob(".*"))
    assert hidden == [".evomoe-index"] * 20 + [".evomoe-set"], "and no plan, part or claim is left"


@pytest.mark.parametrize("parallel", [{}, {"tensor_model_parallel_size": 2}])
def test_a_shard_that_cannot_be_read_ends_all_ranks(tiny_yaml, tmp_path, shards, parallel):
    (shards / "shard-000013.tar").write_bytes(b"no tar" * 500)
    text = train(tiny_yaml, tmp_path, shards, parallel=parallel, expect=1)
    assert "shard-000013.tar is not an uncompressed tar, or damaged" in text and "Traceback" not in text
