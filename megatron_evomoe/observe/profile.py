"""``--profile``: the time that a few steps of a stage spend in each kernel and each phase.

`phase` marks a phase where it happens; it costs one comparison while nothing is profiled. Forward and
backward of a microbatch run inside megatron-core's schedules, which call timers around them: an object in the
place of these timers marks the two phases.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_evomoe.config import TrainConfig
from megatron_evomoe.parallel import backend

log = logging.getLogger(__name__)

PHASES = ("data", "forward", "backward", "optimizer", "evolution", "save")
"""The names of the ranges, in the order of a step."""

_CORE_NAMES = {"forward-compute": "forward", "backward-compute": "backward"}
_ROWS = 60  # of the table of operators
_OFF: AbstractContextManager[None] = contextlib.nullcontext()
_window: _Window | None = None  # of the process, as torch's profiler is


def phase(name: str) -> AbstractContextManager[None]:
    """Context that marks its block as `name`, in the trace and for NVTX, while a stage is profiled."""
    return _OFF if _window is None else _range(name)


def begin_step(step: int) -> None:
    """Begin the range of step `step` and end that of the step before, which includes its save."""
    if _window is not None:
        _window.begin_step(step)


@contextlib.contextmanager
def profiling(config: TrainConfig, modules: Sequence[Any], folder: Path, stage: str) -> Iterator[None]:
    """Context that traces the steps from `profile_step_start` to `profile_step_end` - 1 on `profile_ranks`.

    Args:
        modules: the stage's model chunks on this rank.
        folder: where the trace and the table are written.
    """
    global _window
    if not config.profile or dist.get_rank() not in config.profile_ranks:
        yield
        return
    timers = _ScheduleTimers()
    for module in modules:
        module.config.timers = timers
    _window = _Window(config, folder, stage)
    try:
        yield
    finally:
        _window.close()
        _window = None
        for module in modules:
            module.config.timers = None


class _Window:
    """The traced steps of one stage."""

    def __init__(self, config: TrainConfig, folder: Path, stage: str) -> None:
        self._folder, self._stage = folder, stage
        self._start, self._end = config.profile_step_start, config.profile_step_end
        self._steps: list[int] = []
        self._profiler: Any = None
        self._mark = contextlib.ExitStack()

    def begin_step(self, step: int) -> None:
        self._mark.close()
        if step >= self._end:
            self._finish()
        elif step >= self._start - 1 and self._profiler is None:
            # one step early if possible: starting CUPTI takes long and would count as time of the first step
            self._profiler = torch.profiler.profile(activities=_activities(), record_shapes=True)
            self._profiler.prepare_trace()
        if self._start <= step < self._end:
            if not self._steps:
                self._profiler.start_trace()
            self._steps.append(step)
            self._mark.enter_context(_range(f"step {step}"))

    def close(self) -> None:
        self._mark.close()
        self._finish()
        if not self._steps:
            log.warning(
                "stage %s took none of the steps %d to %d, so nothing of it was profiled; choose others with "
                "--profile-step-start and --profile-step-end",
                self._stage,
                self._start,
                self._end - 1,
            )

    def _finish(self) -> None:
        if self._profiler is None:
            return
        if not self._steps:
            self._profiler.start_trace()  # torch's profiler can be stopped only after a start
        self._profiler.stop_trace()
        if self._steps:
            self._write()
        self._profiler = None

    def _write(self) -> None:
        name = f"{self._stage}-rank{dist.get_rank()}-steps{self._steps[0]}-{self._steps[-1]}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        (self._folder / f"{name}.txt").write_text(_tables(self._profiler.key_averages(), len(self._steps)))


class _ScheduleTimers:
    """Takes the place of megatron-core's timers (`core.timers.Timers`) and turns each timing into a range."""

    def __init__(self) -> None:
        self._open: list[AbstractContextManager[None]] = []

    def __call__(self, name: str, log_level: int | None = None) -> _ScheduleTimers:
        self._named = _CORE_NAMES.get(name, name)
        return self

    def start(self, barrier: bool = False) -> None:
        """Begin the range named by the preceding call, without a barrier, which would change the timing."""
        opened = _range(self._named)
        opened.__enter__()
        self._open.append(opened)

    def stop(self, barrier: bool = False) -> None:
        """End the range that was begun last; megatron-core nests its timings."""
        self._open.pop().__exit__(None, None, None)


@contextlib.contextmanager
def _range(name: str) -> Iterator[None]:
    nvtx = torch.cuda.nvtx.range(name) if backend.on_gpu() else _OFF
    with nvtx, torch.profiler.record_function(name):
        yield


def _activities() -> list[torch.profiler.ProfilerActivity]:
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CPU, kinds.CUDA] if backend.on_gpu() else [kinds.CPU]


def _tables(averages: Any, steps: int) -> str:
    """Time by phase, then by operator and kernel, the longest first."""
    lines = [f"{steps} step(s). Host time by phase; on a GPU its kernels may end later, see the trace.", ""]
    by_name = {event.key: event for event in averages}
    for name in PHASES:
        if event := by_name.get(name):
            lines.append(
                f"{name:<10} {event.count:>5} x  {event.cpu_time_total / 1000 / steps:>10.3f} ms a step"
            )
    by = "self_cuda_time_total" if backend.on_gpu() else "self_cpu_time_total"
    return "\n".join(lines) + "\n\n" + averages.table(sort_by=by, row_limit=_ROWS) + "\n"
