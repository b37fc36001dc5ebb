"""Hooks: code that runs at the moments of a stage without being part of the training loop.

The package's own hooks are in `train/builtin_hooks.py` and `train/meter.py`. A user's hooks are given to
`train(config, hooks=[…])` (docs/stages.md). This module imports nothing of torch or megatron-core, so that a
script can define a hook before it prepares the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_evomoe.parallel.broadcast import Step
    from megatron_evomoe.train.held_out import Score
    from megatron_evomoe.train.stage_run import StageRun
    from megatron_evomoe.train.step import StepResult


class StepHook:
    """The moments of a stage's run. Here each method does nothing; a hook overrides those that it needs.

    Every rank calls every method, so a hook may communicate, as long as it does so on all ranks alike. An
    exception in a hook ends the run as an exception of the step does: the checkpoints stay as they were.
    """

    def begin_stage(self, run: StageRun) -> None:
        """Model, optimizer and schedule are built and loaded; no step has been taken since."""

    def begin_step(self, run: StageRun, step: int) -> None:
        """Step `step` (the first is 1) begins: its samples are read next."""

    def after_data(self, run: StageRun, batch: Step) -> None:
        """This rank has its part of the step's samples; forward and backward come next."""

    def after_step(self, run: StageRun, result: StepResult) -> None:
        """The optimizer has taken step `run.step`. Numbers given to `run.add_metrics` are logged with it."""

    def before_save(self, run: StageRun) -> None:
        """A checkpoint of step `run.step` is written next."""

    def after_save(self, run: StageRun, path: Path) -> None:
        """The checkpoint `path` has been published. With `async_save` that is some steps after its own."""

    def after_measure(self, run: StageRun, scores: dict[str, Score]) -> None:
        """The stage's last checkpoint is saved and held-out accuracy measured (empty without `eval_data`)."""

    def end_stage(self, run: StageRun) -> None:
        """The stage ends, at its last step, at an early stop or by an exception. For what must be closed."""


class HookChain:
    """Several hooks as one, in a fixed order.

    Hooks nest as `with` blocks do: `begin_stage` and `begin_step` run from the first hook to the last, all
    other moments from the last to the first.
    """

    def __init__(self, hooks: Sequence[StepHook]) -> None:
        self._inward = tuple(hooks)
        self._outward = self._inward[::-1]

    @contextlib.contextmanager
    def stage(self, run: StageRun) -> Iterator[None]:
        """Context of a stage: `begin_stage` on entry, `end_stage` on exit for every hook that began."""
        with contextlib.ExitStack() as ends:
            for hook in self._inward:
                hook.begin_stage(run)
                ends.callback(hook.end_stage, run)
            yield

    def begin_step(self, run: StageRun, step: int) -> None:
        """See `StepHook.begin_step`."""
        for hook in self._inward:
            hook.begin_step(run, step)

    def after_data(self, run: StageRun, batch: Step) -> None:
        """See `StepHook.after_data`."""
        for hook in self._outward:
            hook.after_data(run, batch)

    def after_step(self, run: StageRun, result: StepResult) -> None:
        """See `StepHook.after_step`."""
        for hook in self._outward:
            hook.after_step(run, result)

    def before_save(self, run: StageRun) -> None:
        """See `StepHook.before_save`."""
        for hook in self._outward:
            hook.before_save(run)

    def after_save(self, run: StageRun, path: Path) -> None:
        """See `StepHook.after_save`."""
        for hook in self._outward:
            hook.after_save(run, path)

    def after_measure(self, run: StageRun, scores: dict[str, Score]) -> None:
        """See `StepHook.after_measure`."""
        for hook in self._outward:
            hook.after_measure(run, scores)
