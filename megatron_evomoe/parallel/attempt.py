"""A key-value store that no earlier attempt of the job has written to.

torchrun starts workers again after a failure (`--max-restarts`) and hands them the store of the attempt
before, in which the addresses of dead processes still stand (torch 2.13, `dynamic_rendezvous.py`: the shared
store outlives its rendezvous). Gloo then connects to ports nobody listens on, NCCL to an id nobody serves.
Restart counts cannot tell attempts apart, because each node counts its own. So rank 0 draws a token for every
attempt, and the others take it from the rank 0 that answers them.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid

import torch.distributed as dist

_POLL = 0.02


def is_restartable() -> bool:
    """Whether a torchrun agent keeps the store."""
    return dist.is_torchelastic_launched() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def own_store(store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """`store` under a prefix of this attempt. Communicates through `store`; all ranks call it.

    Raises:
        RuntimeError: some rank did not call it within `timeout`; rank 0 says which.
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
    """Answer every name that stands under a rank, until each rank has heard: names of dead processes may come
    first.
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
