"""Commands of one process, each in a process of its own that is forked from one with everything imported: one
second, not five.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path

from megatron_evomoe.parallel import backend
from tests.integration import conftest

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.integration.preload"])


def run(*argv: str, expect: int = 0, folder: Path) -> str:
    """What ``python -m megatron_evomoe ARGV`` prints, with one thread; checks the status. `folder` takes the
    output meanwhile.
    """
    if backend.on_gpu():  # CUDA cannot be forked
        done = conftest.run(*argv, expect=expect)
        return done.stdout + done.stderr
    output = folder / "output.txt"
    child = _server.Process(target=_main, args=(argv, str(output)))
    child.start()
    child.join(timeout=300)
    text = output.read_text()
    assert child.exitcode == expect, f"exit {child.exitcode}\n{text[-6000:]}"
    return text


def _main(argv: tuple[str, ...], output: str) -> None:
    import torch

    from megatron_evomoe import cli

    os.environ |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with (
        open(output, "w", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        status = cli.main(list(argv))
    sys.exit(status)
