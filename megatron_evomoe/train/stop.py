"""Ends a run early, on all ranks at the same step.

A signal, a time limit, a number of steps, or the death of the launcher ends the run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.managers import SyncManager
from types import FrameType

import torch
import torch.distributed as dist

from megatron_evomoe.config import TrainConfig
from megatron_evomoe.parallel import backend
from megatron_evomoe.train.helper_process import SIGNALS, only_follow_parent

_TIME, _STEPS, _ORPHANED = 1000, 1001, 1002  # codes above every signal number


class StopRequests:
    """Records requests to stop this rank. They take effect in `agreed`, so a step is never interrupted.

    Args:
        config: `exit_signal_handler`, `exit_duration_in_mins` (counted from here), `exit_interval`.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config, self._started, self._owner = config, time.monotonic(), os.getpid()
        self._code = 0
        # only for torchrun's workers: a process started by hand may outlive its shell (nohup, setsid)
        self._launcher = os.getppid() if dist.is_torchelastic_launched() else None
        self._previous = {}
        if config.exit_signal_handler:
            _shield_helpers()
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # in a fork of this process the signal has its default effect
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._code = number

    def restore(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def agreed(self, step: int | None = None) -> str | None:
        """Why all ranks stop now, or none. Communicates: every rank calls it after the same step.

        step: none between stages.
        """
        limit = self._config.exit_duration_in_mins
        if not self._code and limit is not None and time.monotonic() - self._started > limit * 60:
            self._code = _TIME
        if not self._code and step and self._config.exit_interval and step % self._config.exit_interval == 0:
            self._code = _STEPS
        if not self._code and self._launcher is not None and os.getppid() != self._launcher:
            self._code = _ORPHANED  # torchrun was killed and can neither end nor restart this run
        code = torch.tensor(self._code, device=backend.device())
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        return self._name(int(code.item()))

    def _name(self, code: int) -> str | None:
        if code == _TIME:
            return f"the limit of {self._config.exit_duration_in_mins:g} minutes"
        if code == _STEPS:
            return f"exit_interval {self._config.exit_interval}"
        if code == _ORPHANED:
            return "the end of torchrun, which left its ranks behind"
        return signal.Signals(code).name if code else None


def _shield_helpers() -> None:
    """Keep signals meant for this rank from its helpers.

    torchrun signals a rank's whole process group. A save or a loader whose helper has died fails, so that
    nothing would be saved.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        # megatron-core starts this server at the first save and keeps it
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=only_follow_parent)
        filesystem_async._results_queue = manager.Queue()
    global _forks_leave
    if not _forks_leave:
        os.register_at_fork(
            after_in_child=os.setpgrp
        )  # data workers and writers; what is sent to them alone still arrives
        _forks_leave = True


_forks_leave = False
