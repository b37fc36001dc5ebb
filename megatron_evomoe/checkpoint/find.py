"""Which checkpoint to take: the newest that is whole, checked by all ranks together before any tensor is read.

    SAVE/latest_checkpointed_iteration.txt          for people and other tools; the search looks at the folders themselves
    SAVE/iter_0000500/…
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch.distributed as dist

from megatron_evomoe.checkpoint import integrity
from megatron_evomoe.checkpoint.record import CheckpointError, Record, read

log = logging.getLogger(__name__)


def candidates(directory: Path) -> list[Path]:
    """Published checkpoints of a stage folder, newest first."""
    found = [p for p in directory.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def latest(directory: Path) -> Path | None:
    """The newest checkpoint whose files are all there, or none if there is none. Reads no tensor."""
    for path in candidates(directory):
        try:
            read(path)
            return path
        except CheckpointError as error:
            log.warning("%s; trying the checkpoint before it", error)
    return None


def newest_good(directory: Path, step: int | None = None) -> Path | None:
    """The newest checkpoint that is byte for byte what was saved and names no code (or the one of `step`). Communicates.

    Every rank reads its part of the files. A checkpoint that fails is named on rank 0's log, and the one before it is tried.

    Raises:
        CheckpointError: on every rank, if there are checkpoints and none is good, or the one of `step` is not.
    """
    names = [[p.name for p in candidates(directory)] if step is None else [f"iter_{step:07d}"]]
    dist.broadcast_object_list(names, src=0)  # one listing for all: a shared file system may show ranks different ones
    problem = None
    for name in names[0]:
        problem = why_bad(directory / name)
        if problem is None:
            return directory / name
        if dist.get_rank() == 0:
            log.warning("%s; falling back to the checkpoint before it", problem)
    if problem is not None:
        raise CheckpointError(problem if len(names[0]) == 1 else f"no good checkpoint under {directory}; the oldest: {problem}")
    return None


def why_bad(path: Path) -> str | None:
    """What is wrong with a checkpoint, or none: files, checksums, unsafe pickles. Communicates; all ranks hear the same."""
    files: list[dict[str, list[int]] | str] = [{}]
    if dist.get_rank() == 0:
        try:
            files = [read(path).files]
        except CheckpointError as error:
            files = [str(error)]
    dist.broadcast_object_list(files, src=0)
    if isinstance(files[0], str):
        return files[0]
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = dict(sorted(files[0].items())[rank::world])
    problem = integrity.mismatch(path, mine)
    if problem is None and rank == 0:
        try:
            integrity.require_safe(path)
        except CheckpointError as error:
            problem = str(error)
    problems: list[str | None] = [None] * world
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p), None)


def resolve(path: str | Path) -> Path:
    """A good checkpoint from what a user gives: an `iter_…` folder, or a directory whose newest good one is meant. Communicates.

    Raises:
        CheckpointError: the folder named is bad, or there is none under the directory.
    """
    path = Path(path)
    if path.name.startswith("iter_"):
        if problem := why_bad(path):
            raise CheckpointError(problem)
        return path
    found = newest_good(path)
    if found is None:
        raise CheckpointError(f"no checkpoint under {path}: it has no whole iter_* folder")
    return found


def record_of(path: Path) -> Record:
    """Rank 0's reading of a checkpoint's record, on every rank. Communicates."""
    found = [read(path) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]
