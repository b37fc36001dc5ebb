"""Two tensor-parallel ranks with sequence parallelism against one rank: logits, features, gradients of
replicated weights.

Measured on CPU in fp32: at most 8e-7 of the largest value (sums in another order). A forgotten reduction of a
norm's gradient would show as a difference of order 1.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
ROOT = Path(__file__).parents[3]


def test_tp2_equals_tp1(tmp_path, one_rank):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), "2", str(tmp_path / "two.pt")],
            env={**world, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    spec = importlib.util.spec_from_file_location("tensor_parallel_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    one = worker.cases(1)
    for rank in ranks:
        errors = rank.communicate(timeout=300)[1]
        assert rank.returncode == 0, errors[-4000:]
    two = torch.load(tmp_path / "two.pt")
    assert one.keys() == two.keys() and len(one) > 15
    for name, wanted in one.items():
        assert two[name].shape == wanted.shape, name
        if wanted.numel():
            error = (two[name] - wanted).abs().max() / wanted.abs().max()
            assert error < 5e-6, f"{name}: {error:.1e}"
