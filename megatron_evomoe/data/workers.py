"""Processes that work beside their parent and do not outlive it."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

_POLL = 0.2  # seconds between two looks at the processes
_MAX_TEXT = 10_000


def die_with_parent() -> None:
    """Exit this process when its parent ends, because a killed parent cannot stop it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class WorkerKilledError(RuntimeError):
    """All processes ended without finishing and without an exception of their own."""


def run_in_processes(count: int, work: Callable[[], None], meanwhile: Callable[[], None]) -> None:
    """Run `work` in `count` forked processes at once, and wait for them.

    They share what this process has in memory, and use neither its threads nor its signal handlers. They
    share the work too: it is done when one of them comes to its end.

    Args:
        meanwhile: called several times a second in this process. What it raises ends the processes.

    Raises:
        Exception: no process came to its end, and one raised this.
        WorkerKilledError: no process came to its end, and none raised anything.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [context.Process(target=_run, args=(work, sender)) for _, sender in pipes]
    try:
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        while any(process.is_alive() for process in processes):
            multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], _POLL)
            meanwhile()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()
    errors = [error for receiver, _ in pipes if (error := _received(receiver)) is not None]
    failed = [process.exitcode for process in processes if process.exitcode]
    if len(failed) == count and not errors:
        raise WorkerKilledError(f"exit code {failed[0]}")
    if errors and len(failed) == count:
        raise errors[0]
    if failed:
        logger.warning(
            "%d of %d processes failed (%s); others did their work", len(failed), count, errors or failed
        )


def _received(receiver: multiprocessing.connection.Connection) -> Exception | None:
    try:
        return receiver.recv() if receiver.poll() else None
    except EOFError:
        return None


def _run(work: Callable[[], None], sender: multiprocessing.connection.Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # reaches the parent too, which then ends its processes
    die_with_parent()
    try:
        work()
    except Exception as error:
        sender.send(_sendable(error))
        sys.exit(1)


def _sendable(error: Exception) -> Exception:
    """The error, or one with its text if it cannot be sent or would not fit into a pipe that nobody reads."""
    try:
        data = pickle.dumps(error)
        copy.deepcopy(error)  # built anew, as the receiver builds it
    except Exception:
        return RuntimeError(repr(error)[:_MAX_TEXT])
    return error if len(data) < _MAX_TEXT else RuntimeError(str(error)[:_MAX_TEXT])
