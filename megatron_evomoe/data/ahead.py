"""Computes the next item of an iterator while the caller works with the present one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")
_PATIENCE = 10.0
"""Seconds for which closing waits for the item that is being computed."""


def one_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The endless `items`, of which a thread computes one ahead; closing this closes them.

    Raises:
        Exception: what `items` raises, when the item that is missing is asked for.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    found: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    # a daemon, because a caller that is ending must not wait for a file system that hangs
    thread = threading.Thread(target=_compute, args=(items, wanted, found), name="one-ahead", daemon=True)
    thread.start()
    try:
        wanted.put(True)
        while True:
            answer: tuple[Any, BaseException | None] = found.get()
            if answer[1] is not None:
                raise answer[1]
            wanted.put(True)
            yield answer[0]
            del answer  # or the item would not be free before the next one is there
    finally:
        wanted.put(False)
        thread.join(_PATIENCE)
        if not thread.is_alive():  # otherwise it is inside of `items`, which cannot be closed then
            items.close()


def _compute(items: Generator[T, None, None], wanted: queue.SimpleQueue, found: queue.SimpleQueue) -> None:
    while wanted.get():
        try:
            found.put((next(items), None))
        except BaseException as error:
            found.put((None, error))
            return
