"""Agreement between ranks: all get the value that rank 0 finds, or the error that any rank meets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


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
