"""All four stages through the command line on real shards: on one process, on two, and killed and resumed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests import programs
from tests.runs import metrics, run, steady

STAGES = ("align", "warmup", "evolve", "route")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tiny_yaml) -> Path:
    """A finished run of two processes with expert parallel size 2."""
    folder = tmp_path_factory.mktemp("two")
    path = tiny_yaml(folder, parallel={"expert_model_parallel_size": 2})
    run("train", "--config", str(path), processes=2)
    return folder


def test_every_stage_trains_saves_and_is_measured(two_ranks):
    out = two_ranks / "run"
    lines = metrics(out)
    assert [(x["stage"], x["step"]) for x in lines] == [
        (s, i + 1) for s in STAGES for i in range(2 if s == "align" else 6)
    ]
    summary = {row["stage"]: row for row in json.loads((out / "summary.json").read_text())}
    for stage in STAGES:
        assert (out / stage / "latest_checkpointed_iteration.txt").read_text() == (
            "2" if stage == "align" else "6"
        )
        assert 0 <= summary[stage]["accuracy"]["overall"] <= 1 and "blind" in summary[stage]
    assert summary["route"]["parameters"] > summary["route"]["active"] > summary["route"]["trainable"] > 0
    assert all(x["throughput"] > 0 for x in lines)
    warmup = [x["lm loss"] for x in lines if x["stage"] == "warmup"]
    assert warmup[-1] < warmup[0] - 0.1
    tables = [json.loads(line)["title"] for line in (out / "tables.jsonl").read_text().splitlines()]
    assert tables == ["Stages", "Held-out exact match by kind of question, %"]


def test_routing_is_measured(two_ranks):
    out = two_ranks / "run"
    route = [x for x in metrics(out) if x["stage"] == "route"]
    shares = [route[1][f"moe/share_vision/layer_1/expert_{e}"] for e in range(4)]
    assert sum(shares) == pytest.approx(1) and "load_balancing_loss" in route[1]
    # the loss E Σ F·G is 1 for an even split and at most 4 for a collapse
    assert 0.99 < route[1]["load_balancing_loss"] <= 4.0
    kinds = [json.loads(line)["kind"] for line in (out / "diagnostics.jsonl").read_text().splitlines()]
    assert kinds == ["shares", "logits", "similarity"]


def test_checkpoint_carries_its_lineage(two_ranks):
    record = json.loads((two_ranks / "run" / "route" / "iter_0000006" / "evomoe.json").read_text())
    assert [ancestor["stage"] for ancestor in record["lineage"]] == ["align", "warmup", "evolve"]
    assert (record["position"], record["finished"], record["num_experts"]) == (48, True, 4)
    assert (two_ranks / "run" / "route" / "iter_0000006" / "run_config.yaml").exists()


def test_finished_run_is_not_run_again_and_plots(two_ranks, tmp_path):
    before = (two_ranks / "run" / "metrics.jsonl").read_text()
    done = run("train", "--config", str(two_ranks / "run.yaml"), processes=2)
    assert "stage route: already finished" in done.stdout
    assert (two_ranks / "run" / "metrics.jsonl").read_text() == before
    run("plot", "--run", str(two_ranks / "run"), "--output", str(tmp_path))
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "expert_similarity.png",
        "loss.png",
        "modality_share.png",
        "router_logits.png",
    ]


def test_killed_in_every_stage_and_resumed_gives_the_same_bits(two_ranks, tiny_yaml, tmp_path):
    """Kill all processes once per stage; every later step must equal the unbroken run's to the last bit."""
    path = tiny_yaml(tmp_path, parallel={"expert_model_parallel_size": 2})
    out = tmp_path / "run"
    for stage in ("warmup", "evolve", "route"):
        _run_until(path, out, stage, step=3)
    run("train", "--config", str(path), processes=2)
    resumed, unbroken = metrics(out), metrics(two_ranks / "run")
    # Routing metrics are summed over the steps since the last logged line; the resume points are multiples of
    # the logging interval, 2, so no partial sum is lost.
    assert steady(resumed) == steady(unbroken)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in events if e["event"] == "resume"] == ["warmup", "evolve", "route"]


def _run_until(path: Path, out: Path, stage: str, step: int) -> None:
    """Start the job and kill all of its ranks as soon as `stage` has logged `step`."""
    log = path.with_name("log.txt")
    ranks = programs.start_ranks(2, "-m", "megatron_evomoe", "train", "--config", str(path), output=log)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not any(rank.poll() is not None for rank in ranks):
            file = out / "metrics.jsonl"
            lines = (
                [json.loads(x) for x in file.read_text().splitlines(keepends=True) if x.endswith("\n")]
                if file.exists()
                else []
            )
            if any(x["stage"] == stage and x["step"] >= step for x in lines):
                break
            time.sleep(0.02)
        ended = [rank.poll() for rank in ranks]
        assert ended == [None, None], (
            f"it ended before {stage} reached step {step}: {log.read_text()[-3000:]}"
        )
    finally:
        for rank in ranks:
            rank.kill()
    for rank in ranks:
        rank.wait()


def test_limits_end_a_run_saved_and_the_same_command_goes_on(two_ranks, tiny_yaml, tmp_path):
    path = tiny_yaml(
        tmp_path,
        parallel={"expert_model_parallel_size": 2},
        checkpoint={"save": str(tmp_path / "run"), "save_interval": 0},
    )
    first = run("train", "--config", str(path), "--exit-interval", "4", processes=2)
    assert "exiting on exit_interval 4; the same command goes on from here" in first.stdout
    assert metrics(tmp_path / "run")[-1]["step"] == 4
    assert (tmp_path / "run" / "warmup" / "latest_checkpointed_iteration.txt").read_text() == "4"
    second = run(
        "train", "--config", str(path), "--exit-duration-in-mins", "0.0001", "--stage", "warmup", processes=2
    )
    assert "exiting on the limit of 0.0001 minutes" in second.stdout
    run(
        "train",
        "--config",
        str(path),
        "--stage",
        "warmup",
        "--load",
        str(tmp_path / "run"),
        "--save",
        str(tmp_path / "other"),
        processes=2,
    )
    resumed = [x for x in metrics(tmp_path / "other") if x["stage"] == "warmup"]
    unbroken = [x for x in metrics(two_ranks / "run") if x["stage"] == "warmup"]
    assert steady(resumed) == steady(unbroken)[4:], "taken up from --load, in a folder of its own"


def test_baselines_run_from_a_dense_checkpoint(two_ranks, tiny_yaml, tmp_path):
    """MoE-LLaVA's setting (replicated experts and one linear router, both trained), and the dense control."""
    warmup = str(two_ranks / "run" / "warmup")
    path = tiny_yaml(
        tmp_path,
        stages=[
            {
                "name": "replicate-linear",
                "kind": "route",
                "load": warmup,
                "router": "linear",
                "expert_init": "replicate",
                "trainable": ["router", "experts"],
                "train_iters": 2,
            },
            {
                "name": "noise-modality",
                "kind": "route",
                "load": warmup,
                "router": "modality-linear",
                "expert_init": "noise",
                "train_iters": 2,
            },
            {"name": "dense", "load": warmup, "train_iters": 2},
        ],
    )
    run("train", "--config", str(path))
    rows = {r["stage"]: r for r in json.loads((tmp_path / "run" / "summary.json").read_text())}
    experts = 4 * 3 * 32 * 48
    assert rows["replicate-linear"]["trainable"] == experts + 4 * 32
    assert rows["noise-modality"]["trainable"] == 2 * 4 * 32
    assert rows["dense"]["active"] == rows["dense"]["parameters"]
