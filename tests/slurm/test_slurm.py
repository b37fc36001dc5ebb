"""The batch script on a real Slurm of two nodes with one process each.

Tested are the time limit, requeueing, cancelling, and a chain of stages.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.integration.test_stages import steady
from tests.programs import ROOT
from tests.runs import metrics, run
from tests.slurm.conftest import Cluster, wait_for

pytestmark = pytest.mark.slow

BATCH = str(ROOT / "examples" / "slurm" / "evomoe_llava.sbatch")
CHAIN = str(ROOT / "examples" / "slurm" / "submit_stages.sh")
STEPS = 80  # enough for a signal sent at step 10 to arrive before the last step
STAGES = ("align", "warmup", "evolve", "route")


@pytest.fixture(scope="module")
def configuration(tiny_yaml) -> Callable[[Path], Path]:
    """A function that writes a configuration of four stages, saved only at their ends and on a signal."""

    def write(folder: Path) -> Path:
        return tiny_yaml(
            folder,
            data={"eval_data": []},
            train={"global_batch_size": 4},
            checkpoint={"save_interval": 0},
            log={"moe_metrics_interval": 1, "wandb_project": "test"},
            stages=[
                {"name": "align", "train_iters": 2},
                {"name": "warmup", "train_iters": STEPS},
                {"name": "evolve", "train_iters": STEPS},
                {"name": "route", "train_iters": 6},
            ],
        )

    return write


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, configuration) -> list[dict]:
    """The metric lines of the same run without Slurm and without interruption."""
    folder = tmp_path_factory.mktemp("unbroken")
    run("train", "--config", str(configuration(folder)), processes=2)
    return steady(metrics(folder / "run"))


def submit(cluster: Cluster, config: Path, *train_flags: str, **extra: str) -> str:
    """Submit the batch script for both nodes; returns the job's number."""
    return cluster(
        "sbatch",
        "--parsable",
        "--nodes=2",
        f"--output={config.parent}/%j.out",
        BATCH,
        "--config",
        str(config),
        *train_flags,
        **extra,
    )


def printed(config: Path, job: str) -> str:
    """The output of the job so far, from all its starts."""
    file = config.parent / f"{job}.out"
    return file.read_text() if file.exists() else ""


def reach(config: Path, stage: str, step: int) -> None:
    """Wait until `stage` has logged `step`."""
    file = config.parent / "run" / "metrics.jsonl"

    def reached() -> bool:
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        logged = [json.loads(x) for x in lines if x.endswith("\n")]
        return any(x["stage"] == stage and x["step"] >= step for x in logged)

    wait_for(reached, f"step {step} of {stage}")


def events(config: Path, name: str) -> list[dict]:
    """The run's events of the given name."""
    lines = [json.loads(line) for line in (config.parent / "run" / "events.jsonl").read_text().splitlines()]
    return [x for x in lines if x["event"] == name]


def wandb_ids(config: Path) -> list[str]:
    """The wandb ids of all starts of the run."""
    return [p.name.rsplit("-", 1)[1] for p in sorted((config.parent / "run" / "wandb").glob("offline-run-*"))]


def first_rank(config: Path) -> psutil.Process:
    """The process that trains as rank 0."""
    for process in psutil.process_iter(["cmdline"]):
        argv = process.info["cmdline"] or []
        # torchrun's own command line has these flags too, and so may a helper process
        if (
            str(config) in argv
            and "torch.distributed.run" not in argv
            and process.environ().get("RANK") == "0"
        ):
            return process
    raise AssertionError(f"nothing trains {config}")


def test_time_limit_and_requeue_leave_no_trace_in_the_metrics(cluster, configuration, unbroken, tmp_path):
    """The run is interrupted by the time limit in `warmup` and by `scontrol requeue` in `evolve`.

    Slurm restarts the job both times, and the metrics equal those of the uninterrupted run.
    """
    config = configuration(tmp_path)
    job = submit(cluster, config)
    reach(config, "warmup", 10)
    # Slurm checks time limits only twice a minute, so the run is suspended until then
    rank = first_rank(config)
    rank.suspend()
    # the script asks for its signal 300 s before the limit, so a limit of four minutes makes it due at once
    cluster("scontrol", "update", f"JobId={job}", "TimeLimit=4")
    wait_for(
        lambda: "USR1: the time limit is near" in printed(config, job), "the signal before the time limit"
    )
    cluster("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    rank.resume()

    reach(config, "evolve", 10)
    cluster("scontrol", "requeue", job)
    record = cluster.wait(job)

    text = printed(config, job)
    assert (record["JobState"], record["Restarts"], record["ExitCode"]) == ("COMPLETED", "2", "0:0"), text
    assert [f"restart {i}: 2 node(s)" in text for i in range(4)] == [True, True, True, False]
    assert [(e["stage"], e["reason"]) for e in events(config, "stop")] == [
        ("warmup", "SIGTERM"),
        ("evolve", "SIGTERM"),
    ]
    resumed = events(config, "resume")
    assert [e["stage"] for e in resumed] == ["warmup", "evolve"] and all(
        10 <= e["step"] < STEPS for e in resumed
    ), resumed
    assert steady(metrics(tmp_path / "run")) == unbroken
    assert len(wandb_ids(config)) == 3 and len(set(wandb_ids(config))) == 1, wandb_ids(config)


def test_gives_up_when_told_and_obeys_scancel(cluster, configuration, unbroken, tmp_path):
    """A job that gives up or is cancelled is saved and not requeued; the same command line resumes it."""
    config = configuration(tmp_path)
    stages = ("--stage", "align", "--stage", "warmup")
    job = submit(cluster, config, *stages, MAX_RESTARTS="0")
    reach(config, "warmup", 10)
    cluster("scancel", "--batch", "--signal=USR1", job)
    record = cluster.wait(job)
    assert (record["JobState"], record["Restarts"], record["ExitCode"]) == ("FAILED", "0", "75:0"), printed(
        config, job
    )
    assert "unfinished after 0 restarts (MAX_RESTARTS=0)" in printed(config, job)

    job = submit(cluster, config, *stages)
    reach(config, "warmup", 40)
    cluster("scancel", job)
    record = cluster.wait(job)
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0"), printed(config, job)
    wait_for(lambda: len(events(config, "stop")) == 2, "the save")

    job = submit(cluster, config, *stages)
    assert cluster.wait(job)["JobState"] == "COMPLETED", printed(config, job)
    resumed = [e["step"] for e in events(config, "resume")]
    assert len(resumed) == 2 and 10 <= resumed[0] < 40 <= resumed[1] < STEPS, resumed
    assert steady(metrics(tmp_path / "run")) == [x for x in unbroken if x["stage"] in ("align", "warmup")]


def chain(cluster: Cluster, config: Path, *train_flags: str) -> list[str]:
    """Submit the stages as dependent jobs; returns the jobs' numbers."""
    said = cluster(
        "bash",
        CHAIN,
        "--nodes=2",
        f"--output={config.parent}/%j.out",
        "--",
        "--config",
        str(config),
        *train_flags,
    )
    assert [line.split(":")[0] for line in said.splitlines()] == list(STAGES)
    return [line.split()[-1] for line in said.splitlines()]


def test_stages_run_one_behind_the_other(cluster, configuration, unbroken, tmp_path):
    config = configuration(tmp_path)
    jobs = chain(cluster, config)
    records = [cluster.wait(job) for job in jobs]
    assert [r["JobState"] for r in records] == ["COMPLETED"] * 4, [
        printed(config, job)[-2000:] for job in jobs
    ]
    assert [r["JobName"] for r in records] == [f"evomoe-{stage}" for stage in STAGES]
    assert all(later["StartTime"] >= earlier["EndTime"] for earlier, later in itertools.pairwise(records))
    assert steady(metrics(tmp_path / "run")) == unbroken
    assert len(wandb_ids(config)) == 4 and len(set(wandb_ids(config))) == 1


def test_a_failed_stage_takes_the_later_ones_out_of_the_queue(cluster, configuration, tmp_path):
    jobs = chain(cluster, configuration(tmp_path), "--lr", "quick")
    records = [cluster.wait(job) for job in jobs]
    assert [r["JobState"] for r in records] == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]
    assert [r["Restarts"] for r in records] == ["0"] * 4
    assert "optimizer.lr = 'quick'" in printed(tmp_path / "run.yaml", jobs[0])


def test_wrong_folder_is_told_before_anything_runs(cluster, configuration, tmp_path):
    config = configuration(tmp_path)
    job = submit(cluster, config, EVOMOE_ROOT=str(tmp_path))
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert "call sbatch in the checkout, or set EVOMOE_ROOT" in printed(config, job)
