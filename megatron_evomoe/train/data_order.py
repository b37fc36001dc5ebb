"""The order in which a stage takes its samples: one of its own, or that of the stage or version before.

The order is recorded with the data in every checkpoint (`TrainingData`), so a resume takes it from there.
"""

from __future__ import annotations

from pathlib import Path

from megatron_evomoe.checkpoint import find
from megatron_evomoe.checkpoint.record import CheckpointError, Record, TrainingData
from megatron_evomoe.config import RunConfig, StageConfig
from megatron_evomoe.config.kinds import PRETRAINED
from megatron_evomoe.data import changed, order
from megatron_evomoe.data.order import SampleOrder
from megatron_evomoe.parallel.agree import on_all_ranks
from megatron_evomoe.train.session import Session


def sample_order(data: TrainingData) -> SampleOrder:
    """The order that checkpoints record."""
    return SampleOrder(data["samples"], data["seed"], key=data.get("key", ""), name=data["order"])


def resumed(data: TrainingData, record: Record) -> TrainingData:
    """The data of a stage that resumes from a checkpoint, in the order that the checkpoint had.

    Checkpoints that do not record their data are of versions that knew one rule alone.
    """
    before = record.data
    if before is None:
        return _in_order(data, order.ARGSORT, None)
    return _in_order(data, before["order"], before.get("key"))


def begun(
    session: Session, stage: StageConfig, config: RunConfig, data: TrainingData, source: Path | None
) -> tuple[TrainingData, int]:
    """The data of a stage that begins, in its order, and the position at which it begins. Communicates.

    A later stage of a run whose stages were trained with the rule of an earlier version keeps that rule.

    Args:
        source: the checkpoint whose weights the stage takes.

    Raises:
        CheckpointError: on every rank: the stage has `continue_data`, and the checkpoint was trained on other
            data, with another seed, or does not say on which data.
    """
    record = find.record_of(source) if source is not None else None

    def on_rank_0() -> tuple[str, str | None, int]:
        if source is not None and record is not None and record.kind != PRETRAINED:
            if config.data.continue_data:
                return _continued(stage, data, record, source)
            before = record.data["order"] if record.data else order.ARGSORT
            if before == order.ARGSORT and source.parent.parent == session.run_dir:
                return order.ARGSORT, None, 0
        return order.NAME, stage.name, 0

    name, key, position = on_all_ranks(on_rank_0, (CheckpointError,))
    if position:
        session.logger.say(
            f"stage {stage.name}: goes on in the data at position {position}, in epoch "
            f"{position // data['samples']}, where {source} ended"
        )
    return _in_order(data, name, key), position


def _continued(
    stage: StageConfig, data: TrainingData, record: Record, source: Path
) -> tuple[str, str | None, int]:
    before = record.data
    remedy = "give it the same, or leave continue_data out"
    if before is None:
        raise CheckpointError(
            f"stage {stage.name!r} has continue_data, and {source}, from which it begins, does not say which "
            "samples it was trained on; leave continue_data out"
        )
    if before["order"] not in order.NAMES:
        raise CheckpointError(
            f"stage {stage.name!r} has continue_data, and {source} took its samples in the order "
            f"{before['order']!r}, which this version of megatron_evomoe does not know"
        )
    if found := changed.differences(before["shards"], data["shards"]):
        raise CheckpointError(
            f"stage {stage.name!r} has continue_data, and {source} was trained on other data: "
            f"{'; '.join(found)}; {remedy}"
        )
    if before["seed"] != data["seed"]:
        raise CheckpointError(
            f"stage {stage.name!r} has continue_data, and {source} took its samples with seed "
            f"{before['seed']}, not {data['seed']}; {remedy}"
        )
    return before["order"], before.get("key"), record.position


def _in_order(data: TrainingData, name: str, key: str | None) -> TrainingData:
    found: TrainingData = {**data, "order": name}
    if key is not None:
        found["key"] = key
    return found
