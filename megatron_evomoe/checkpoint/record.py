"""The record of a checkpoint: everything about it that is not a tensor, in plain JSON.

People can read the record, reading it runs nothing, and a digest of itself tells whether it was changed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
from typing_extensions import NotRequired, TypedDict

from megatron_evomoe.checkpoint import files
from megatron_evomoe.config.recipe import MODULES
from megatron_evomoe.errors import UserError

FILE_NAME = "evomoe.json"
FORMAT = 2
TRACKER = "latest_checkpointed_iteration.txt"
ESSENTIAL = (".metadata", "metadata.json", "run_config.yaml")  # megatron-core 0.19 writes no common.pt
_UNPROTECTED = 1  # the format without digest and run
_LARGEST = 1 << 26  # bytes; a record of the files of 100,000 ranks has a fifth of that
_DIGEST = "digest"

log = logging.getLogger(__name__)

Count = Annotated[int, pydantic.Field(ge=0, lt=1 << 63)]
FileName = Annotated[
    str, pydantic.StringConstraints(pattern=r"^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=255)
]


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be used, or could not be written; the message says which, and what is still intact.

    Attributes:
        is_shared: all ranks raise this error, and the message names the rank that met it.
    """

    is_shared = False


@pydantic.with_config(pydantic.ConfigDict(strict=True, extra="forbid"))
class Ancestor(TypedDict):
    """A stage through which the weights have gone."""

    stage: str
    kind: str
    step: Count
    path: NotRequired[str]
    run_id: NotRequired[str]


@pydantic.with_config(pydantic.ConfigDict(strict=True, extra="forbid"))
class TrainingData(TypedDict):
    """The samples on which a stage was trained, and their order."""

    order: str
    """The name of the rule that makes an order of `seed` and `key` (`data.order.NAMES`)."""
    seed: Annotated[int, pydantic.Field(ge=-(1 << 64), lt=1 << 64)]
    key: NotRequired[str]
    """The stage whose order this is, which is another one with `continue_data`. Absent in earlier versions,
    whose stages all had one order.
    """
    samples: Count
    shards: list[tuple[str, Count, str]]
    """File name, number of samples and digest (`data.fingerprint.shard_digest`) of each shard, in order."""


@dataclass(kw_only=True)
class Record:
    """Everything about a checkpoint that is not a tensor."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(strict=True, extra="forbid")

    stage: str
    """The name of the stage."""
    kind: str
    """The value of a `StageKind`, or `PRETRAINED` for imported weights."""
    step: Count
    """The optimizer steps done in this stage."""
    position: Count
    """Where the data continues: the samples consumed in this stage, and with `continue_data` before it."""
    finished: bool
    """Whether this is the last step of the stage."""
    layout: dict[str, Count]
    """World size and parallel degrees of the run that wrote it."""
    vocab_size: Count
    """The size of the vocabulary without padding."""
    tokenizer_fingerprint: str
    """Fingerprint of the tokenizer (`Tokenizer.fingerprint`)."""
    run_id: str = ""
    """Id of the run that wrote it (checkpoint/run_id.py); empty for imported weights and in format 1."""
    wandb_run_id: str | None = None
    """Id of the wandb run that a resume continues."""
    parts: list[str] = field(default_factory=lambda: list(MODULES))
    """Modules (`config.recipe.MODULES`) whose tensors it holds."""
    lineage: list[Ancestor] = field(default_factory=list)
    """The stages before this one, the oldest first."""
    num_experts: Count = 0
    """The experts of each MoE layer; 0 in a dense stage."""
    data: TrainingData | None = None
    """The training data; None for imported weights and in records of earlier versions."""
    files: dict[FileName, Annotated[list[Count], pydantic.Field(min_length=2, max_length=2)]] = field(
        default_factory=dict
    )
    """File name to [bytes, CRC-32], for every file in the directory except the record itself."""
    format: Count = FORMAT

    def write(self, directory: Path) -> None:
        """Write the record to `evomoe.json`, in the present format.

        Raises:
            CheckpointError: the record contains something that could not be read back.
        """
        path, data = directory / FILE_NAME, {**dataclasses.asdict(self), "format": FORMAT}
        try:
            content = json.dumps({**data, _DIGEST: _digest_of(data)}, indent=1).encode()
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from None
        parse(content, path)
        path.write_bytes(content)


_ADAPTER = pydantic.TypeAdapter(Record)


def read(directory: Path) -> Record:
    """Read the record of a checkpoint, and compare it with the name and the files of the directory.

    Raises:
        CheckpointError: as for `read_unchecked`; or the directory has another name, or a file is missing, has
            another size, is not a regular file, or is not in the record.
    """
    record = read_unchecked(directory)
    if directory.name != name_of(record.step):
        raise CheckpointError(
            f"checkpoint {directory} holds step {record.step}, whose directory is called "
            f"{name_of(record.step)}: it was renamed, or has the record of another checkpoint. Give it its "
            "own name again"
        )
    try:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(directory)}
    except OSError as error:
        raise CheckpointError(f"checkpoint {directory} cannot be read: {error}") from None
    for name, (size, _) in record.files.items():
        if name not in found:
            raise CheckpointError(
                f"checkpoint {directory} is damaged: {name} is missing, {size} bytes were saved"
            )
        if not stat.S_ISREG(found[name].st_mode):
            raise CheckpointError(
                f"checkpoint {directory} is damaged: {name} is {files.kind_of(found[name].st_mode)}, not a "
                "regular file; put the file itself there"
            )
        if (actual := found[name].st_size) != size:
            raise CheckpointError(
                f"checkpoint {directory} is damaged: {name} has {actual} bytes, {size} bytes were saved"
            )
    if strangers := sorted(found.keys() - record.files.keys() - {FILE_NAME}):
        raise CheckpointError(
            f"checkpoint {directory} holds {strangers[0]!r}, which its record does not list; move it "
            "elsewhere"
        )
    return record


def read_unchecked(directory: Path) -> Record:
    """Read the record alone, without looking at the files that it lists.

    A record of format 1 has no digest, which is logged once.

    Raises:
        CheckpointError: there is no record, or it is damaged or of another format.
    """
    path = directory / FILE_NAME
    try:
        content = files.read(path, _LARGEST)
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not a complete checkpoint: {FILE_NAME} is missing (interrupted while saving?)"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cannot be read: {error}") from None
    record = parse(content, path)
    if record.format == _UNPROTECTED:
        _say_unprotected(path)
    return record


def parse(content: bytes, path: Path) -> Record:
    """The record in the bytes of a file.

    Raises:
        CheckpointError: they are not a record, were changed, or are of another format.
    """
    try:
        data = json.loads(content, object_pairs_hook=_object, parse_constant=_no_number)
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__}, not an object")
        _check_protection(data)
        record = _ADAPTER.validate_json(_canonical(data))
        _check_files(record)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return record


def name_of(step: int) -> str:
    """The name of the directory of a checkpoint."""
    return f"iter_{step:07d}"


def write_tracker(directory: Path, step: int) -> None:
    """Replace the tracker file atomically, so that it names `step`."""
    pending = directory / (TRACKER + ".new")
    pending.write_text(str(step))
    os.replace(pending, directory / TRACKER)


def _check_protection(data: dict[str, Any]) -> None:
    """Remove the digest from `data` and compare it. Raises `ValueError`."""
    digest, version = data.pop(_DIGEST, None), data.get("format")
    if type(version) is int and version > FORMAT:
        raise ValueError(
            f"its format is {version}, this version of megatron_evomoe reads {_UNPROTECTED} and {FORMAT}"
        )
    is_older = version == _UNPROTECTED and digest is None and "run_id" not in data
    if not is_older and (version != FORMAT or digest != _digest_of(data)):
        raise ValueError(f"its content is not what was written (format {version!r}, digest differs)")


def _check_files(record: Record) -> None:
    if FILE_NAME in record.files or (lacking := [name for name in ESSENTIAL if name not in record.files]):
        what = f"lists {FILE_NAME} itself" if FILE_NAME in record.files else f"does not list {lacking[0]}"
        raise ValueError(f"its list of files {what}")


def _digest_of(data: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(data)).hexdigest()


def _canonical(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in one object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


@functools.cache
def _say_unprotected(path: Path) -> None:
    log.warning(
        "%s is of format %d, in which records have no digest: it is read, but a change to it would not be "
        "noticed",
        path,
        _UNPROTECTED,
    )
