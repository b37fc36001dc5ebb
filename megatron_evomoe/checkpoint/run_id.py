"""The id of a run, which its directory and all its checkpoints hold.

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
    """The id of the run in a directory, which is created if it has none. Communicates.

    If the directory holds checkpoints and the file is missing (it was lost, or only stages were copied), the
    run gets the id of the checkpoints.

    Raises:
        CheckpointError: on every rank; the file is damaged or cannot be written, or it is missing and there
            are checkpoints of several runs.
    """
    return on_all_ranks(lambda: read(run_dir) or _begin(run_dir), (CheckpointError,))


def of_other(run_dir: Path) -> str | None:
    """The id of another run; None if its directory holds none. Communicates.

    Raises:
        CheckpointError: on every rank; the file is damaged.
    """
    return on_all_ranks(lambda: read(run_dir), (CheckpointError,))


def read(run_dir: Path) -> str | None:
    """The id in `run.json`; None if there is no such file.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = run_dir / FILE_NAME
    try:
        run_id = json.loads(files.read(path, _LARGEST))["run_id"]
        if not isinstance(run_id, str) or not re.fullmatch("[0-9a-f]{32}", run_id):
            raise ValueError(f"{run_id!r} is not a run id")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it, and the id is taken from the "
            "run's checkpoints"
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
    """The ids of the run's checkpoints, each with one checkpoint that has it."""
    found: dict[str, Path] = {}
    for path in (p for folder in sorted(run_dir.glob("*/")) for p in candidates(folder)):
        try:
            run_id = read_unchecked(path).run_id
        except CheckpointError:
            continue  # damaged; the error is raised when it is loaded
        if run_id:
            found.setdefault(run_id, path)
    return found
