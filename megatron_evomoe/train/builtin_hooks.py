"""The hooks of every run, and the order of all of a run's hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch.distributed as dist

from megatron_evomoe.observe import profile
from megatron_evomoe.parallel.broadcast import Step
from megatron_evomoe.train.hooks import HookChain, StepHook
from megatron_evomoe.train.meter import MeterHook
from megatron_evomoe.train.stage_run import StageRun
from megatron_evomoe.train.step import StepResult


def stage_hooks(users: Sequence[StepHook]) -> HookChain:
    """The hooks of one stage: the package's own around those of the user, evolution innermost.

    So evolution follows the update at once, a user's hook sees the evolved experts, and the meter's
    `iteration-time` includes the time that a user's hooks take.
    """
    return HookChain([ProfilerHook(), StragglerHook(), MeterHook(), HeartbeatHook(), *users, EvolutionHook()])


class ProfilerHook(StepHook):
    """Traces the steps that ``--profile`` asks for, from `begin_step` to the next one's."""

    def __init__(self) -> None:
        self._profiling = contextlib.ExitStack()

    def begin_stage(self, run: StageRun) -> None:
        """Prepare the trace if steps are left."""
        if run.has_steps_left:
            folder = run.session.run_dir / "profile"
            self._profiling.enter_context(
                profile.profiling(run.config.train, run.built.modules, folder, run.stage.name)
            )

    def begin_step(self, run: StageRun, step: int) -> None:
        """Begin the step's range, and end the one before it."""
        profile.begin_step(step)

    def after_step(self, run: StageRun, result: StepResult) -> None:
        """Write the trace after the last step: the stage's final save is not part of it."""
        if run.is_at_last_step:
            self._profiling.close()

    def end_stage(self, run: StageRun) -> None:
        """Write the trace of a stage that ends early."""
        self._profiling.close()


class StragglerHook(StepHook):
    """Times this rank's own part of each step, and logs the slowest rank every `log_interval` steps."""

    def begin_step(self, run: StageRun, step: int) -> None:
        """Start the clock."""
        run.built.clock.start()

    def after_step(self, run: StageRun, result: StepResult) -> None:
        """Stop the clock. Communicates if the slowest rank is to be logged."""
        run.built.clock.stop()
        if run.step % run.config.log.log_interval == 0 and dist.get_world_size() > 1:
            run.add_metrics(run.built.clock.report())


class HeartbeatHook(StepHook):
    """Tells the heartbeat which phase of a step this rank is in."""

    def begin_step(self, run: StageRun, step: int) -> None:
        """Report that the rank waits for samples."""
        run.session.heartbeat.enter("data", step)

    def after_data(self, run: StageRun, batch: Step) -> None:
        """Report that the rank computes."""
        run.session.heartbeat.enter("step")

    def before_save(self, run: StageRun) -> None:
        """Report that the rank writes its part of a checkpoint."""
        run.session.heartbeat.enter("save")


class EvolutionHook(StepHook):
    """Updates experts 2…N from expert 1 after each optimizer step of an `evolve` stage."""

    def after_step(self, run: StageRun, result: StepResult) -> None:
        """Update the experts. Communicates, as `Built.gather_weights`."""
        with profile.phase("evolution"):
            run.built.evolve(run.step, run.config.train.seed)
