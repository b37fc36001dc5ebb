"""A key-value store that no earlier attempt of the job has written to.

torchrun restarts workers after a failure (`--max-restarts`) and hands them the store of the previous attempt,
which still holds the addresses of dead processes (torch 2.13, `dynamic_rendezvous.py`: the shared store
outlives its rendezvous). Gloo would then connect to ports on which no process listens, and NCCL to an id that
no process serves. Restart counts cannot tell attempts apart, because each node counts its own. Therefore
rank 0 draws a token for every attempt, and the other ranks receive it from the rank 0 that is alive.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid

import torch.distributed as dist

_POLL = 0.02


def is_restartable() -> bool:
    """Whether torchrun's agent owns the store, which then outlives the workers."""
    return dist.is_torchelastic_launched() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def own_store(store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """Return `store` under a prefix that belongs to this attempt. Communicates: all ranks call it.

    Raises:
        RuntimeError: some ranks did not call it within `timeout`; rank 0 names them.
    """
    token = _welcome(store, world_size, timeout) if rank == 0 else _ask(store, rank)
    return dist.PrefixStore(f"evomoe/{token}", store)


def _ask(store: dist.Store, rank: int) -> str:
    me = uuid.uuid4().hex
    store.set(f"evomoe/hello/{rank}", me)
    token = store.get(f"evomoe/welcome/{me}").decode()
    store.set(f"evomoe/{token}/heard/{rank}", "")
    return token


def _welcome(store: dist.Store, world_size: int, timeout: datetime.timedelta) -> str:
    """Answer every process that asks under a rank's key, until each rank confirms that it has the token.

    A key may hold the name of a dead process first, and the name of its successor later.
    """
    token, silent = uuid.uuid4().hex, list(range(1, world_size))
    answered: set[str] = set()
    deadline = time.monotonic() + timeout.total_seconds()
    while silent:
        for rank in silent:
            if store.check([f"evomoe/hello/{rank}"]):
                name = store.get(f"evomoe/hello/{rank}").decode()
                if name not in answered:
                    store.set(f"evomoe/welcome/{name}", token)
                    answered.add(name)
        silent = [rank for rank in silent if not store.check([f"evomoe/{token}/heard/{rank}"])]
        if silent and time.monotonic() > deadline:
            raise RuntimeError(
                f"{len(silent)} of {world_size} ranks did not join within {timeout}: ranks "
                f"{', '.join(map(str, silent[:16]))}"
            )
        time.sleep(_POLL if silent else 0)
    return token
