"""A failure on one rank is reported on every rank, and all ranks end long before a collective times out."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests import programs

PATIENCE = 200  # seconds, mostly for starting Python; a hanging collective would wait for hours
STAGES = [{"name": "warmup", "train_iters": 2}, {"name": "evolve", "train_iters": 1}]


def run_two(home: Path, config: Path, fault: dict[str, Any]) -> tuple[int, list[str]]:
    """Train on two ranks with `fault`; returns torchrun's exit status and the output of each rank."""
    trigger = home / "trigger"
    trigger.write_text(json.dumps(fault))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = programs.run(
        *torchrun,
        *("--redirects", "3", "--log-dir", str(home / "logs")),
        *("-m", "tests.distributed.chaos_worker", "train", "--config", str(config)),
        env=programs.environment(CHAOS_TRIGGER=str(trigger), CHAOS_SAVE=str(home / "run")),
        expect=None,
        timeout=PATIENCE,
    )
    trigger.unlink(missing_ok=True)
    return done.returncode, [
        next((home / "logs").glob(f"*/attempt_0/{rank}/stderr.log")).read_text() for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("save_interval", [1, 0])
def test_folder_deleted_under_a_run_ends_it_with_an_error(tmp_path, tiny_yaml, save_interval):
    """The run ends at its next save, or at its end where no save comes before."""
    config = tiny_yaml(
        tmp_path, stages=[{"name": "warmup", "train_iters": 200}], checkpoint={"save_interval": save_interval}
    )
    log = tmp_path / "log"
    process = programs.start("-m", "megatron_evomoe", "train", "--config", str(config), output=log)
    try:
        deadline = time.monotonic() + PATIENCE
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.01)
        (tmp_path / "run").rename(tmp_path / "deleted")
        shutil.rmtree(tmp_path / "deleted")
        assert process.wait(timeout=PATIENCE) == 2, log.read_text()[-3000:]
    finally:
        process.kill()
    assert "run was deleted or replaced while the run was writing to it" in log.read_text()


def write(files: str, rank: int = 0, code: int = errno.ENOSPC) -> dict[str, Any]:
    return {"kind": "write", "files": files, "rank": rank, "errno": code}


FILES = [
    *(
        write(files)
        for files in ("common.pt*", "metadata.json*", "evomoe.json*", ".metadata*", "run_config.yaml*")
    ),
    write("__1_*.distcp", 1, errno.EIO),
]
OTHERS = [
    write("summary.json*"),
    *(
        {"kind": "raise", "where": where, "rank": rank}
        for where, rank in (
            ("open_session", 0),
            ("build_stage", 1),
            ("build_stage", 0),
            ("train_loader", 1),
            ("questions", 1),
            ("take_step", 0),
            ("_load", 1),
            ("load_config", 1),
        )
    ),
]


@pytest.mark.parametrize(
    ("fault", "background"),
    [
        pytest.param({"kind": "raise", "where": "take_step", "rank": 1}, False, id="quick"),
        *(
            pytest.param(fault, False, id=" ".join(map(str, fault.values())), marks=pytest.mark.slow)
            for fault in (*FILES, *OTHERS)
        ),
        *(
            pytest.param(fault, True, id=f"background {fault['files']}", marks=pytest.mark.slow)
            for fault in FILES
        ),
    ],
)
def test_every_rank_ends_with_the_message_of_the_one_that_failed(tmp_path, tiny_yaml, fault, background):
    config = tiny_yaml(
        tmp_path,
        stages=STAGES,
        train={"eval_samples": 2, "global_batch_size": 4, "train_iters": 2},
        checkpoint={"save_interval": 1, "async_save": background},
        parallel={"expert_model_parallel_size": 2, "distributed_timeout_minutes": 60},
    )
    status, texts = run_two(tmp_path, config, fault)
    assert status != 0
    wanted = (
        "MemoryError: injected into" if fault["kind"] == "raise" else "Errno" if not background else "Error"
    )
    for text in texts:
        said = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and wanted in said[0], text[-3000:]
        assert f"rank {fault['rank']} " in said[0] and socket.gethostname() in said[0]
        assert "stay" in said[0] or fault.get("where") == "load_config", "what stays intact is said"
