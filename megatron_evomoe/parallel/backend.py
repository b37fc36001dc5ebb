"""The device and the communication backend of this process: CUDA and NCCL, or CPU and Gloo.

Call `prepare()` before anything imports ``megatron.core``. Without CUDA it applies `parallel.cpu`; with CUDA
that module is not even imported.
"""

from __future__ import annotations

import datetime
import os
import socket

import torch
import torch.distributed as dist

from megatron_evomoe.config import ConfigError
from megatron_evomoe.parallel import attempt

_prepared = False
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_DETERMINISTIC = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("^NVLS", "Tree", "Ring", "CollnetDirect", "CollnetChain"),
}
"""By variable, what makes its library deterministic; the first is what is set."""
SET_BY = "_EVOMOE_LOOPBACKSET_BY"


def on_gpu() -> bool:
    """Whether CUDA can be used."""
    return torch.cuda.is_available()


def capability() -> tuple[int, int] | None:
    """The GPU's compute capability, for example (9, 0) for Hopper; none without a GPU."""
    return torch.cuda.get_device_capability() if on_gpu() else None


def device() -> torch.device:
    """The device that holds this rank's tensors."""
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


def choose_deterministic_kernels() -> None:
    """Tell the GPU's libraries by their environment variables to give the same bits every time.

    Without a GPU nothing is done. Call it before CUDA is used, because each library reads its variable once.
    megatron-core's Transformer Engine layers require the first, and Megatron-LM all three.

    Raises:
        ConfigError: a variable asks for something else already.
    """
    if not on_gpu():
        return
    for name, accepted in _DETERMINISTIC.items():
        if os.environ.setdefault(name, accepted[0]) not in accepted:
            raise ConfigError(
                f"deterministic_mode, but the environment has {name}={os.environ[name]}; unset it, or set it "
                f"to {' or '.join(accepted)}"
            )


def init_process_group(timeout_minutes: float) -> None:
    """Join the process group that torchrun describes; outside torchrun, create a group of one rank.

    The group of one uses the loopback interface, so that no other machine can connect to it.
    """
    timeout = datetime.timedelta(minutes=timeout_minutes)
    _forget_inherited_loopback()
    if "RANK" in os.environ:
        _join(timeout)
        return
    _listen_on_loopback()
    # A HashStore lives in this process; the default store would listen on a TCP port.
    dist.init_process_group(backend_name(), store=dist.HashStore(), timeout=timeout, rank=0, world_size=1)


def _listen_on_loopback() -> None:
    """Make Gloo and NCCL open their listening sockets on the loopback interface.

    They open some even for a single rank, by default on the interface to which the host's name resolves. They
    read the variables again for every group, so the variables stay set; `SET_BY` tells a child process that
    they were its parent's choice and not the user's.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    unset = [variable for variable in _INTERFACES if variable not in os.environ]
    if loopback is not None and unset:
        os.environ.update(dict.fromkeys(unset, loopback), **{SET_BY: f"{os.getpid()} {' '.join(unset)}"})


def _forget_inherited_loopback() -> None:
    """Unset what a parent process of a single rank set for itself; on several nodes no rank could connect."""
    pid, *variables = os.environ.get(SET_BY, "").split() or [""]
    if pid and int(pid) != os.getpid():
        for variable in (*variables, SET_BY):
            os.environ.pop(variable, None)


def _join(timeout: datetime.timedelta) -> None:
    if not attempt.is_restartable():
        dist.init_process_group(backend_name(), timeout=timeout)
        return
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = attempt.own_store(store, rank, world_size, timeout)
    dist.init_process_group(backend_name(), store=store, rank=rank, world_size=world_size, timeout=timeout)
