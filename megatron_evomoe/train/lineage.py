"""Which checkpoint a stage resumes or begins from, and whether it belongs to the right run."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_evomoe.checkpoint import find, run_id
from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.checkpoint.record import Ancestor, CheckpointError, Record
from megatron_evomoe.config import RunConfig, StageConfig
from megatron_evomoe.train.session import Session, earlier_stage, stage_dir


def finished_checkpoint(session: Session, stage: StageConfig) -> Path | None:
    """The stage's newest checkpoint if it is that of its last step. Communicates."""
    found: list[Path | None] = [None]
    if session.topology.rank == 0:
        path = find.latest(stage_dir(session.run_dir, stage), session.owner(stage))
        found = [path if path and records.read(path).finished else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def own_checkpoint(session: Session, stage: StageConfig, config: RunConfig) -> Path | None:
    """The checkpoint that the stage resumes from, or None if the stage begins.

    It is the stage's newest good checkpoint under `save`, or else under `load`. Communicates.
    """
    step, load = config.checkpoint.ckpt_step, config.checkpoint.load
    own = stage_dir(session.run_dir, stage)
    wants_own = step is None or load is None or (own / records.name_of(step)).exists()
    found = find.newest_good(own, step, session.owner(stage)) if wants_own else None
    if found is None and load is not None and (other := Path(load) / stage.name).is_dir():
        found = find.newest_good(other, step, _owner(session, stage, other))
    return found


def source_checkpoint(session: Session, stage: StageConfig, config: RunConfig) -> Path | None:
    """The good checkpoint whose weights a beginning stage takes; none if all weights are fresh. Communicates.

    Raises:
        CheckpointError: the stage of this run that it starts from has no good checkpoint of its last step.
    """
    before = _parent(session, stage)
    if before is None:
        named = stage.load or config.checkpoint.pretrained_checkpoint or config.checkpoint.load
        return find.resolve(named) if named else None
    folder = stage_dir(session.run_dir, before)
    load = config.checkpoint.load
    if load is not None and not folder.is_dir() and (Path(load) / before.name).is_dir():
        folder = Path(load) / before.name
    path = find.resolve(folder, _owner(session, before, folder))
    record = find.record_of(path)
    if not record.finished:
        raise CheckpointError(
            f"stage {stage.name!r} starts from the end of stage {before.name!r}, whose newest good "
            f"checkpoint is {path}; delete any damaged one after it and run {before.name!r} again, or set "
            f"`load: {path}`"
        )
    check_lineage(session, before, path, record)
    return path


def check_lineage(session: Session, stage: StageConfig, path: Path, record: Record) -> None:
    """Check that a checkpoint of this run began from the stage that the configuration puts before it.

    Raises:
        CheckpointError: it began from another stage.
    """
    parent = _parent(session, stage)
    if parent is None or not record.run_id:  # weights from outside, or an old record without a run
        return
    last = record.lineage[-1] if record.lineage else None
    if last is not None and last.get("run_id") == record.run_id and last["stage"] != parent.name:
        raise CheckpointError(
            f"{path} began from stage {last['stage']!r}, and this run's stage {stage.name!r} begins from "
            f"{parent.name!r}; run {stage.name!r} again in another --save, or set `load: {path}` to use it "
            "as is"
        )


def lineage_after(source: Record, path: Path) -> list[Ancestor]:
    """The lineage of a stage that begins from `source`: the stages its weights went through, oldest first."""
    return [
        *source.lineage,
        {
            "stage": source.stage,
            "kind": source.kind,
            "step": source.step,
            "path": str(path),
            "run_id": source.run_id,
        },
    ]


def _parent(session: Session, stage: StageConfig) -> StageConfig | None:
    """The stage of this run that `stage` starts from, or none if it starts from elsewhere."""
    named = next((s for s in session.config.stages if s.name == stage.load), None)
    return named if stage.load else earlier_stage(session.config, stage)


def _owner(session: Session, stage: StageConfig, folder: Path) -> find.Owner:
    """The owner of the checkpoints in a stage's folder: this run, or with `load` the run they lie in."""
    run_dir = folder.parent
    if run_dir == session.run_dir:
        return session.owner(stage)
    return find.Owner(stage.name, run_id.of_other(run_dir))
