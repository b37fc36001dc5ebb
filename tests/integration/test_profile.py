"""``--profile`` traces the requested steps with their phases and leaves the run otherwise unchanged."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from megatron_evomoe.config import ConfigError, from_mapping
from megatron_evomoe.observe import profile
from tests.runs import metrics, run

SAME = ("stage", "step", "lm loss", "grad-norm", "learning-rate", "supervised-tokens")
EVOLVE = [{"name": "evolve", "train_iters": 5}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_yaml) -> tuple[Path, Path]:
    """The run directories of one process, profiled in steps 2 and 3, and of one that is not profiled."""
    found = []
    for name, flags in (
        ("profiled", ["--profile", "--profile-step-start", "2", "--profile-step-end", "4"]),
        ("plain", []),
    ):
        path = tiny_yaml(tmp_path_factory.mktemp(name), stages=EVOLVE, data={"eval_data": []})
        run("train", "--config", str(path), *flags)
        found.append(path.parent / "run")
    return found[0], found[1]


def names_in(trace: Path) -> list[str]:
    with gzip.open(trace, "rt") as file:
        return [
            event.get("name", "")
            for event in json.load(file)["traceEvents"]
            if event.get("cat") == "user_annotation"
        ]


def test_the_trace_holds_the_phases_of_the_steps_asked_for(runs):
    names = names_in(runs[0] / "profile" / "evolve-rank0-steps2-3.json.gz")
    assert {n for n in names if re.fullmatch(r"step \d+", n)} == {"step 2", "step 3"}
    assert set(profile.PHASES) <= set(names)
    # a step has 8 samples in microbatches of 2 and one forward pass of the tower; one of the steps saves
    assert [names.count(n) for n in ("forward", "backward", "optimizer", "save")] == [10, 8, 2, 1]


def test_the_table_names_phases_and_operators(runs):
    text = (runs[0] / "profile" / "evolve-rank0-steps2-3.txt").read_text()
    assert all(
        re.search(rf"^{phase} +\d+ x +[\d.]+ ms a step$", text, re.MULTILINE) for phase in profile.PHASES
    )
    assert "aten::mm" in text and "Self CPU" in text


def test_metrics_are_those_of_a_run_without(runs):
    with_profile, without = ([{k: line[k] for k in SAME} for line in metrics(out)] for out in runs)
    assert with_profile == without and len(without) == 5
    assert not (runs[1] / "profile").exists()


def test_a_stage_that_never_gets_there_says_so(tmp_path, tiny_yaml):
    path = tiny_yaml(tmp_path, stages=[{"name": "warmup", "train_iters": 1}], data={"eval_data": []})
    done = run(
        "train", "--config", str(path), "--profile", "--profile-step-start", "2", "--profile-step-end", "4"
    )
    assert "took none of the steps 2 to 3" in done.stdout + done.stderr
    assert not (tmp_path / "run" / "profile").exists()


def test_pipeline_stages_are_profiled_where_asked(tmp_path, tiny_yaml):
    """With two chunks on each of two pipeline stages, one rank is profiled.

    Its trace also contains megatron-core's own ranges, for messages between stages.
    """
    path = tiny_yaml(
        tmp_path,
        stages=[{"name": "warmup", "train_iters": 3}],
        data={"eval_data": []},
        language={"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2},
        parallel={"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    )
    run(
        "train",
        "--config",
        str(path),
        "--profile",
        "--profile-step-start",
        "3",
        "--profile-step-end",
        "9",
        "--profile-ranks",
        "[1]",
        processes=2,
    )
    found = sorted(p.name for p in (tmp_path / "run" / "profile").iterdir())
    # the stage ends before the profiled window does
    assert found == ["warmup-rank1-steps3-3.json.gz", "warmup-rank1-steps3-3.txt"]
    names = names_in(tmp_path / "run" / "profile" / found[0])
    # four microbatches, each through two chunks
    assert names.count("forward") == names.count("backward") == 8 and names.count("forward-backward") == 1


def test_off_costs_nothing():
    assert profile.phase("forward") is profile.phase("backward") is profile._OFF
    profile.begin_step(1)


@pytest.mark.parametrize(("start", "end"), [(0, 2), (3, 3), (5, 4)])
def test_windows_without_a_step_are_refused(start, end):
    with pytest.raises(ConfigError, match=rf"profile_step_start (= )?{start}:? must be"):
        from_mapping({"train": {"profile": True, "profile_step_start": start, "profile_step_end": end}})
