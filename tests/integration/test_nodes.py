"""Several nodes with torchrun alone: one agent per node, with c10d rendezvous, all on this machine."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.test_stages import steady
from tests.programs import ROOT, environment
from tests.runs import metrics, run

pytestmark = pytest.mark.slow

SCRIPT = str(ROOT / "examples" / "evomoe_llava.sh")


def start(config: Path, nodes: int, *train_flags: str) -> list[subprocess.Popen[str]]:
    """Start `torchrun --nnodes=N examples/evomoe_llava.sh` once per node."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-id=test",
        SCRIPT,
        "--config",
        str(config),
        *train_flags,
    ]
    return [
        subprocess.Popen(
            torchrun,
            env=environment(),
            cwd=config.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(nodes)
    ]


def wait_for_line(file: Path, part: str, nodes: list[subprocess.Popen[str]]) -> None:
    """Wait for a line of `file` that contains `part`; it must come while all `nodes` run."""
    deadline = time.monotonic() + 400
    while not (file.exists() and part in file.read_text()):
        assert time.monotonic() < deadline, f"no {part} in {file}"
        assert all(node.poll() is None for node in nodes), [node.communicate()[0][-3000:] for node in nodes]
        time.sleep(0.02)


def test_four_nodes_train_like_four_processes_of_one(tiny_yaml, tmp_path):
    """All four stages, with the experts spread over the nodes, give the same bits as on one node."""
    (tmp_path / "one").mkdir()
    (tmp_path / "four").mkdir()
    layout = {"parallel": {"expert_model_parallel_size": 4}, "data": {"eval_data": []}}
    one, four = (tiny_yaml(tmp_path / name, **layout) for name in ("one", "four"))
    run("train", "--config", str(one), processes=4)
    for node in start(four, 4):
        said, _ = node.communicate(timeout=600)
        assert node.returncode == 0, said[-4000:]
    lines = steady(metrics(tmp_path / "four" / "run"))
    assert len(lines) == 2 + 3 * 6 and lines == steady(metrics(tmp_path / "one" / "run"))


def test_a_signal_on_one_node_ends_all_and_the_run_goes_on(tiny_yaml, tmp_path):
    """Only the second node gets the signal, and all ranks save at the same step."""
    for name in ("unbroken", "stopped"):
        (tmp_path / name).mkdir()
    setting = {
        "data": {"eval_data": []},
        "train": {"train_iters": 80, "global_batch_size": 4},
        "checkpoint": {"save_interval": 0},
        "log": {"moe_metrics_interval": 1},
    }
    unbroken, stopped = (tiny_yaml(tmp_path / name, **setting) for name in ("unbroken", "stopped"))
    stages = ("--stage", "align", "--stage", "warmup")
    run("train", "--config", str(unbroken), *stages, processes=2)

    nodes = start(stopped, 2, *stages)
    out = tmp_path / "stopped" / "run"
    wait_for_line(out / "metrics.jsonl", '"step": 10, "stage": "warmup"', nodes)
    nodes[1].send_signal(signal.SIGTERM)
    wait_for_line(out / "events.jsonl", '"event": "stop"', nodes[:1])
    # the first node's workers have ended, but its torchrun would wait five minutes for the node that was
    # signalled
    nodes[0].send_signal(signal.SIGTERM)
    said = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], said
    assert any("exiting on SIGTERM" in text for text in said)

    run("train", "--config", str(stopped), *stages, processes=2)
    happened = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [(e["stage"], 10 <= e["step"] < 80) for e in happened if e["event"] == "resume"] == [
        ("warmup", True)
    ]
    assert steady(metrics(tmp_path / "stopped" / "run")) == steady(metrics(tmp_path / "unbroken" / "run"))
