"""Which device and which communication backend this process uses, decided by what is there.

Call `prepare()` before anything imports ``megatron.core``; on a machine without CUDA it applies `parallel.cpu`, with
CUDA it imports none of it.
"""

from __future__ import annotations

import datetime
import os
import socket

import torch
import torch.distributed as dist

from megatron_evomoe.parallel import attempt

_prepared = False


def on_gpu() -> bool:
    """Whether CUDA can be used."""
    return torch.cuda.is_available()


def capability() -> tuple[int, int] | None:
    """The GPU's compute capability, (9, 0) for Hopper; none without a GPU."""
    return torch.cuda.get_device_capability() if on_gpu() else None


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def backend_name() -> str:
    """``nccl`` with CUDA, else ``gloo``."""
    return "nccl" if on_gpu() else "gloo"


def prepare() -> None:
    """Make ``import megatron.core`` safe on this machine. Idempotent."""
    global _prepared
    if _prepared:
        return
    if on_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        from megatron_evomoe.parallel import cpu

        cpu.adapt()
    _prepared = True


def init_process_group(timeout_minutes: float) -> None:
    """Join torchrun's world; outside torchrun, be a world of one on a free port (the environment stays as it is)."""
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        _join(timeout)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group(backend_name(), timeout=timeout, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)


def _join(timeout: datetime.timedelta) -> None:
    if not attempt.is_restartable():
        dist.init_process_group(backend_name(), timeout=timeout)
        return
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = attempt.own_store(store, rank, world_size, timeout)
    dist.init_process_group(backend_name(), store=store, rank=rank, world_size=world_size, timeout=timeout)
