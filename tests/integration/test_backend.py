"""The adaptations for CPUs do not reach beyond the process and the backend they are meant for."""

from __future__ import annotations

import subprocess
import sys

from tests.programs import ROOT, environment


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_with_cuda_nothing_of_the_cpu_module_is_imported():
    code = """
import sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.set_device = lambda index: print("device", index)
before = torch.zeros, torch.Tensor.to, torch.Tensor.type
from megatron_evomoe.parallel import backend
backend.prepare()
assert "megatron_evomoe.parallel.cpu" not in sys.modules
assert before == (torch.zeros, torch.Tensor.to, torch.Tensor.type)
assert backend.backend_name() == "nccl"
"""
    assert python(code) == "device 0\n"


def test_light_commands_import_neither_torch_distributed_nor_megatron_core():
    code = """
import sys
from megatron_evomoe.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
assert not any(name.startswith("megatron.core") for name in sys.modules) and "torch" not in sys.modules
"""
    assert "make-shards" in python(code)


def test_types_are_renamed_only_inside_the_optimizers():
    code = """
import torch
from megatron_evomoe.parallel import backend
backend.prepare()
assert torch.zeros(1).type() == "torch.FloatTensor"
assert torch.zeros(1, device="cuda").device.type == "cpu"
"""
    python(code)


def test_a_single_process_listens_on_loopback_only():
    """A single process listens on the loopback interface alone.

    This also holds where the host's name resolves to a network address, which gloo would use by default.
    """
    code = """
import psutil, torch
import torch.distributed as dist
from megatron_evomoe.config import TrainConfig
from megatron_evomoe.parallel import backend
backend.prepare()
backend.init_process_group(1)
dist.all_reduce(torch.ones(1), group=dist.new_group([0]))
from megatron_evomoe.train.stop import StopRequests
StopRequests(TrainConfig())
import os
assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"
for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
    for c in process.net_connections("inet"):
        print(c.laddr.ip)
"""
    assert set(python(code).split()) == {"127.0.0.1"}


def test_a_child_does_not_inherit_the_loopback_of_a_single_process():
    """A program that trains alone may start torchrun on several nodes later; a user's setting is kept."""
    child = """
import os, sys
from megatron_evomoe.parallel import backend
backend.prepare()
backend.init_process_group(1)
print(os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME"))
"""
    code = f"""
import os, subprocess, sys
from megatron_evomoe.parallel import backend
os.environ["NCCL_SOCKET_IFNAME"] = "chosen"
backend.prepare()
backend.init_process_group(1)
rank = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
for extra in (rank, {{}}):
    subprocess.run([sys.executable, "-c", {child!r}], env=dict(os.environ, **extra), check=True)
"""
    assert python(code) == "None chosen\nlo chosen\n"
