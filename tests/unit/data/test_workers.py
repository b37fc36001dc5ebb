"""Processes that share work: what they raise, what happens when they are killed or their parent is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from megatron_evomoe.data.workers import WorkerKilledError, run_in_processes

from .helpers import forked_children


def nothing():
    pass


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def mark(folder):
    (folder / str(os.getpid())).touch()


def test_each_process_works_once(tmp_path):
    run_in_processes(3, lambda: mark(tmp_path), nothing)
    assert len(files(tmp_path)) == 3 and str(os.getpid()) not in files(tmp_path)
    assert not forked_children()


class UnsendableError(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} {other}")


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (OSError(28, "No space left on device"), OSError, "No space left on device"),
        (UnsendableError("no", "pickle"), RuntimeError, r"UnsendableError\('no pickle'\)"),
        (ValueError("x" * 10**6), RuntimeError, "x{9000}"),
    ],
)
def test_error_of_a_process_is_raised_if_none_finishes(error, expected, text):
    def fail():
        raise error

    with pytest.raises(expected, match=text):
        run_in_processes(2, fail, nothing)


def test_one_that_finishes_is_enough(tmp_path, caplog):
    """The processes share one piece of work, so the first that comes to its end has seen all of it done."""

    def work():
        mark(tmp_path)
        while len(files(tmp_path)) < 3:
            time.sleep(0.01)
        rank = files(tmp_path).index(str(os.getpid()))
        if rank == 0:
            raise ValueError("one of them")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    run_in_processes(3, work, nothing)
    assert "2 of 3 processes failed" in caplog.text and "one of them" in caplog.text


def test_killed_processes_are_told():
    with pytest.raises(WorkerKilledError, match="exit code -9"):
        run_in_processes(2, lambda: os.kill(os.getpid(), signal.SIGKILL), nothing)


class StopError(Exception):
    pass


def test_processes_end_with_what_the_caller_raises():
    """They are ended by SIGTERM even where the parent handles that signal, as a training run does."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)

    def stop():
        raise StopError

    try:
        with pytest.raises(StopError):
            run_in_processes(2, lambda: time.sleep(600), stop)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not forked_children()


def test_processes_do_not_outlive_a_killed_parent(tmp_path):
    script = f"""
        import os, pathlib, time
        from megatron_evomoe.data.workers import run_in_processes
        def work():
            (pathlib.Path({str(tmp_path)!r}) / str(os.getpid())).touch()
            time.sleep(600)
        run_in_processes(2, work, lambda: None)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    deadline = time.monotonic() + 60
    while len(files(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    children = [int(name) for name in files(tmp_path)]
    assert len(children) == 2
    while any(is_running(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in children)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
