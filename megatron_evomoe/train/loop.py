"""The training loop: stages one after the other, each step in the order it happens."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_evomoe.checkpoint import find, run_id, store
from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.config import RunConfig, StageConfig
from megatron_evomoe.config.kinds import MIXTURE_KINDS, StageKind
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.diagnose import collect
from megatron_evomoe.observe import profile
from megatron_evomoe.observe.heartbeat import CollectiveError
from megatron_evomoe.parallel import broadcast, rng, topology
from megatron_evomoe.train import evaluate, report, resume, vision_cache
from megatron_evomoe.train.alarm import Alarm
from megatron_evomoe.train.build import Built, build_stage
from megatron_evomoe.train.optimizer import course
from megatron_evomoe.train.run_lock import RunLock
from megatron_evomoe.train.session import (
    Session,
    earlier_stage,
    open_session,
    questions,
    run_folder,
    selected,
    stage_dir,
    train_loader,
)
from megatron_evomoe.train.step import take_step
from megatron_evomoe.train.stop import StopRequests
from megatron_evomoe.train.training_set import training_set
from megatron_evomoe.train.transition import start_from

log = logging.getLogger(__name__)


def train(config: RunConfig, stage_names: list[str] | None = None) -> Session:
    """Run the configuration's stages (or those named) to their end, resuming what was begun. Communicates.

    Leaves early, with everything saved, when a signal or a limit asks for it (train/stop.py).
    """
    stop = StopRequests(config.train)
    try:
        # others wait for rank 0 in a collective while it waits for the lock
        patience = 30 * config.parallel.distributed_timeout_minutes
        with Alarm(run_folder(config)) as alarm, RunLock(run_folder(config), patience) as lock:
            session = _train_stages(open_session(config, lock.check), stage_names, stop, alarm)
            lock.verify()
            return session
    finally:
        stop.restore()


def _train_stages(
    session: Session, stage_names: list[str] | None, stop: StopRequests, alarm: Alarm
) -> Session:
    try:
        for stage in selected(session.config, stage_names):
            if reason := stop.agreed() or train_stage(session, stage, stop):
                session.logger.say(f"exiting on {reason}; the same command goes on from here")
                session.logger.event("stop", reason=reason)
                return session
        report.stage_table(session)
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
    return session


def train_stage(session: Session, stage: StageConfig, stop: StopRequests) -> str | None:
    """Train one stage from wherever its folder says it is, save, and measure held-out accuracy. Communicates.

    Returns:
        Why it ended before its last step (saved all the same), or none.
    """
    config = session.config.for_stage(stage.name)
    if (
        report.is_measured(session, stage.name)
        and (done := _finished(session, stage))
        and not resume.goes_on(session, done, stage, config)
    ):
        return None
    found = _checkpoint_of(session, stage, config)
    session.heartbeat.enter("setup", 0, stage.name)
    samples = (
        training_set(config, session.topology) if found is None or _has_steps_left(found, config) else None
    )
    comparison = resume.compare(session, found, stage, config, samples and samples.data) if found else None
    topology.seed_everything(config.train.seed)
    built = build_stage(config, stage)
    record = (
        _resume(session, found, built, stage, comparison) if found else _begin(session, built, stage, config)
    )
    record.data = samples.data if samples else record.data
    session.logger.say(f"stage {stage.name}: {course(built.scheduler, config.train.train_iters)}")
    session.logger.start_stage(stage.name, config.train.train_iters, record.step)
    session.heartbeat.enter("setup", record.step)
    meter = report.StageMeter(session, built, config, stage)
    if samples is not None:
        record.finished = False
        with profile.profiling(config.train, built.modules, session.run_dir / "profile", stage.name):
            reason = _take_steps(session, built, record, config, stage, stop, meter, samples.dataset)
        if reason:
            return reason
        record.finished = True
        _save(session, built, record, stage)
    _measure(session, built, config, stage, record.step, meter)
    _announce(session, stage, session.saver.poll(wait=True))
    return None


def _take_steps(
    session: Session,
    built: Built,
    record: Record,
    config: RunConfig,
    stage: StageConfig,
    stop: StopRequests,
    meter: report.StageMeter,
    dataset: ShardDataset | None,
) -> str | None:
    """From `record.step` to the stage's last step, or to where `stop` ends it (saved). Communicates."""
    features = vision_cache.open_cache(session, built, config, dataset)
    if reason := vision_cache.complete(features, session, built, config, stop):
        return reason
    loader = train_loader(session, config, dataset, start_position=record.position, features=features)
    batches = iter(loader) if loader is not None else None
    while record.step < config.train.train_iters:
        profile.begin_step(record.step + 1)
        started = time.perf_counter()
        built.clock.start()
        session.heartbeat.enter("data", record.step + 1)
        with profile.phase("data"):
            batch = next_step(batches, session, config)
        session.heartbeat.enter("step")
        result = take_step(built, batch, record.step + 1)
        built.clock.stop()
        record.step += 1
        record.position += config.train.global_batch_size
        with profile.phase("evolution"):
            built.evolve(record.step, config.train.seed)
        meter.add(record.step, result, time.perf_counter() - started, loader)
        _announce(session, stage, session.saver.poll())
        reason = stop.agreed(record.step) if record.step < config.train.train_iters else None
        if reason or _is_due(record.step, config):
            _save(session, built, record, stage)
        if reason:
            _announce(session, stage, session.saver.poll(wait=True))
            return reason
    return None


def next_step(batches: Iterator[Any] | None, session: Session, config: RunConfig) -> broadcast.Step:
    """The step's samples on this rank. Communicates within the replica."""
    step = None
    if batches is not None:
        micro = next(batches).microbatches
        step = broadcast.Step(
            tokens=torch.stack([m["tokens"] for m in micro]),
            labels=torch.stack([m["labels"] for m in micro]),
            token_types=torch.stack([m["token_types"] for m in micro]),
            images=[m["images"] for m in micro],
            keys=[m["keys"] for m in micro],
        )
    return broadcast.to_replica(step, session.topology, config)


def _begin(session: Session, built: Built, stage: StageConfig, config: RunConfig) -> Record:
    """Weights from where the stage starts; a record at step 0."""
    source_path = _source(session, stage, config)
    lineage: list[records.Ancestor] = []
    if source_path is not None:
        source_path = find.resolve(source_path)
        comparison = resume.compare_source(
            source_path, find.record_of(source_path), stage, config, session.fingerprint
        )
        source, fresh = start_from(source_path, built, config, stage, fingerprint=session.fingerprint)
        lineage = [
            *source.lineage,
            {
                "stage": source.stage,
                "kind": source.kind,
                "step": source.step,
                "path": str(source_path),
                "run_id": source.run_id,
            },
        ]
    else:
        comparison, fresh = resume.Comparison(), ["the whole model"]
        for mlp in built.evolving:
            mlp.begin()
    session.logger.rewind(stage.name, 0)  # lines of an attempt that ended before its first checkpoint
    session.logger.event(
        "begin",
        stage=stage.name,
        source=str(source_path) if source_path else None,
        fresh=fresh,
        **comparison.fields(),
    )
    session.logger.say(
        f"stage {stage.name}: begins from {source_path or 'fresh weights alone'}"
        + (f"; starts fresh: {', '.join(fresh)}" if source_path and fresh else "")
    )
    if line := comparison.line():
        session.logger.say(f"stage {stage.name}: other than in {source_path}: {line}")
    return Record(
        stage=stage.name,
        kind=stage.kind.value,
        step=0,
        position=0,
        finished=False,
        layout=rng.layout(),
        vocab_size=config.language.vocab_size or 0,
        tokenizer_fingerprint=session.fingerprint,
        run_id=session.run_id,
        wandb_run_id=session.logger.wandb_run_id,
        lineage=lineage,
        num_experts=config.moe.num_experts if stage.kind in MIXTURE_KINDS else 0,
    )


def _source(session: Session, stage: StageConfig, config: RunConfig) -> str | Path | None:
    """Where a beginning stage takes its weights. Communicates.

    Raises:
        CheckpointError: the stage of this run that it starts from has no good checkpoint of its last step.
    """
    before = _parent(session, stage)
    if stage.load and before is None:
        return stage.load
    if before is None:
        return config.checkpoint.pretrained_checkpoint or config.checkpoint.load
    folder = stage_dir(session.run_dir, before)
    load = config.checkpoint.load
    if load is not None and not folder.is_dir() and (Path(load) / before.name).is_dir():
        folder = Path(load) / before.name
    path = find.resolve(folder, _owner(session, before, folder))
    record = find.record_of(path)
    if not record.finished:
        raise CheckpointError(
            f"stage {stage.name!r} starts from the end of stage {before.name!r}, whose newest good "
            "checkpoint is "
            f"{path}; delete any damaged one after it and run {before.name!r} again, or set `load: {path}`"
        )
    _check_lineage(session, before, path, record)
    return path


def _check_lineage(session: Session, stage: StageConfig, path: Path, record: Record) -> None:
    """A checkpoint of this run must have come from the stage that the configuration puts before it.

    Raises:
        CheckpointError: it came from another.
    """
    parent = _parent(session, stage)
    if parent is None or not record.run_id:  # from outside the run; or a record that names no run
        return
    last = record.lineage[-1] if record.lineage else None
    if last is not None and last.get("run_id") == record.run_id and last["stage"] != parent.name:
        raise CheckpointError(
            f"{path} began from stage {last['stage']!r}, and this run's stage {stage.name!r} begins from "
            f"{parent.name!r}; run {stage.name!r} again in another --save, or set `load: {path}` to use it "
            "as is"
        )


def _parent(session: Session, stage: StageConfig) -> StageConfig | None:
    """The stage of this run that `stage` starts from, or none if it starts from elsewhere."""
    named = next((s for s in session.config.stages if s.name == stage.load), None)
    return named if stage.load else earlier_stage(session.config, stage)


def _owner(session: Session, stage: StageConfig, folder: Path) -> find.Owner:
    """Whose the checkpoints in a stage's folder are: this run's or, under `load`, those of the run they lie
    in.
    """
    run_dir = folder.parent
    if run_dir == session.run_dir:
        return session.owner(stage)
    return find.Owner(stage.name, run_id.of_other(run_dir))


def _finished(session: Session, stage: StageConfig) -> Path | None:
    """The stage's newest checkpoint if it is that of its last step. Communicates."""
    found = [None]
    if session.topology.rank == 0:
        path = find.latest(stage_dir(session.run_dir, stage), session.owner(stage))
        found = [path if path and records.read(path).finished else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _checkpoint_of(session: Session, stage: StageConfig, config: RunConfig) -> Path | None:
    """Where the stage goes on from: its newest good checkpoint under `save`, else under `load`.
    Communicates.
    """
    step, load = config.checkpoint.ckpt_step, config.checkpoint.load
    own = stage_dir(session.run_dir, stage)
    wants_own = step is None or load is None or (own / f"iter_{step:07d}").exists()
    found = find.newest_good(own, step, session.owner(stage)) if wants_own else None
    if found is None and load is not None and (other := Path(load) / stage.name).is_dir():
        found = find.newest_good(other, step, _owner(session, stage, other))
    return found


def _has_steps_left(found: Path, config: RunConfig) -> bool:
    record = find.record_of(found)
    return not record.finished or record.step < config.train.train_iters


def _resume(
    session: Session, found: Path, built: Built, stage: StageConfig, comparison: resume.Comparison
) -> Record:
    record = find.record_of(found)
    _check_lineage(session, stage, found, record)
    store.load_training_state(
        found,
        modules=built.modules,
        optimizer=built.optimizer,
        scheduler=built.scheduler,
        record=record,
        is_own=found.parent.parent == session.run_dir,
    )
    session.logger.rewind(stage.name, record.step)
    if schedule := str(built.scheduler):
        comparison.notes.append(schedule)
    session.logger.event(
        "resume", stage=stage.name, step=record.step, checkpoint=str(found), **comparison.fields()
    )
    session.logger.say(f"stage {stage.name}: resumed at step {record.step} from {found}")
    if line := comparison.line():
        session.logger.say(f"stage {stage.name}: other than in the checkpoint: {line}")
    record.layout, record.run_id = rng.layout(), session.run_id
    return record


def _is_due(step: int, config: RunConfig) -> bool:
    every = config.checkpoint.save_interval
    return (
        every > 0 and step % every == 0 and step < config.train.train_iters
    )  # the last step is saved anyway


def _save(session: Session, built: Built, record: Record, stage: StageConfig) -> None:
    if session.config.checkpoint.save is not None:
        session.heartbeat.enter("save")
        session.logger.flush()  # what a resume from here will not log again
        with profile.phase("save"):
            _announce(session, stage, session.saver.poll(wait=True))  # one save at a time
            path = session.saver.save(
                stage_dir(session.run_dir, stage),
                modules=built.gather_weights(),
                optimizer=built.optimizer,
                scheduler=built.scheduler,
                record=record,
                config_yaml=session.config.to_yaml(),
            )
        _announce(session, stage, path)


def _announce(session: Session, stage: StageConfig, published: Path | None) -> None:
    if published is not None:
        session.logger.event(
            "save", stage=stage.name, step=int(published.name[5:]), checkpoint=str(published)
        )


def _measure(
    session: Session, built: Built, config: RunConfig, stage: StageConfig, step: int, meter: report.StageMeter
) -> None:
    """Held-out accuracy, seeing, blind and with shuffled routing, and what the experts do. Communicates."""
    session.heartbeat.enter("evaluate")
    asked = questions(session, config, config.train.eval_samples)
    if not asked:
        meter.finish({})
        return
    built.gather_weights()
    ask = functools.partial(
        evaluate.exact_match,
        built.wrapped,
        asked,
        session.tokenizer,
        stop=session.stop_ids(config),
        batch_size=config.train.eval_batch_size,
    )
    mixtures = built.mixtures()
    with collect.watching(mixtures, config) as watch:
        scores = {"accuracy": ask()}
    scores["blind"] = ask(blind=True)
    if stage.kind == StageKind.ROUTE:
        collect.save(
            session.run_dir, stage.name, step, watch, mixtures, config, is_main=session.topology.rank == 0
        )
        for i in range(config.train.eval_shuffles):
            with collect.shuffled(mixtures, seed=config.train.seed + i):
                scores[f"shuffled {i + 1}"] = ask()
    meter.finish(scores)
