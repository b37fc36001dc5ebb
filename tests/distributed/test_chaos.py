"""Training under torchrun with injected faults must end with the result of an undisturbed run.

Processes are killed or stopped, disks fill up and gradients turn NaN. The faults come in an order drawn from
a seed, each after a few more training steps. After each fault the same command is started again, unless
torchrun restarts its workers itself.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

from tests import programs
from tests.runs import metrics, steady

# many short stages, so that a transition between stages is always near
STAGES = [
    {"name": "align", "train_iters": 8},
    *({"name": f"warmup {i}", "kind": "warmup", "train_iters": 80} for i in range(1, 9)),
    {"name": "evolve", "train_iters": 80},
    *({"name": f"route {i}", "kind": "route", "train_iters": 80} for i in range(1, 10)),
]
QUICK = [
    {"name": "align", "train_iters": 2},
    *({"name": name, "train_iters": 8} for name in ("warmup", "evolve", "route")),
]
QUICK_FAULTS = [
    "SIGUSR1 to a rank",
    "NaN gradient on a rank",
    "full disk at metadata.json",
    "SIGKILL of torchrun",
    "SIGKILL of a rank, torchrun restarts",
    "hung rank",
]
PATIENCE, WHOLE_RUN = 120.0, 900.0  # time limits in seconds for the effect of one fault and for a whole run
ENOUGH = 84  # number of faults to inject: four of each kind


@dataclass
class Job:
    """A training run that is started again and again."""

    config: Path
    out: Path
    trigger: Path
    process: programs.Program | None = None
    log: Path = field(init=False)
    launches: int = 0

    def start(self, restarts: int = 0) -> None:
        self.launches += 1
        self.log = self.config.parent / f"launch{self.launches}.log"
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        self.process = programs.start(
            *torchrun,
            f"--max-restarts={restarts}",
            *("-m", "tests.distributed.chaos_worker", "train", "--config", str(self.config)),
            output=self.log,
            env=programs.environment(CHAOS_TRIGGER=str(self.trigger), CHAOS_SAVE=str(self.out)),
        )

    def workers(self) -> list[psutil.Process]:
        """The training processes, rank 0 first."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "tests.distributed.chaos_worker" in child.cmdline() and child.environ().get("RANK"):
                    found.append((int(child.environ()["RANK"]), child.create_time(), child))
            except psutil.Error:  # the process has ended in the meantime
                continue
        first: dict[int, psutil.Process] = {}
        # a rank's own forks have the same rank but were created later
        for rank, _, child in sorted(found, key=lambda f: f[:2]):
            first.setdefault(rank, child)
        return [first[rank] for rank in sorted(first)]

    def kill(self) -> None:
        """Kill torchrun and all its workers at once, as a power failure would."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait()

    def ended(self, patience: float = PATIENCE) -> int:
        """Wait for the job to end by itself and return its exit status."""
        return self.process.wait(timeout=patience)

    def steps(self) -> int:
        file = self.out / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def finished(self) -> int:
        """The number of stages that have saved their last step."""
        count = 0
        for path in self.out.glob("*/iter_*/evomoe.json"):
            with contextlib.suppress(FileNotFoundError):  # an old checkpoint is being deleted
                count += json.loads(path.read_text())["finished"]
        return count

    def ask(self, **fault: object) -> None:
        """Ask chaos_worker.py for a fault inside the training processes, until `trigger` is deleted."""
        scratch = self.trigger.with_suffix(".new")
        scratch.write_text(json.dumps(fault))
        os.replace(scratch, self.trigger)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def wait_for(condition: Callable[[], bool], job: Job) -> bool:
    """Wait until `condition` holds or the job has ended; returns whether the condition came true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if job.process.poll() is not None:
            return False
        assert time.monotonic() < deadline, job.text()[-3000:]
        time.sleep(0.002)
    return True


def some_steps(job: Job, draw: random.Random) -> bool:
    """Let training go on for one to three steps; returns False if the job ended before that."""
    target = job.steps() + draw.randint(1, 3)
    return wait_for(lambda: job.steps() >= target, job)


def kill_rank(job: Job, draw: random.Random) -> None:
    job.workers()[draw.randrange(2)].kill()
    assert job.ended() != 0


def kill_rank_and_let_torchrun_restart(job: Job, draw: random.Random) -> None:
    """Kill one rank of a job that was started with restarts: training continues without a new launch."""
    job.kill()
    job.start(restarts=1)
    if some_steps(job, draw):
        before = job.steps()
        job.workers()[draw.randrange(2)].kill()
        # one step may be logged again and another logged late, so only more steps prove that training goes on
        assert wait_for(lambda: job.steps() > before + 2, job) or job.process.returncode == 0, job.text()[
            -3000:
        ]


def kill_job(job: Job, draw: random.Random) -> None:
    job.kill()


def kill_while_saving(job: Job, draw: random.Random) -> None:
    if wait_for(lambda: any(job.out.glob("*/saving_*")), job):
        job.kill()


def kill_in_transition(job: Job, draw: random.Random) -> None:
    """Kill the job when a stage has saved its last step: in its evaluation or as the next begins."""
    before = job.finished()
    if wait_for(lambda: job.finished() > before, job):
        job.kill()


def terminate_rank(job: Job, draw: random.Random) -> None:
    job.workers()[draw.randrange(2)].send_signal(signal.SIGTERM)
    assert job.ended() == 0
    # without the message, the run must have ended before the signal arrived
    assert "exiting on SIGTERM" in job.text() or "Held-out exact match by kind" in job.text()


def usr1_rank(job: Job, draw: random.Random) -> None:
    job.workers()[draw.randrange(2)].send_signal(signal.SIGUSR1)
    assert job.ended() == 0
    # without the message, the run must have ended before the signal arrived
    assert "exiting on SIGUSR1" in job.text() or "Held-out exact match by kind" in job.text()


def terminate_job(job: Job, draw: random.Random) -> None:
    job.process.send_signal(signal.SIGTERM)
    job.ended()


def hang_rank(job: Job, draw: random.Random) -> None:
    victim = job.workers()[1]
    victim.suspend()
    named = f"pid {victim.pid}) has been silent"
    assert wait_for(lambda: named in job.text(), job), job.text()[-3000:]
    said = next(line for line in job.text().splitlines() if named in line)
    assert "failed in stage" in said and "rank 1 (" in said
    job.kill()


def poison(job: Job, draw: random.Random) -> None:
    job.ask(kind="nan", rank=1)
    assert job.ended() != 0 and "gradient norm is nan at step" in job.text(), job.text()[-3000:]


def lose_shard(job: Job, draw: random.Random) -> None:
    """Hide the shards from a running job and from the next launch.

    A running job keeps its open shards. A job that is started without them must name them and write nothing.
    """
    folder = Path(json.loads((job.config.parent / "data.json").read_text()))
    hidden = [(shard, shard.with_suffix(".hidden")) for shard in sorted(folder.glob("*.tar"))]
    for shard, aside in hidden:
        shard.rename(aside)
    try:
        if some_steps(job, draw):
            job.kill()
        job.start()
        if job.ended() != 0:
            assert f"directory {folder} holds no .tar file" in job.text(), job.text()[-3000:]
    finally:
        for shard, aside in hidden:
            aside.rename(shard)


def fill_disk(job: Job, draw: random.Random) -> None:
    free = os.statvfs(job.out).f_bavail * os.statvfs(job.out).f_frsize
    filler = job.out / "filler"
    try:
        # the run saves meanwhile, so there may be less free space than was measured
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            file.write(bytes(max(0, free - draw.choice([4096, 200_000]))))
        assert job.ended() != 0
        assert "are free" in job.text() or "No space left" in job.text(), job.text()[-3000:]
    finally:
        filler.unlink()


def unwritable(files: str, rank: int, code: int) -> Callable[[Job, random.Random], None]:
    """A fault in which the next save cannot write `files`; every rank names the file and failing rank."""

    def fault(job: Job, draw: random.Random) -> None:
        job.ask(kind="write", rank=rank, files=files + "*", errno=code)
        status = job.ended()
        job.trigger.unlink()
        said = [line for line in job.text().splitlines() if line.startswith("error: ")]
        assert status != 0 and len(said) == 2, job.text()[-3000:]
        assert all(
            f"rank {rank} (" in line and f"[Errno {code}]" in line and files in line for line in said
        ), said

    return fault


def fill_disk_under_metrics(job: Job, draw: random.Random) -> None:
    """Fail writes to metrics.jsonl: the run continues, and writes its lines once there is room again."""
    job.ask(kind="write", rank=0, files="metrics.jsonl", errno=errno.ENOSPC)
    wait_for(lambda: "kept in memory" in job.text(), job)
    job.trigger.unlink()
    came = wait_for(lambda: "is written again" in job.text(), job)
    assert came or job.process.returncode == 0, job.text()[-3000:]


def break_setup(job: Job, draw: random.Random) -> None:
    job.kill()
    job.ask(kind="raise", rank=1, where="build_stage")
    job.start()
    status = job.ended()
    job.trigger.unlink()
    assert status == 0 or job.text().count("rank 1 of 2 (") >= 2, job.text()[-3000:]
    assert status == 0 or "MemoryError: injected into build_stage" in job.text()


def start_twice(job: Job, draw: random.Random) -> None:
    """Start the same command a second time: the second job is refused, and the first one is not affected."""
    second = Job(job.config, job.out, job.trigger)
    second.launches = 1000 + job.launches
    second.start()
    status = second.ended()
    if job.process.poll() is None:
        assert status != 0 and "is in use by another run (host " in second.text(), second.text()[-3000:]


def kill_torchrun(job: Job, draw: random.Random) -> None:
    """Kill torchrun alone: its ranks save and end by themselves."""
    orphans = job.workers()
    job.process.kill()
    job.process.wait()
    _, alive = psutil.wait_procs(orphans, timeout=PATIENCE)
    said = job.text()
    assert not alive, said[-3000:]
    assert "its ranks behind; the same command goes on" in said or "Held-out exact match by kind" in said, (
        said[-3000:]
    )


def delete_stage(job: Job, draw: random.Random) -> None:
    """Delete the folder of a stage while the job runs.

    A checkpoint that is being saved there is lost; the run ends with an error or saves again. Other stages
    are not touched.
    """
    folder = max(
        (path.parent for path in job.out.glob("*/iter_*")),
        key=lambda path: path.stat().st_mtime,
        default=None,
    )
    if folder is not None:
        folder.rename(job.out / "deleted")
        shutil.rmtree(job.out / "deleted")
        with (job.out / "events.jsonl").open("a") as events:
            events.write(json.dumps({"event": "deleted", "stage": folder.name}) + "\n")
    if some_steps(job, draw):
        job.kill()


KINDS = {
    "full disk at common.pt": unwritable("common.pt", 0, errno.ENOSPC),
    "full disk at metadata.json": unwritable("metadata.json", 0, errno.ENOSPC),
    "full disk at evomoe.json": unwritable("evomoe.json", 0, errno.ENOSPC),
    "EIO at a rank's tensors": unwritable("__1_", 1, errno.EIO),
    "full disk at metrics.jsonl": fill_disk_under_metrics,
    "MemoryError in one rank's set-up": break_setup,
    "second run on one folder": start_twice,
    "SIGKILL of torchrun": kill_torchrun,
    "stage folder deleted": delete_stage,
    "SIGKILL of a rank": kill_rank,
    "SIGKILL of a rank, torchrun restarts": kill_rank_and_let_torchrun_restart,
    "SIGKILL of the job": kill_job,
    "SIGKILL during a save": kill_while_saving,
    "SIGKILL in a stage transition": kill_in_transition,
    "SIGTERM to a rank": terminate_rank,
    "SIGUSR1 to a rank": usr1_rank,
    "SIGTERM to torchrun": terminate_job,
    "hung rank": hang_rank,
    "NaN gradient on a rank": poison,
    "shards gone": lose_shard,
    "disk full": fill_disk,
}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 48 MiB for a run that needs 26 MiB, where this machine allows such a mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    yield folder if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_one_of_each_quick_fault(tmp_path, digits, tiny_yaml):
    disturbed(tmp_path, digits, tiny_yaml, None, QUICK_FAULTS, seed=1, stages=QUICK)


@pytest.mark.slow
def test_eighty_faults(tmp_path, digits, tiny_yaml, small_disk, row):
    kinds = [kind for kind in KINDS if small_disk or kind != "disk full"]
    draw = random.Random(7)
    # more faults than needed: a fault has no effect where the one before it left the run nothing to do
    order = list(itertools.chain.from_iterable(draw.sample(kinds, len(kinds)) for _ in range(5)))
    table = disturbed(tmp_path, digits, tiny_yaml, small_disk, order, seed=7, stages=STAGES)
    for kind, count in sorted(table.items()):
        row(f"| {kind} | {count} |")
    assert sum(table.values()) >= 80


def disturbed(tmp_path, digits, tiny_yaml, disk, order, *, seed, stages) -> Counter[str]:
    """Train once undisturbed and once with faults, and require the same results.

    Returns the number of faults injected, by kind.
    """
    stages = [
        {**stages[0], "train_data": [str(digits / "captions")], "conversation_template": "plain"},
        *stages[1:],
    ]
    steps = {stage["name"]: stage["train_iters"] for stage in stages}
    # Routing metrics are summed over the steps since the last logged line, and a kill loses the running sum.
    # Therefore every step is logged.
    common = {
        "stages": stages,
        "data": {"packing": "pack"},
        "train": {"eval_samples": 4},
        "log": {"log_interval": 2, "moe_metrics_interval": 1},
        "parallel": {"expert_model_parallel_size": 2, "distributed_timeout_minutes": 0.2},
    }
    (tmp_path / "calm").mkdir()
    calm = tiny_yaml(tmp_path / "calm", **common)
    job = Job(calm, tmp_path / "calm" / "run", tmp_path / "never")
    job.start()
    assert job.ended(WHOLE_RUN) == 0, job.text()[-3000:]

    home = tmp_path / "wild"
    home.mkdir()
    out = (disk or home) / "run"
    wild = tiny_yaml(home, checkpoint={"save": str(out), "save_interval": 1, "keep": 2}, **common)
    (home / "data.json").write_text(json.dumps(str(digits / "instruct")))
    job, draw, injected = Job(wild, out, home / "poison"), random.Random(seed), Counter()
    job.start()
    for kind in order:
        if sum(injected.values()) == ENOUGH:
            break
        if job.process.poll() is not None:
            job.start()
        if some_steps(job, draw):
            KINDS[kind](job, draw)
            injected[kind] += 1
        if job.process.poll() == 0 and job.steps() == sum(steps.values()):
            break
    while job.process.poll() is None or job.process.returncode != 0 or job.steps() < sum(steps.values()):
        if job.process.poll() is not None:
            assert job.launches < len(order) + 20, job.text()[-3000:]
            job.start()
        job.ended(WHOLE_RUN)
    same(tmp_path / "calm" / "run", out, steps)
    nothing_lost(out)
    return injected


def same(calm: Path, wild: Path, steps: dict[str, int]) -> None:
    """Require equal runs.

    Every step is logged once, in order, with the same bits; the weights at every stage's end and the
    accuracies are the same.
    """
    assert steady(metrics(wild)) == steady(metrics(calm))
    for stage, count in steps.items():
        a, b = (tensors(folder / stage / f"iter_{count:07d}") for folder in (calm, wild))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), stage
    tables = [json.loads((folder / "summary.json").read_text()) for folder in (calm, wild)]
    calm_rows, wild_rows = ([(r["stage"], r["loss"], r["accuracy"]) for r in table] for table in tables)
    assert calm_rows == wild_rows


def tensors(path: Path) -> dict[str, torch.Tensor]:
    from megatron_evomoe.checkpoint.stream import CheckpointReader

    reader = CheckpointReader(path)
    return {key: reader.read(key) for key in reader.shapes if not key.startswith("rng.")}


def nothing_lost(out: Path) -> None:
    """Require that every stage resumed from its newest published checkpoint, never from an older one."""
    saved: dict[str, int] = {}
    for event in (json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()):
        if event["event"] == "save":
            saved[event["stage"]] = max(event["step"], saved.get(event["stage"], 0))
        if event["event"] == "deleted":
            saved[event["stage"]] = 0
        if event["event"] == "resume":
            assert event["step"] >= saved.get(event["stage"], 0), event
