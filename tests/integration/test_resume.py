"""Differences between run and checkpoint that a resume, or a new stage, refuses, reports or ignores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import metrics, run

STAGES = [{"name": "warmup"}]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny_yaml) -> Path:
    """A run of one stage of 6 steps that was told to end after step 4."""
    folder = tmp_path_factory.mktemp("begun")
    tiny_yaml(folder, stages=STAGES, data={"eval_data": []}, optimizer={"lr": 1e-3, "min_lr": 1e-5})
    resume(folder, "--exit-interval", "4")
    return folder


@pytest.fixture
def copy(begun, tmp_path) -> Path:
    """A copy of the run, whose configuration points to the copy."""
    shutil.copytree(begun / "run", tmp_path / "run")
    text = (begun / "run.yaml").read_text().replace(str(begun / "run"), str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path


def resume(folder: Path, *flags: str, expect: int = 0) -> str:
    """Resume and return what the run printed."""
    done = run("train", "--config", str(folder / "run.yaml"), *flags, expect=expect)
    return done.stdout + done.stderr


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def rates(folder: Path) -> list[float]:
    return [line["learning-rate"] for line in metrics(folder / "run")]


def edit(folder: Path, section: str, **values: Any) -> None:
    raw = yaml.safe_load((folder / "run.yaml").read_text())
    raw[section] = values if section == "stages" else {**raw[section], **values}
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))


REFUSED = {
    "seed": ("train.seed", "1", "2"),
    "global_batch_size": ("train.global_batch_size", "8", "4"),
    "rotary_base": ("language.rotary_base", "10000", "5000"),
    "num_layers": ("language.num_layers", "2", "1"),
    "conversation_template": ("data.conversation_template", "v1", "plain"),
}


def test_what_must_equal_is_refused_before_anything_is_touched(copy):
    before = (copy / "run" / "metrics.jsonl").read_text()
    flags = [f"--{name.replace('_', '-')}={value}" for name, (_, _, value) in REFUSED.items()]
    text = resume(copy, *flags, "--moe-layer-freq=1", expect=2)
    for place, old, new in REFUSED.values():
        assert f"{place} was {old}, is now {new}" in text
    assert (
        "allow it on purpose with --allow-changed " in text
        and "rotary_base" in text.split("--allow-changed ")[1]
    )
    assert (copy / "run" / "metrics.jsonl").read_text() == before


def test_what_may_change_is_said_and_takes_effect(copy):
    text = resume(
        copy,
        "--lr",
        "0.002",
        "--adam-beta1",
        "0.5",
        "--micro-batch-size",
        "4",
        "--num-workers",
        "1",
        "--seed",
        "7",
        "--allow-changed",
        "seed",
    )
    (line,) = [x for x in text.splitlines() if "changed since the checkpoint" in x]
    for what in (
        "lr 0.001 → 0.002",
        "adam_beta1 0.9 → 0.5",
        "micro_batch_size 2 → 4",
        "seed 1 → 7",
        "max_lr 0.001 → 0.002",
    ):
        assert what in line, line
    assert "num_workers" not in line and "come again before it ends" in line
    (event,) = events(copy, "resume")
    assert event["changed"] == {
        "lr": [0.001, 0.002],
        "adam_beta1": [0.9, 0.5],
        "micro_batch_size": [2, 4],
        "seed": [1, 7],
    }


def test_a_resume_of_the_same_says_nothing(copy):
    assert "changed since the checkpoint" not in resume(copy)
    (event,) = events(copy, "resume")
    assert event["changed"] == {} and "notes" not in event


def test_more_steps_have_the_schedule_of_a_run_of_that_length(copy, tmp_path_factory, tiny_yaml):
    other = tmp_path_factory.mktemp("unbroken")
    tiny_yaml(
        other,
        stages=STAGES,
        data={"eval_data": []},
        optimizer={"lr": 1e-3, "min_lr": 1e-5},
        train={"train_iters": 12},
    )
    resume(other)
    text = resume(copy, "--train-iters", "12")
    assert "train_iters 6 → 12" in text and "lr_decay_steps 6 → 12" in text
    assert len(rates(copy)) == 12 and rates(copy)[4:] == rates(other)[4:] and min(rates(copy)[4:]) > 0


def test_fewer_steps_than_done_are_refused_and_as_many_end_the_stage(copy):
    assert "has done 4 steps, and train_iters is 3" in resume(copy, "--train-iters", "3", expect=2)
    resume(copy, "--train-iters", "4")
    assert len(rates(copy)) == 4
    assert json.loads((copy / "run" / "warmup" / "iter_0000004" / "evomoe.json").read_text())["finished"]


def test_the_checkpoints_schedule_goes_on_when_asked(copy):
    flag = "--use-checkpoint-opt_param-scheduler"
    assert "schedule ends at step 6, and steps 7 to 12 would train at its last rate" in resume(
        copy, flag, "--train-iters", "12", expect=2
    )
    assert "max_lr 0.001 (configuration: 0.5)" in resume(copy, flag, "--lr", "0.5")
    assert max(rates(copy)) <= 1e-3
    text = resume(copy, flag, "--override-opt-param-scheduler", expect=2)
    assert "contradict each other" in text


def test_a_finished_stage_goes_on_unless_others_began_from_its_end(copy):
    edit(copy, "train", train_iters=6)
    resume(copy)
    assert "goes on to train_iters 8" in resume(copy, "--train-iters", "8")
    assert len(rates(copy)) == 8 and rates(copy)[-1] > 0
    assert "already finished" in (text := resume(copy, "--train-iters", "6")) and "train_iters 8 → 6" in text
    raw = yaml.safe_load((copy / "run.yaml").read_text())
    raw["train"]["train_iters"] = 8
    raw["stages"].append({"name": "more", "kind": "dense", "train_iters": 2})
    (copy / "run.yaml").write_text(yaml.safe_dump(raw))
    assert "stage more: begins from" in resume(copy)
    raw["train"]["train_iters"] = 9
    (copy / "run.yaml").write_text(yaml.safe_dump(raw))
    assert "and more began from its end: they would not have its further steps" in resume(copy, expect=2)
    text = resume(copy, "--allow-changed", "train_iters")
    assert "more began from step 8 of it and will not follow" in text
    assert "it began from step 8 of warmup, which is at step 9 now" in text


def test_changed_data_is_refused_by_name_or_allowed_with_its_meaning(digits, tiny_yaml, tmp_path):
    from megatron_evomoe.data.shards import ShardDataset, write_shards

    samples = ShardDataset(str(digits / "instruct"))
    pairs = [(samples.record(i), samples.images(i)) for i in range(40)]
    write_shards(pairs, tmp_path / "a", 20)
    write_shards(pairs[:10] + pairs[11:], tmp_path / "b", 20)
    tiny_yaml(tmp_path, stages=STAGES, data={"train_data": [str(tmp_path / "a")], "eval_data": []})
    resume(tmp_path, "--exit-interval", "4")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
    other = f"--train-data=[{tmp_path / 'b'}]"
    text = run("train", "--config", str(tmp_path / "run.yaml"), other, processes=2, expect=1).stderr
    assert "was trained on other data (40 samples in 2 shards; now 39 in 2)" in text
    assert (
        "shard-000000.tar holds other contents in its 20 samples; shard-000001.tar holds 19 samples, 20 "
        "before" in text
    )
    assert "go on with --allow-changed-data" in text
    text = resume(tmp_path, f"--train-data=[{tmp_path / 'elsewhere'}]", "--exit-interval", "5")
    assert "train_data" in text and "other data" not in text
    text = resume(tmp_path, other, "--allow-changed-data")
    assert "position 40 lies in epoch 1 of 40 samples before, in epoch 1 of 39 now" in text
    assert (event := events(tmp_path, "resume")[-1])["notes"] and event["changed"]["train_data"][1] == [
        str(tmp_path / "b")
    ]


def test_a_beginning_stage_refuses_another_model_and_names_what_starts_fresh(begun, tiny_yaml, tmp_path):
    resumed = begun / "run" / "warmup" / "iter_0000004"
    tiny_yaml(
        tmp_path,
        stages=[{"name": "dense", "load": str(resumed)}, {"name": "route", "expert_init": "replicate"}],
        train={"train_iters": 2},
        data={"eval_data": []},
    )
    for flag, place in [
        ("--rotary-base=500", "language.rotary_base was 10000, is now 500"),
        ("--num-layers=1", "language.num_layers was 2, is now 1"),
        ("--vision-norm-epsilon=0.1", "vision.norm_epsilon was 1e-05, is now 0.1"),
    ]:
        text = resume(tmp_path, flag, "--moe-layer-freq=1", expect=2)
        assert f"from which stage 'dense' begins, holds another model: {place}" in text
    text = resume(tmp_path, "--num-layers=1", "--moe-layer-freq=1", "--allow-changed", "num_layers", expect=2)
    assert (
        "language_model.decoder.layers.1." in text
        and "no place for: it is smaller than the checkpoint's" in text
    )
    text = resume(tmp_path)
    assert (
        "stage route: begins from" in text
        and "starts fresh: language_model.decoder.layers.*.mlp.router." in text
    )
    assert any("mlp.router." in name for name in events(tmp_path, "begin")[1]["fresh"])
    assert events(begun, "begin")[0]["fresh"] == ["the whole model"]
