"""``--profile``: what a few steps of a stage spend their time on, kernel by kernel and phase by phase.

Ranges are placed where a phase happens (`phase`) and cost one comparison while nothing is profiled. Forward
and backward of a microbatch lie inside megatron-core's schedules; they are marked by standing in for the
timers those would call.
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
"""Names of the ranges, in the order a step meets them."""

_CORE_NAMES = {"forward-compute": "forward", "backward-compute": "backward"}
_ROWS = 60  # of the table of operators
_OFF: AbstractContextManager[None] = contextlib.nullcontext()
_window: _Window | None = None  # of the process, as torch's profiler is


def phase(name: str) -> AbstractContextManager[None]:
    """Mark what runs inside as `name`, in the trace and for NVTX; nothing while no stage is profiled."""
    return _OFF if _window is None else _range(name)


def begin_step(step: int) -> None:
    """Step `step` of the stage begins, and the one before it, its save included, has ended."""
    if _window is not None:
        _window.begin_step(step)


@contextlib.contextmanager
def profiling(
    config: TrainConfig, modules: Sequence[torch.nn.Module], folder: Path, stage: str
) -> Iterator[None]:
    """Trace the steps of ``config.profile_step_start`` … that begin inside, on the ranks asked for.

    modules: the stage's model chunks. folder: where the trace and the table go.
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
    """The steps from `profile_step_start` up to `profile_step_end`, as far as the stage takes them."""

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
            # one step early where there is one: starting CUPTI takes long, and would be in the first step's
            # time
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
            self._profiler.start_trace()  # prepared and never begun: torch can only be stopped after a start
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
    """Stands where megatron-core expects its timers (`core.timers.Timers`): what it would time becomes a
    range.
    """

    def __init__(self) -> None:
        self._open: list[AbstractContextManager[None]] = []

    def __call__(self, name: str, log_level: int | None = None) -> _ScheduleTimers:
        self._named = _CORE_NAMES.get(name, name)
        return self

    def start(self, barrier: bool = False) -> None:
        """Begin the range named by the call before; no barrier, which would change what is measured."""
        opened = _range(self._named)
        opened.__enter__()
        self._open.append(opened)

    def stop(self, barrier: bool = False) -> None:
        """End the range begun last: the core's nest."""
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
    """Phases, then operators and kernels, those that take longest first."""
    lines = [f"{steps} step(s). Host time by phase; on a GPU its kernels may end later, see the trace.", ""]
    by_name = {event.key: event for event in averages}
    for name in PHASES:
        if event := by_name.get(name):
            lines.append(
                f"{name:<10} {event.count:>5} x  {event.cpu_time_total / 1000 / steps:>10.3f} ms a step"
            )
    by = "self_cuda_time_total" if backend.on_gpu() else "self_cpu_time_total"
    return "\n".join(lines) + "\n\n" + averages.table(sort_by=by, row_limit=_ROWS) + "\n"
