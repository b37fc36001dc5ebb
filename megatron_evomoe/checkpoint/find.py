"""Finds the checkpoint to load: the newest complete one, which all ranks check before any tensor is read.

SAVE/latest_checkpointed_iteration.txt  for people and other tools; the search looks at the directories
SAVE/iter_0000500/…
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_evomoe.checkpoint import contents, integrity, metadata
from megatron_evomoe.checkpoint.record import CheckpointError, Record, name_of, read

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """The stage of a run to which the checkpoints of a directory must belong."""

    stage: str
    run_id: str | None
    """None if it is not known, because the directory of the run holds no id."""

    def why_not(self, path: Path, record: Record) -> str | None:
        """Why a checkpoint is not this owner's, in words; None if it is.

        A record of format 1 names no run.
        """
        if record.stage != self.stage:
            return (
                f"checkpoint {path} is of stage {record.stage!r}, and is in the directory of stage "
                f"{self.stage!r}"
            )
        if self.run_id and record.run_id and record.run_id != self.run_id:
            return (
                f"checkpoint {path} is of run {record.run_id}, and is in the directory of run {self.run_id}"
            )
        return None

    def require(self, path: Path, record: Record) -> None:
        """Raise `CheckpointError` if a checkpoint is not this owner's."""
        if problem := self.why_not(path, record):
            raise CheckpointError(
                f"{problem}; move it away, or name it in `load:` to start from it on purpose"
            )


def candidates(directory: Path) -> list[Path]:
    """The published checkpoints in the directory of a stage, newest first."""
    found = [p for p in directory.glob("iter_*") if re.fullmatch(r"iter_[0-9]{7,}", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def latest(directory: Path, owner: Owner | None = None) -> Path | None:
    """The newest checkpoint whose files all exist, and that is the owner's; None if there is none.

    It reads no tensor.
    """
    for path in candidates(directory):
        try:
            record = read(path)
            if owner is not None:
                owner.require(path, record)
            return path
        except CheckpointError as error:
            log.warning("%s; trying the checkpoint before it", error)
    return None


def newest_good(directory: Path, step: int | None = None, owner: Owner | None = None) -> Path | None:
    """The newest checkpoint that is undamaged, contains no code and is the owner's. Communicates.

    Every rank reads its share of the files. Rank 0 logs what is wrong with a checkpoint that fails, and the
    one before it is tried.

    Args:
        step: take the checkpoint of this step and no other.

    Returns:
        The checkpoint; None if the directory holds none.

    Raises:
        CheckpointError: on every rank; there are checkpoints and none is good, or the one of `step` is not.
    """
    names = [[p.name for p in candidates(directory)] if step is None else [name_of(step)]]
    # one listing for all ranks, because a shared file system can show them different ones
    dist.broadcast_object_list(names, src=0)
    problem = None
    for name in names[0]:
        problem = why_bad(directory / name, owner)
        if problem is None:
            return directory / name
        if dist.get_rank() == 0:
            log.warning("%s; falling back to the checkpoint before it", problem)
    if problem is not None:
        raise CheckpointError(
            problem if len(names[0]) == 1 else f"no good checkpoint under {directory}; the oldest: {problem}"
        )
    return None


def why_bad(path: Path, owner: Owner | None = None) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is good. Communicates.

    It checks the record, the files, their checksums, the owner, and that pickles are safe. All ranks get the
    same answer.
    """
    files: list[dict[str, list[int]] | str] = [{}]
    if dist.get_rank() == 0:
        try:
            record = read(path)
            if owner is not None:
                owner.require(path, record)
            files = [record.files]
        except CheckpointError as error:
            files = [str(error)]
    dist.broadcast_object_list(files, src=0)
    if isinstance(files[0], str):
        return files[0]
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = dict(sorted(files[0].items())[rank::world])
    problem = integrity.mismatch(path, mine)
    if problem is None:
        try:
            contents.require_safe(path) if rank == 0 else metadata.read(path)
        except CheckpointError as error:
            problem = str(error)
    problems: list[str | None] = [None] * world
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p), None)


def resolve(path: str | Path, owner: Owner | None = None) -> Path:
    """The good checkpoint that a user means by a path. Communicates.

    Args:
        path: an `iter_…` directory, or one that holds such directories, whose newest good checkpoint is
            meant.
        owner: to whom the newest one must belong.

    Raises:
        CheckpointError: the named checkpoint is bad, or the directory holds none.
    """
    path = Path(path)
    if path.name.startswith("iter_"):
        if problem := why_bad(path):
            raise CheckpointError(problem)
        return path
    found = newest_good(path, owner=owner)
    if found is None:
        raise CheckpointError(f"no checkpoint under {path}: it has no complete iter_* directory")
    return found


def record_of(path: Path) -> Record:
    """The record of a checkpoint, as rank 0 reads it, on every rank. Communicates."""
    found = [read(path) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]
