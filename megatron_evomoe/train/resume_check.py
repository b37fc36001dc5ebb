"""Compares configuration and data with a checkpoint's before a stage resumes or begins from it.

A change of a must-equal field is refused, and the message names the flag that allows it on purpose. Other
changes are logged, in one line and in an event (docs/checkpoints.md). All ranks come to the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_evomoe.checkpoint import files, find
from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.checkpoint.record import CheckpointError, Record, TrainingData
from megatron_evomoe.config import RunConfig, StageConfig, text
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.resume import OnResume
from megatron_evomoe.data import changed, order
from megatron_evomoe.parallel.agree import on_all_ranks
from megatron_evomoe.train.compare import Change, changes, model_changes, show, stored_config
from megatron_evomoe.train.data_order import sample_order
from megatron_evomoe.train.session import Session, stage_dir
from megatron_evomoe.train.transition import check_tokenizer

CONFIG_FILE = "run_config.yaml"


@dataclass
class Comparison:
    """How configuration and data differ from the checkpoint's; nothing in it is refused."""

    changes: list[Change] = field(default_factory=list)
    """Changed fields, without those of class `FREE`."""
    notes: list[str] = field(default_factory=list)
    """Sentences on data, ranks, and what could not be compared."""

    def line(self) -> str:
        """All of it as one line of the log; empty if nothing changed."""
        return (
            "; ".join([", ".join(map(str, self.changes)), *self.notes])
            if self.changes
            else "; ".join(self.notes)
        )

    def fields(self) -> dict[str, Any]:
        """All of it as fields of an entry in `events.jsonl`."""
        found: dict[str, Any] = {"changed": {c.flag: [c.before, c.now] for c in self.changes}}
        return {**found, "notes": self.notes} if self.notes else found


def compare(
    session: Session, folder: Path, stage: StageConfig, config: RunConfig, data: TrainingData | None
) -> Comparison:
    """Compare the checkpoint that `stage` resumes from with today's configuration and data. Communicates.

    Args:
        config: the configuration with the stage's values in place.
        data: what the stage would train on, in the checkpoint's order; none if no step is left.

    Raises:
        CheckpointError: on every rank: the checkpoint was trained with another tokenizer, belongs to another
            kind of stage, differs in a must-equal field without being allowed to, or has done more steps than
            `train_iters`.
    """

    def on_rank_0() -> Comparison:
        record = records.read(folder)
        # first, because another tokenizer also has another vocabulary size
        check_tokenizer(record, folder, session.fingerprint)
        found = _compare(folder, record, stored(folder, record.stage), stage, config, data)
        found.notes += stale(session, record)
        return found

    return on_all_ranks(on_rank_0, (CheckpointError,))


def _compare(
    folder: Path,
    record: Record,
    before: RunConfig | None,
    stage: StageConfig,
    config: RunConfig,
    data: TrainingData | None,
) -> Comparison:
    if record.kind != stage.kind:
        raise CheckpointError(
            f"{folder} belongs to a {record.kind!r} stage, {stage.name!r} is {stage.kind.value!r}; "
            "choose another --save"
        )
    allowed = config.checkpoint.allow_changed
    found = Comparison(configured_changes(before, config, stage.kind))
    if before is None:
        found.notes.append(
            f"{CONFIG_FILE} of the checkpoint has no stage {record.stage!r}, so no configuration could be "
            "compared"
        )
    refuse(
        found.changes,
        allowed,
        f"{folder} was saved under another configuration",
        "a resume would give numbers of neither",
    )
    if config.train.train_iters < record.step:
        raise CheckpointError(
            f"{folder} has done {record.step} steps, and train_iters is {config.train.train_iters}; set "
            f"train_iters to {record.step} to end the stage there, or resume from an earlier checkpoint with "
            "--ckpt-step"
        )
    if record.layout.get("world") != dist.get_world_size():
        found.notes.append(f"ranks {record.layout.get('world')} → {dist.get_world_size()}")
    if data is not None:
        found.notes += _compare_data(folder, record, data, config)
    return found


def stored(folder: Path, stage: str | None) -> RunConfig | None:
    """The configuration of a checkpoint with the values of `stage` in place; none if it has no such stage.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / CONFIG_FILE
    try:
        raw = text.load(files.read(path, text.MAX_BYTES).decode(), str(path))
    except (OSError, ValueError, RecursionError) as error:  # a ConfigError is a ValueError
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return stored_config(raw, stage) if isinstance(raw, dict) else None


def configured_changes(before: RunConfig | None, config: RunConfig, kind: StageKind) -> list[Change]:
    """Changed fields that are not of class `FREE`; none without a configuration to compare with."""
    return (
        [c for c in changes(before, config, kind) if c.kind is not OnResume.FREE]
        if before is not None
        else []
    )


def refuse(found: Sequence[Change], allowed: Sequence[str], what: str, why: str) -> None:
    """Raise `CheckpointError` if a must-equal field changed and is not in `allowed`.

    what: the beginning of the message; why: the consequence of loading all the same.
    """
    wrong = [c for c in found if c.kind is OnResume.MUST_EQUAL and c.flag not in allowed]
    if wrong:
        values = ", ".join(f"{c.section}.{c.field} was {show(c.before)}, is now {show(c.now)}" for c in wrong)
        raise CheckpointError(
            f"{what}: {values}; {why}. Set it back, choose another --save, or allow it on purpose with "
            f"--allow-changed {','.join([*allowed, *(c.flag for c in wrong)])}"
        )


def _compare_data(folder: Path, record: Record, data: TrainingData, config: RunConfig) -> list[str]:
    """Notes on how the data differs from the checkpoint's. Raises `CheckpointError` if it must not differ."""
    before = record.data
    if before is None:
        return ["the checkpoint does not say which samples it was trained on, so no data could be compared"]
    if before["order"] not in order.NAMES:
        raise CheckpointError(
            f"{folder} took its samples in the order {before['order']!r}, this version of megatron_evomoe "
            f"has {' and '.join(map(repr, order.NAMES))}; go on with the version that saved it"
        )
    found = changed.differences(before["shards"], data["shards"])
    if found and not config.checkpoint.allow_changed_data:
        sizes = (
            f"{before['samples']} samples in {len(before['shards'])} shards; now {data['samples']} in "
            f"{len(data['shards'])}"
        )
        raise CheckpointError(
            f"{folder} was trained on other data ({sizes}): {'; '.join(found)}. Some samples would repeat "
            "and others be left out. Give it the data it had, choose another --save, or go on with "
            "--allow-changed-data"
        )
    if found or before["seed"] != data["seed"]:
        orders = sample_order(before), sample_order(data)
        found.append(changed.meaning(before["shards"], orders[0], data["shards"], orders[1], record.position))
    return found


def compare_source(
    folder: Path, source: Record, stage: StageConfig, config: RunConfig, fingerprint: str
) -> Comparison:
    """Compare the model in `folder`, from which `stage` begins, with the present one. Communicates.

    Raises:
        CheckpointError: on every rank: the two models differ in a must-equal field, which is not allowed. All
            tensors may have the same shapes nevertheless.
    """

    def on_rank_0() -> Comparison:
        check_tokenizer(source, folder, fingerprint)  # first, as in `compare`
        before = stored(folder, source.stage) or stored(folder, None)  # imported weights have no stages
        if before is None:
            return Comparison(notes=[f"{CONFIG_FILE} of {folder} is empty, so no model could be compared"])
        found = model_changes(before, config, source.kind, stage.kind, source.parts)
        refuse(
            found,
            config.checkpoint.allow_changed,
            f"{folder}, from which stage {stage.name!r} begins, holds another model",
            "its weights would mean something else",
        )
        return Comparison(found)

    return on_all_ranks(on_rank_0, (CheckpointError,))


def goes_on(session: Session, folder: Path, stage: StageConfig, config: RunConfig) -> bool:
    """Whether a finished stage has steps left under the present configuration.

    Changes are logged. Communicates.

    Raises:
        CheckpointError: on every rank: the stage has steps left, and later stages began from its end.
    """
    step, line, later = on_all_ranks(lambda: _of_finished(session, folder, stage, config), (CheckpointError,))
    more = config.train.train_iters > step
    if more:
        line = f"finished at step {step}, goes on to train_iters {config.train.train_iters}"
        line += f"; {', '.join(later)} began from step {step} of it and will not follow" if later else ""
    else:
        line = f"already finished ({folder})" + (f", under another configuration: {line}" if line else "")
    session.logger.say(f"stage {stage.name}: {line}")
    return more


def _of_finished(
    session: Session, folder: Path, stage: StageConfig, config: RunConfig
) -> tuple[int, str, list[str]]:
    record = records.read(folder)
    found = configured_changes(stored(folder, record.stage), config, stage.kind)
    line = "; ".join([*filter(None, [", ".join(map(str, found))]), *stale(session, record)])
    later = []
    if config.train.train_iters > record.step:
        later = [
            name
            for name, other in _newest(session).items()
            if any(a["stage"] == stage.name for a in other.lineage)
        ]
        if later and "train_iters" not in config.checkpoint.allow_changed:
            raise CheckpointError(
                f"stage {stage.name!r} finished at step {record.step}, train_iters is now "
                f"{config.train.train_iters}, and {', '.join(later)} began from its end: they would not have "
                "its further steps. Set train_iters back, delete those stages' folders, choose another "
                "--save, or allow it on purpose with --allow-changed train_iters"
            )
    return record.step, line, later


def stale(session: Session, record: Record) -> list[str]:
    """A note if the stage that a checkpoint's stage began from has taken more steps since. On rank 0."""
    if not record.lineage:
        return []
    parent = record.lineage[-1]
    newest = _newest(session).get(parent["stage"])
    if newest is None or newest.run_id != parent.get("run_id", "") or newest.step == parent["step"]:
        return []
    return [f"it began from step {parent['step']} of {parent['stage']}, which is at step {newest.step} now"]


def _newest(session: Session) -> dict[str, Record]:
    """The newest record of each stage of the run that has one."""
    found = {
        s.name: find.latest(stage_dir(session.run_dir, s), session.owner(s)) for s in session.config.stages
    }
    return {name: records.read(path) for name, path in found.items() if path is not None}
