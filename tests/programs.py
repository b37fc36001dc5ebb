"""Python programs in processes of their own, for tests of what runs on a command line.

`start` and `run` take the arguments of ``python``. Without a GPU, the processes are forked from a process
that has imported everything, so that a command takes one second instead of the five that a new interpreter
needs. A process that uses CUDA cannot be forked, so with a GPU every program gets a new interpreter. Programs
that torchrun starts also get new interpreters. Tests of what an interpreter imports do not use this module.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_evomoe.parallel import backend

ROOT = Path(__file__).resolve().parents[1]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.preload"])


def environment(**extra: str) -> dict[str, str]:
    """The environment that pytest was started with, the checkout importable, and one thread per process."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    # a group of one rank in this process has set variables that its children must not inherit
    own = (backend.SET_BY, *os.environ.get(backend.SET_BY, "").split()[1:])
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **extra}


class Forked:
    """A forked program, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status: minus the signal's number after a signal, None while the program runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the program to end and return its exit status. Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


Program = Forked | subprocess.Popen[bytes]


def start(
    *argv: str,
    output: Path,
    errors: Path | None = None,
    typed: Path | None = None,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
) -> Program:
    """Start ``python ARGV``, where ARGV is ``-m MODULE …`` or a file and its arguments.

    What the program prints is appended to `output`; `errors`, if given, takes what goes to stderr. `typed` is
    a file for stdin.
    """
    env = environment() if env is None else env
    streams = (typed or Path(os.devnull), output, errors or output)
    if backend.on_gpu():
        with streams[0].open("rb") as stdin, streams[1].open("ab") as stdout, streams[2].open("ab") as stderr:
            return subprocess.Popen(
                [sys.executable, *argv], env=env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr
            )
    process = _server.Process(target=_main, args=(argv, env, str(cwd), *map(str, streams)))
    process.start()
    return Forked(process)


def start_ranks(
    world: int, *argv: str, output: Path, errors: Path | None = None, env: dict[str, str] | None = None
) -> list[Program]:
    """Start the same program `world` times, as the ranks of one node."""
    common = {
        **(environment() if env is None else env),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        start(*argv, output=output, errors=errors, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(world)
    ]


def wait(programs: list[Program], timeout: float) -> list[int]:
    """Return the exit statuses; when a program fails or time is up, kill the others, as torchrun does."""
    deadline = time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in programs) and not any(p.poll() for p in programs):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        grace = time.monotonic() + 10  # the other ranks may be about to report the same failure
        while any(p.poll() is None for p in programs) and any(p.poll() for p in programs):
            if time.monotonic() > grace:
                break
            time.sleep(0.01)
    finally:
        for program in programs:
            program.kill()
    return [program.wait() for program in programs]


def run(
    *argv: str,
    ranks: int = 0,
    typed: str = "",
    expect: int | None = 0,
    env: dict[str, str] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGV``, as `ranks` ranks if given, and check its exit status (1 if any rank failed)."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors, stdin = (Path(folder, name) for name in ("output.txt", "errors.txt", "typed.txt"))
        stdin.write_text(typed)
        if ranks:
            programs = start_ranks(ranks, *argv, output=output, errors=errors, env=env)
        else:
            programs = [start(*argv, output=output, errors=errors, typed=stdin, env=env)]
        statuses = wait(programs, timeout)
        said = [path.read_text(errors="replace") if path.exists() else "" for path in (output, errors)]
    status = int(any(statuses)) if ranks else statuses[0]
    assert expect is None or status == expect, f"exit {statuses}\n{said[0][-3000:]}\n{said[1][-6000:]}"
    return subprocess.CompletedProcess(argv, status, *said)


def free_port() -> int:
    """Return a free port for a rendezvous.

    It is below the ports that the system assigns to connections, and each pytest-xdist worker has its own
    range, so that nothing else takes the port before the program does.
    """
    for port in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable")


def _ports_of_this_worker() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 10_000 + 2_000 * (worker % 10)
    return itertools.cycle(range(first + os.getpid() % 1_000, first + 2_000))


_ports = _ports_of_this_worker()


def _main(argv: tuple[str, ...], env: dict[str, str], cwd: str, typed: str, output: str, errors: str) -> None:
    """The entry point of a forked process: set up its streams and environment, then run ``python ARGV``."""
    import torch

    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, path, mode in ((0, typed, "rb"), (1, output, "ab"), (2, errors, "ab")):
        with open(path, mode) as file:
            os.dup2(file.fileno(), number)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", line_buffering=True)
    torch.set_num_threads(1)
    if argv[0] == "-m":
        sys.argv = list(argv[1:])
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(argv)
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")
