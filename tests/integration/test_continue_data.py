"""Which samples a run's stages see: orders of their own, or with `continue_data` one order over stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.config import load_config
from megatron_evomoe.data.order import ARGSORT, NAME, SampleOrder
from megatron_evomoe.data.shards import ShardDataset, write_shards
from tests.runs import run

BATCH = 8
STAGES = [
    {"name": "align", "train_iters": 3, "conversation_template": "plain"},
    {"name": "warmup", "train_iters": 2, "continue_data": True},
    {"name": "dense", "train_iters": 3, "continue_data": True},
]


@pytest.fixture(scope="module")
def shards(digits, tmp_path_factory) -> Path:
    """Twenty samples, so that three stages of 3, 2 and 3 steps of 8 samples take three epochs and a bit."""
    source = ShardDataset(str(digits / "captions"))
    folder = tmp_path_factory.mktemp("shards")
    raws = [source.read(i) for i in range(20)]
    write_shards([(raw.record, raw.images) for raw in raws], folder, samples_per_shard=10)
    return folder


def write(tiny_yaml, folder, shards, stages=STAGES, **data) -> Path:
    return tiny_yaml(
        folder, stages=stages, data={"train_data": [str(shards)], "eval_data": [], **data}, log={}
    )


def record_of(folder: Path, stage: str) -> records.Record:
    newest = max((folder / "run" / stage).glob("iter_*"))
    return records.read_unchecked(newest)


def seen(folder: Path) -> dict[str, list[int]]:
    """The samples that each stage has consumed, by what its newest checkpoint records."""
    found = {}
    for path in sorted((folder / "run").glob("*/")):
        if any(path.glob("iter_*")):
            record = record_of(folder, path.name)
            data = record.data
            order = SampleOrder(data["samples"], data["seed"], key=data.get("key", ""), name=data["order"])
            first = record.position - record.step * BATCH
            found[path.name] = order.indices(range(first, record.position)).tolist()
    return found


@pytest.fixture(scope="module")
def whole(tiny_yaml, shards, tmp_path_factory) -> Path:
    """The run of `STAGES` without a break."""
    folder = tmp_path_factory.mktemp("whole")
    run("train", "--config", str(write(tiny_yaml, folder, shards)))
    return folder


def lines(folder: Path) -> list[tuple]:
    found = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [(line["stage"], line["step"], line["lm loss"]) for line in found]


def test_one_order_over_the_stages(whole):
    found = seen(whole)
    stream = [i for stage in ("align", "warmup", "dense") for i in found[stage]]
    assert stream == SampleOrder(20, 1, key="align").indices(range(64)).tolist()
    assert [sorted(stream[e : e + 20]) for e in (0, 20, 40)] == [list(range(20))] * 3
    assert load_config(whole / "run.yaml").order_key("dense") == record_of(whole, "dense").data["key"]
    printed = (whole / "run" / "events.jsonl").read_text()
    assert '"begin"' in printed


def test_a_resume_inside_a_chain_is_exact_also_at_another_size(whole, tiny_yaml, shards, tmp_path):
    path = str(write(tiny_yaml, tmp_path, shards))
    for processes, steps in ((2, "1"), (0, "2"), (2, "1"), (0, None)):
        stop = ["--exit-interval", steps] if steps else []
        run("train", "--config", path, *stop, processes=processes)
    assert seen(tmp_path) == seen(whole)
    # two replicas sum in another order than one (tests/distributed/test_layouts.py has the bound)
    assert [line[:2] for line in lines(tmp_path)] == [line[:2] for line in lines(whole)]
    assert [line[2] for line in lines(tmp_path)] == pytest.approx(
        [line[2] for line in lines(whole)], rel=1e-5
    )


def test_load_goes_on_in_the_data_of_another_run(whole, tiny_yaml, shards, tmp_path):
    source = max((whole / "run" / "align").glob("iter_*"))
    stages = [{"name": "warmup", "train_iters": 2, "continue_data": True, "load": str(source)}]
    path = write(tiny_yaml, tmp_path, shards, stages)
    run("train", "--config", str(path))
    assert seen(tmp_path)["warmup"] == seen(whole)["warmup"]
    other = tmp_path / "resumed"
    other.mkdir()
    more = [{**stages[0], "train_iters": 3}]
    run("train", "--config", str(write(tiny_yaml, other, shards, more)), "--load", str(tmp_path / "run"))
    assert seen(other)["warmup"][:16] == seen(whole)["warmup"]
    assert record_of(other, "warmup").position == 24 + 24


def test_stages_have_orders_of_their_own_by_default(tiny_yaml, shards, tmp_path):
    stages = [{k: v for k, v in stage.items() if k != "continue_data"} for stage in STAGES]
    run("train", "--config", str(write(tiny_yaml, tmp_path, shards, stages)))
    found = seen(tmp_path)
    assert found["align"][:16] != found["warmup"] != found["dense"][:16]
    assert {record_of(tmp_path, name).position for name in ("align", "warmup")} == {24, 16}
    assert {record_of(tmp_path, name).data["order"] for name in found} == {NAME}


def test_a_run_of_the_earlier_order_keeps_it(tiny_yaml, shards, tmp_path):
    """A checkpoint with the former rule: its stage resumes in it, and the next stage of the run takes it."""
    stages = [{k: v for k, v in stage.items() if k != "continue_data"} for stage in STAGES[:2]]
    path = write(tiny_yaml, tmp_path, shards, stages)
    run("train", "--config", str(path), "--exit-interval", "2")
    checkpoint = max((tmp_path / "run" / "align").glob("iter_*"))
    record = records.read(checkpoint)
    record.data = {k: v for k, v in record.data.items() if k != "key"} | {"order": ARGSORT}
    record.write(checkpoint)
    run("train", "--config", str(path))
    order = SampleOrder(20, 1, name=ARGSORT)
    for stage, count in (("align", 24), ("warmup", 16)):
        data = record_of(tmp_path, stage).data
        assert data["order"] == ARGSORT and "key" not in data
        assert seen(tmp_path)[stage] == order.indices(range(count)).tolist()


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({}, ["--allow-changed", "seed"], "took its samples with seed 1, not 2"),
        ({"train_data": "other"}, [], "was trained on other data: shard-000001.tar (10 samples) is gone"),
    ],
)
def test_a_stage_does_not_go_on_in_other_data(whole, tiny_yaml, shards, tmp_path, change, flags, message):
    source = max((whole / "run" / "align").glob("iter_*"))
    stages = [{"name": "warmup", "train_iters": 2, "continue_data": True, "load": str(source)}]
    data = {"train_data": [str(shards / "shard-000000.tar")]} if change else {}
    path = write(tiny_yaml, tmp_path, shards, stages, **data)
    if not change:
        raw = yaml.safe_load(path.read_text())
        raw["train"]["seed"] = 2
        path.write_text(yaml.safe_dump(raw))
    done = run("train", "--config", str(path), *flags, expect=2)
    text = done.stdout + done.stderr
    assert message in text and "leave continue_data out" in text
