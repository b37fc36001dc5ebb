"""Which run a checkpoint belongs to: an id that the run's directory keeps, and that every checkpoint of the
run carries.

    SAVE/run.json          {"run_id": "…"}

A directory that is moved, renamed or copied as a whole stays the same run.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path

from megatron_evomoe.checkpoint import files
from megatron_evomoe.checkpoint.find import candidates
from megatron_evomoe.checkpoint.record import CheckpointError, read_unchecked
from megatron_evomoe.parallel.agree import on_all_ranks

FILE_NAME = "run.json"
_LARGEST = 1 << 16  # bytes


def of_run(run_dir: Path) -> str:
    """The id of the run in `run_dir`, made now if it has none yet. Communicates.

    A directory with checkpoints and without the file (it was lost, or left behind when stages were copied)
    takes the id that they carry.

    Raises:
        CheckpointError: on every rank: the file is damaged or cannot be written, or is missing over
            checkpoints of several runs.
    """
    return on_all_ranks(lambda: read(run_dir) or _begin(run_dir), (CheckpointError,))


def of_other(run_dir: Path) -> str | None:
    """The id of another run, or none if its directory keeps none. Communicates.

    Raises:
        CheckpointError: on every rank: the file is damaged.
    """
    return on_all_ranks(lambda: read(run_dir), (CheckpointError,))


def read(run_dir: Path) -> str | None:
    """What `run.json` says, or none if there is no such file.

    Raises:
        CheckpointError: it is damaged.
    """
    path = run_dir / FILE_NAME
    try:
        run_id = json.loads(files.read(path, _LARGEST))["run_id"]
        if not isinstance(run_id, str) or not re.fullmatch("[0-9a-f]{32}", run_id):
            raise ValueError(f"{run_id!r} is no run id")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it, and the id is taken from the "
            "run's "
            "checkpoints"
        ) from None
    return run_id


def _begin(run_dir: Path) -> str:
    carried = _carried(run_dir)
    if len(carried) > 1:
        raise CheckpointError(
            f"{run_dir} has no {FILE_NAME} and holds checkpoints of several runs: "
            + ", ".join(f"{path} of {run_id}" for run_id, path in carried.items())
            + f'; move all but one away, or write {{"run_id": "…"}} of the right one to {run_dir / FILE_NAME}'
        )
    run_id = next(iter(carried), uuid.uuid4().hex)
    pending = run_dir / f"{FILE_NAME}.new"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        pending.write_text(json.dumps({"run_id": run_id}))
        os.replace(pending, run_dir / FILE_NAME)
    except OSError as error:
        raise CheckpointError(f"{run_dir / FILE_NAME} cannot be written: {error}") from None
    return run_id


def _carried(run_dir: Path) -> dict[str, Path]:
    """Ids that the run's checkpoints carry, each with one that does."""
    found: dict[str, Path] = {}
    for path in (p for folder in sorted(run_dir.glob("*/")) for p in candidates(folder)):
        try:
            run_id = read_unchecked(path).run_id
        except CheckpointError:
            continue  # damaged: it will be named when it is its turn
        if run_id:
            found.setdefault(run_id, path)
    return found
