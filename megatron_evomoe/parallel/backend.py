"""Which device and which communication backend this process uses, decided by what is there.

Call `prepare()` before anything imports ``megatron.core``; on a machine without CUDA it applies
`parallel.cpu`, with CUDA it imports none of it.
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
    """Join torchrun's world; outside torchrun, be a world of one that nobody outside this machine can connect
    to.
    """
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        _join(timeout)
        return
    _listen_on_loopback()
    dist.init_process_group(
        backend_name(), store=dist.HashStore(), timeout=timeout, rank=0, world_size=1
    )  # no TCP store


def _listen_on_loopback() -> None:
    """Gloo and NCCL open listening sockets even in a world of one, by default on the interface that the
    host's name leads to.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback)


def _join(timeout: datetime.timedelta) -> None:
    if not attempt.is_restartable():
        dist.init_process_group(backend_name(), timeout=timeout)
        return
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = attempt.own_store(store, rank, world_size, timeout)
    dist.init_process_group(backend_name(), store=store, rank=rank, world_size=world_size, timeout=timeout)
