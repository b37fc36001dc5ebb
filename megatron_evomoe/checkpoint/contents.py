"""What a checkpoint holds beside tensors: `common.pt`, and objects inside tensor files. Always opened with
`weights_only`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_evomoe.checkpoint import files, integrity, metadata
from megatron_evomoe.checkpoint.record import CheckpointError, read_unchecked

COMMON = "common.pt"
_LARGEST = 1 << 31  # bytes


def read_common(directory: Path) -> dict[str, Any]:
    """What `common.pt` holds: the bytes that the record has the checksum of, opened without running anything.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but plain values.
    """
    content = integrity.read_verified(directory, COMMON, read_unchecked(directory).files, _LARGEST)
    found = _opened(content, f"checkpoint {directory}: {COMMON}")
    if not isinstance(found, dict):
        raise CheckpointError(
            f"checkpoint {directory}: {COMMON} holds a {type(found).__name__}, no dictionary; nothing was "
            "loaded"
        )
    return found


def read_object(directory: Path, key: str, place: _StorageInfo) -> Any:
    """An object that lies in a tensor file, opened without running anything.

    Raises:
        CheckpointError: it cannot be read, or holds anything but plain values.
    """
    name = f"checkpoint {directory}: object {key!r} in {place.relative_path}"
    try:
        with io.BufferedReader(files.open_regular(directory / place.relative_path)) as file:
            file.seek(place.offset)
            content = file.read(place.length)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from None
    return _opened(content, name)


@contextlib.contextmanager
def no_more_than_torchs() -> Iterator[None]:
    """Inside, `weights_only` builds what torch itself allows. megatron-core adds classes, members of
    enumerations among them, of which there is one for the whole process, so that state given to it would
    stay.
    """
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(added)


def load(file: BinaryIO | Path, map_location: str = "cpu", *, mmap: bool = False) -> Any:
    """torch.load that runs nothing. Raises whatever torch meets in damaged bytes."""
    with no_more_than_torchs():
        return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)


def require_safe(directory: Path) -> None:
    """Raise `CheckpointError` if anything in a checkpoint that is no tensor is damaged, or more than plain
    values.
    """
    found = metadata.read(directory)
    for key, entry in found.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            read_object(directory, key, found.storage_data[MetadataIndex(key)])
    if COMMON in read_unchecked(directory).files:
        read_common(directory)


def _opened(content: bytes, name: str) -> Any:
    try:
        found = load(io.BytesIO(content))
        _require_tree(found, 16 * len(content))
    except Exception as error:  # damaged bytes can raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{name} is unsafe or damaged ({type(error).__name__}: {reason}); nothing was loaded"
        ) from None
    return found


def _require_tree(found: Any, visits: int) -> None:
    """Whoever walks through it must come to an end: no container within itself, nor one in too many
    places.
    """
    waiting = [found]
    while waiting:
        value = waiting.pop()
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if not isinstance(parts, (list, tuple, set)):
            continue
        visits -= 1 + len(parts)
        if visits < 0:
            raise ValueError("the same is in too many places")
        waiting += parts
