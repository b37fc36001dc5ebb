"""Two tensor-parallel ranks with sequence parallelism against one rank: logits, features, gradients of replicated weights.

Measured on CPU in fp32: at most 8e-7 of the largest value (sums in another order). A forgotten reduction of a norm's gradient
would show as a difference of order 1.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
ROOT = Path(__file__).parents[3]


def run(tp: int, path: Path) -> dict[str, torch.Tensor]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(tp), "--master-port", str(port)]
    done = subprocess.run([*launch, str(WORKER), str(tp), str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(path)


def test_tp2_equals_tp1(tmp_path):
    one, two = run(1, tmp_path / "one.pt"), run(2, tmp_path / "two.pt")
    assert one.keys() == two.keys() and len(one) > 15
    for name, wanted in one.items():
        assert two[name].shape == wanted.shape, name
        if wanted.numel():
            error = (two[name] - wanted).abs().max() / wanted.abs().max()
            assert error < 5e-6, f"{name}: {error:.1e}"
