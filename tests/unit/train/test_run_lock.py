"""Only one run at a time uses a folder.

A crash leaves no lock behind, forks hold no lock, and a deleted folder is noticed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import threading
import time

import pytest

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.train import run_lock
from megatron_evomoe.train.run_lock import RunLock

pytestmark = pytest.mark.usefixtures("one_rank")


@contextlib.contextmanager
def held(folder):
    """Start a process that locks `folder`, with a fork that outlives it, and give its pid."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lock = RunLock(folder, 1)
            lock._me["pid"] = os.getpid()
            lock._acquire()
            # A data worker or a background writer is such a fork: it inherits the descriptor.
            helper = os.fork()
            if helper == 0:
                time.sleep(60)
                os._exit(0)
            os.write(write, f"{helper}\n".encode())
            time.sleep(60)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        helper = int(answer.readline())
    try:
        yield child
    finally:
        for pid in (child, helper):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


@pytest.fixture(params=["locks", "no locks"])
def file_system(request, monkeypatch):
    """Test on this file system, and without file locks; leases last a fraction of a second."""
    if request.param == "no locks":

        def no_locks(*args):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "lockf", no_locks)
    for name, value in {"_HERE": 0.5, "_ELSEWHERE": 0.5, "_BEAT": 0.05, "_STILL": 1.0, "_POLL": 0.02}.items():
        monkeypatch.setattr(run_lock, name, value)
    return request.param


def test_second_run_is_refused_by_the_name_of_the_first_and_let_in_when_that_is_killed(tmp_path, file_system):
    with held(tmp_path / "run") as pid:
        refusal = rf"run is in use by another run \(host .*, pid {pid}, since 20.*another --save"
        with pytest.raises(CheckpointError, match=refusal), RunLock(tmp_path / "run", 60):
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with RunLock(tmp_path / "run", 60) as lock:  # the fork still runs but holds no lock
            lock.verify()


def test_predecessor_that_is_dying_is_waited_for(tmp_path, file_system, monkeypatch):
    monkeypatch.setattr(run_lock, "_HERE", 30)
    with held(tmp_path / "run") as pid:
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        with RunLock(tmp_path / "run", 60) as lock:
            lock.verify()


def test_end_of_a_run_lets_the_next_in_at_once(tmp_path, file_system, monkeypatch):
    monkeypatch.setattr(run_lock, "_STILL", 60)
    for _ in range(2):
        with RunLock(tmp_path / "run", 100) as lock:
            time.sleep(0.2)  # the lease is renewed in this time
            lock.verify()


def test_folder_that_goes_is_noticed(tmp_path, file_system):
    folder = tmp_path / "run"
    with RunLock(folder, 60) as lock:
        shutil.rmtree(folder)
        with pytest.raises(CheckpointError, match=r"run was deleted or replaced while the run was writing"):
            lock.verify()
    with RunLock(folder, 60) as lock:
        folder.rename(tmp_path / "aside")
        folder.mkdir()
        (folder / run_lock.NAME).touch()
        with pytest.raises(CheckpointError, match="is another file"):
            lock.verify()


def test_lease_that_another_run_took_is_lost(tmp_path, file_system):
    if file_system == "locks":
        pytest.skip("a lock cannot be taken over")
    with RunLock(tmp_path, 60) as lock:
        other = RunLock(tmp_path, 60)
        other._descriptor = os.open(tmp_path / run_lock.NAME, os.O_RDWR)
        other._write(other._me)
        lock._lease.join(30)
        with pytest.raises(CheckpointError, match="was taken over by host"):
            lock.verify()


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(
                CheckpointError, match=r"--save .*file.* cannot be written to: .*file.*name a folder that can"
            ),
            RunLock(folder, 60),
        ):
            pass
