"""Reads what a checkpoint holds besides tensors: `common.pt`, and objects inside tensor files.

Everything is opened with `weights_only`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_evomoe.checkpoint import files, integrity, metadata
from megatron_evomoe.checkpoint.record import CheckpointError, read_unchecked

COMMON = "common.pt"
_LARGEST = 1 << 31  # bytes


def read_common(directory: Path) -> dict[str, Any]:
    """The content of `common.pt`, opened without running anything.

    The bytes that are opened are those whose checksum the record holds.

    Raises:
        CheckpointError: the file is missing or damaged, or contains anything except plain values.
    """
    content = integrity.read_verified(directory, COMMON, read_unchecked(directory).files, _LARGEST)
    found = _opened(content, f"checkpoint {directory}: {COMMON}")
    if not isinstance(found, dict):
        raise CheckpointError(
            f"checkpoint {directory}: {COMMON} holds a {type(found).__name__} and not a dictionary; nothing "
            "was loaded"
        )
    return found


def read_object(directory: Path, key: str, place: _StorageInfo) -> Any:
    """An object inside a tensor file, opened without running anything.

    Raises:
        CheckpointError: it cannot be read, or contains anything except plain values.
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
    """Let `weights_only` build only what torch itself allows, inside a `with` block.

    megatron-core allows more classes. Among them are enumerations, whose members exist once in the process,
    so that state that a file gives to one of them would stay.
    """
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(added)


def load(file: IO[bytes] | io.RawIOBase | Path, map_location: str = "cpu", *, mmap: bool = False) -> Any:
    """torch.load that runs nothing. Raises whatever torch raises for damaged bytes."""
    with no_more_than_torchs():
        readable = cast("IO[bytes] | Path", file)  # as torch's annotation calls them
        return torch.load(readable, map_location, weights_only=True, mmap=mmap)


def require_safe(directory: Path) -> None:
    """Check everything in a checkpoint that is not a tensor.

    Raises:
        CheckpointError: something is damaged, or contains anything except plain values.
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
    """Refuse a value that contains itself, or whose containers are shared in too many places.

    Otherwise a walk through the value might not end. Raises `ValueError`.
    """
    waiting = [found]
    while waiting:
        value = waiting.pop()
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if not isinstance(parts, (list, tuple, set)):
            continue
        visits -= 1 + len(parts)
        if visits < 0:
            raise ValueError("one value appears in too many places")
        waiting += parts
