"""What a checkpoint says about itself in plain JSON, beside megatron-core's tensors: readable by people, safe to load."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_NAME = "evomoe.json"
FORMAT = 1
TRACKER = "latest_checkpointed_iteration.txt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, or could not be written; the message says which and what stays intact."""


@dataclass(kw_only=True)
class Record:
    """Everything about a checkpoint that is not a tensor."""

    stage: str
    """Stage name."""
    kind: str
    """Stage kind, or `pretrained` for imported weights."""
    step: int
    """Optimizer steps done in this stage."""
    position: int
    """Samples consumed in this stage: the data cursor."""
    finished: bool
    """Whether the stage reached its last step."""
    layout: dict[str, int]
    """World size and parallel degrees that wrote it."""
    vocab_size: int
    """True vocabulary size, before padding."""
    tokenizer_fingerprint: str
    """`Tokenizer.fingerprint()` of the tokenizer it was trained with."""
    wandb_run_id: str | None = None
    """Continued on resume."""
    parts: list[str] = field(default_factory=lambda: ["vision_model", "vision_projection", "language_model"])
    """Top-level parts the tensors cover."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """Stages before this one: {stage, kind, step, path}, oldest first."""
    num_experts: int = 0
    """Experts per mixture layer, 0 for a dense stage."""
    files: dict[str, list[int]] = field(default_factory=dict)
    """File name -> [bytes, CRC-32]; what must be there for the checkpoint to be whole."""
    format: int = FORMAT

    def write(self, directory: Path) -> None:
        """Write `evomoe.json`."""
        (directory / FILE_NAME).write_text(json.dumps(dataclasses.asdict(self), indent=1))


def read(directory: Path) -> Record:
    """Read and check a checkpoint's record and the presence and size of its files.

    Raises:
        CheckpointError: no record, another format, or a file missing or of another size than when it was saved.
    """
    record = read_unchecked(directory)
    for name, (size, _) in record.files.items():
        file = directory / name
        actual = file.stat().st_size if file.exists() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise CheckpointError(f"checkpoint {directory} is damaged: {name} {found}, {size} bytes were saved")
    return record


def read_unchecked(directory: Path) -> Record:
    """The record alone, whatever became of the files it lists.

    Raises:
        CheckpointError: no record, a damaged one, or one of another format.
    """
    path = directory / FILE_NAME
    try:
        record = Record(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is no complete checkpoint: {FILE_NAME} is missing "
                              "(interrupted while saving?)") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if record.format != FORMAT:
        raise CheckpointError(f"{directory} has checkpoint format {record.format}; this version reads {FORMAT}")
    return record


def write_tracker(directory: Path, step: int) -> None:
    """Point `directory`'s tracker file at `step`; it holds the old number or the new one at any moment."""
    pending = directory / (TRACKER + ".new")
    pending.write_text(str(step))
    os.replace(pending, directory / TRACKER)
