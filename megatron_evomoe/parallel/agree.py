"""Agreement between ranks: all get the value that rank 0 finds, or the error that any rank meets."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
_POLL = 0.2
"""Seconds between two looks at how many ranks have arrived."""
_meetings = itertools.count()


def on_all_ranks(get: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
    """Call `get` on rank 0 and return its result on every rank. Communicates: all ranks call it.

    Raises:
        Exception: on every rank, one of `errors` that `get` raised on rank 0.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [get()]
        except errors as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], errors):
        raise found[0]
    return found[0]


def require_all(problem: str | None, error: type[Exception]) -> None:
    """Raise `error` on every rank if any rank has a problem. Communicates: all ranks call it.

    Args:
        problem: this rank's problem, or none. The lowest rank that has one gives the message.
    """
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if found := next((p for p in problems if p), None):
        raise error(found)


def await_all_ranks() -> None:
    """Wait until all ranks have called this, for as long as that takes.

    A collective would end the run after `distributed_timeout_minutes`. Communicates through the job's
    key-value store alone: all ranks call it, in the same order among their calls.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    key = f"arrived/{next(_meetings)}"
    arrived = store.add(key, 1)
    while arrived < dist.get_world_size():
        time.sleep(_POLL)
        arrived = store.add(key, 0)
