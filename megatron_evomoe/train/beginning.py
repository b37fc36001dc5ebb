"""How a stage begins: its model is built, and loaded from its own checkpoint or from what it starts from."""

from __future__ import annotations

from pathlib import Path

from megatron_evomoe.checkpoint import find, store
from megatron_evomoe.checkpoint.record import Record, TrainingData
from megatron_evomoe.config import RunConfig, StageConfig
from megatron_evomoe.parallel import rng, topology
from megatron_evomoe.train import data_order, lineage, resume_check, stage_report
from megatron_evomoe.train.built import Built, build_stage
from megatron_evomoe.train.builtin_hooks import stage_hooks
from megatron_evomoe.train.optimizer import course
from megatron_evomoe.train.session import Session
from megatron_evomoe.train.stage_run import StageRun
from megatron_evomoe.train.stop import StopRequests
from megatron_evomoe.train.training_set import training_set
from megatron_evomoe.train.transition import start_from


def open_stage(session: Session, stage: StageConfig, stop: StopRequests) -> StageRun | None:
    """Build a stage's model and load the checkpoint that it resumes or begins from. Communicates.

    Returns:
        None if the stage has taken its last step and has been measured.

    Raises:
        CheckpointError: on every rank: no checkpoint is good, or it does not fit this run, model or data.
        ConfigError: on every rank: there are no samples, or they cannot be read.
    """
    config = session.config.for_stage(stage.name)
    if _is_complete(session, stage, config):
        return None
    found = lineage.own_checkpoint(session, stage, config)
    session.heartbeat.enter("setup", 0, stage.name)
    samples = None
    if found is None or _has_steps_left(found, config):
        samples = training_set(session, config)
    data = samples.data if samples else None
    resumed = None
    if found is not None:
        data = data and data_order.resumed(data, find.record_of(found))
        resumed = found, resume_check.compare(session, found, stage, config, data)
    topology.seed_everything(config.train.seed)
    built = build_stage(config, stage)
    if resumed is not None:
        record = _resume(session, built, stage, *resumed)
        record.data = data or record.data
    else:
        assert data is not None, "a stage that begins has steps left"
        record = _begin(session, built, stage, config, data)
    session.logger.say(f"stage {stage.name}: {course(built.scheduler, config.train.train_iters)}")
    session.logger.start_stage(stage.name, config.train.train_iters, record.step)
    session.heartbeat.enter("setup", record.step)
    return StageRun(
        session=session,
        stage=stage,
        config=config,
        built=built,
        record=record,
        samples=samples,
        stop=stop,
        hooks=stage_hooks(session.hooks),
    )


def _is_complete(session: Session, stage: StageConfig, config: RunConfig) -> bool:
    """Whether the stage has been trained and measured; changes since then are logged. Communicates."""
    if not stage_report.is_measured(session, stage.name):
        return False
    found = lineage.finished_checkpoint(session, stage)
    return found is not None and not resume_check.goes_on(session, found, stage, config)


def _has_steps_left(found: Path, config: RunConfig) -> bool:
    record = find.record_of(found)
    return not record.finished or record.step < config.train.train_iters


def _resume(
    session: Session, built: Built, stage: StageConfig, found: Path, comparison: resume_check.Comparison
) -> Record:
    """Load the training state of the stage's own checkpoint; returns its record. Communicates."""
    record = find.record_of(found)
    lineage.check_lineage(session, stage, found, record)
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
        session.logger.say(f"stage {stage.name}: changed since the checkpoint: {line}")
    record.layout, record.run_id = rng.layout(), session.run_id
    return record


def _begin(
    session: Session, built: Built, stage: StageConfig, config: RunConfig, data: TrainingData
) -> Record:
    """Load the weights that the stage starts from; returns a record at step 0. Communicates."""
    path = lineage.source_checkpoint(session, stage, config)
    data, position = data_order.begun(session, stage, config, data, path)
    ancestors = []
    if path is not None:
        comparison = resume_check.compare_source(
            path, find.record_of(path), stage, config, session.fingerprint
        )
        source, fresh = start_from(path, built, config, stage, fingerprint=session.fingerprint)
        ancestors = lineage.lineage_after(source, path)
    else:
        comparison, fresh = resume_check.Comparison(), ["the whole model"]
        for mlp in built.evolving:
            mlp.begin()
    session.logger.rewind(stage.name, 0)  # lines of an attempt that ended before its first checkpoint
    session.logger.event(
        "begin",
        stage=stage.name,
        source=str(path) if path else None,
        fresh=fresh,
        **comparison.fields(),
    )
    session.logger.say(
        f"stage {stage.name}: begins from {path or 'fresh weights alone'}"
        + (f"; starts fresh: {', '.join(fresh)}" if path and fresh else "")
    )
    if line := comparison.line():
        session.logger.say(f"stage {stage.name}: changed since {path}: {line}")
    return Record(
        stage=stage.name,
        kind=stage.kind.value,
        step=0,
        position=position,
        finished=False,
        layout=rng.layout(),
        vocab_size=config.language.vocab_size or 0,
        tokenizer_fingerprint=session.fingerprint,
        run_id=session.run_id,
        wandb_run_id=session.logger.wandb_run_id,
        lineage=ancestors,
        num_experts=config.moe.num_experts if stage.kind.has_mixture else 0,
        data=data,
    )
