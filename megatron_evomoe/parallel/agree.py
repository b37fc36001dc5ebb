"""One answer for all ranks: what rank 0 finds, or the error that any of them meets, raised everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_all_ranks(get: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
    """What `get` finds on rank 0. Communicates: all ranks call it.

    Raises:
        one of `errors`: on every rank, when `get` raised it.
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
    """Raise `error` on every rank with the first rank's problem, where any has one. Communicates: all ranks
    call it.
    """
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if found := next((p for p in problems if p), None):
        raise error(found)
