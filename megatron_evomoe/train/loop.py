"""The training loop: stages one after the other, each step in the order it happens."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_evomoe.config import RunConfig, StageConfig
from megatron_evomoe.observe.heartbeat import CollectiveError
from megatron_evomoe.train import stage_report
from megatron_evomoe.train.alarm import Alarm
from megatron_evomoe.train.beginning import open_stage
from megatron_evomoe.train.held_out import measure
from megatron_evomoe.train.hooks import StepHook
from megatron_evomoe.train.run_lock import RunLock
from megatron_evomoe.train.session import Session, open_session, run_folder, selected
from megatron_evomoe.train.stage_run import StageRun
from megatron_evomoe.train.step import take_step
from megatron_evomoe.train.stop import StopRequests


def train(config: RunConfig, stage_names: list[str] | None = None, hooks: Sequence[StepHook] = ()) -> Session:
    """Run the configuration's stages (or those named) to their end, resuming what was begun. Communicates.

    Returns early, with everything saved, when a signal or a limit asks for it (train/stop.py).

    Args:
        hooks: called at the moments of every stage, beside the package's own (train/hooks.py).
    """
    stop = StopRequests(config.train)
    try:
        # while rank 0 waits for the lock, the other ranks wait for rank 0 in a collective
        patience = 30 * config.parallel.distributed_timeout_minutes
        with Alarm(run_folder(config)) as alarm, RunLock(run_folder(config), patience) as lock:
            session = open_session(config, hooks, lock.check)
            _train_stages(session, stage_names, stop, alarm)
            lock.verify()
            return session
    finally:
        stop.restore()


def _train_stages(session: Session, stage_names: list[str] | None, stop: StopRequests, alarm: Alarm) -> None:
    try:
        for stage in selected(session.config, stage_names):
            if reason := stop.agreed() or train_stage(session, stage, stop):
                session.logger.say(f"exiting on {reason}; the same command goes on from here")
                session.logger.event("stop", reason=reason)
                return
        stage_report.print_table(session)
    except BaseException as error:
        explanation = session.heartbeat.explain(error)
        failure = CollectiveError(explanation) if explanation else error
        alarm.sound(failure)  # before anything is closed, which may take its time
        if explanation:
            raise failure from error
        raise
    finally:
        session.heartbeat.close()
        session.logger.close()


def train_stage(session: Session, stage: StageConfig, stop: StopRequests) -> str | None:
    """Train one stage from wherever its folder says it is, save, and measure held-out accuracy. Communicates.

    Returns:
        Why it ended before its last step (saved all the same), or none.
    """
    run = open_stage(session, stage, stop)
    if run is None:
        return None
    with run.hooks.stage(run):
        if reason := take_steps(run):
            return reason
        run.hooks.after_measure(run, measure(run))
        run.poll_saves(wait=True)
    return None


def take_steps(run: StageRun) -> str | None:
    """Take the steps that are left, and save after the last. Communicates.

    Returns:
        Why the stage was stopped before its last step (saved all the same), or none.
    """
    if not run.has_steps_left:
        return None
    run.record.finished = False
    if reason := run.open_samples():
        return reason
    while not run.is_at_last_step:
        run.hooks.begin_step(run, run.step + 1)
        batch = run.next_batch()
        run.hooks.after_data(run, batch)
        result = take_step(run.built, batch, run.step + 1)
        run.count_step()
        run.hooks.after_step(run, result)
        run.log_metrics()
        run.poll_saves()
        reason = run.stop_reason()
        if reason or run.is_save_due:
            run.save()
        if reason:
            run.poll_saves(wait=True)
            return reason
    run.record.finished = True
    run.save()
    return None
