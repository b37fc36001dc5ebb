"""Is a checkpoint what was saved, and is it safe to open? Checksums of every file; a look at every pickle before it is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import io
import pickle
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_evomoe.checkpoint import files
from megatron_evomoe.checkpoint.record import CheckpointError

_THREADS = 2
_CACHED = 1 << 18  # bytes; fits a core's second-level cache
# What torch.distributed.checkpoint writes into `.metadata`: plain containers of sizes and offsets.
_METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner",
                     "torch.distributed.checkpoint.filesystem")
_METADATA_NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout")}


def checksum(path: Path) -> int:
    """CRC-32 of a file's bytes: finds every single flipped byte, at the speed of the disk rather than of a hash."""
    value, block = 0, memoryview(bytearray(_CACHED))
    with files.open_regular(path) as file:
        while count := file.readinto(block):
            value = zlib.crc32(block[:count], value)
    return value


class SummedFile(io.BufferedWriter):
    """A binary file being written that knows the CRC-32 of what went into it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"), buffer_size=_CACHED)
        self.crc = 0

    def write(self, data: Any) -> int:
        """As `io.BufferedWriter.write`. In blocks, so that the writing finds in the cache what the checksum has just read."""
        view = memoryview(data)
        for start in range(0, len(view), _CACHED):
            block = view[start : start + _CACHED]
            self.crc = zlib.crc32(block, self.crc)
            super().write(block)
        return len(view)

    def fileno(self) -> int:
        """The descriptor, with nothing left in the buffer: whoever asks wants to fsync."""
        self.flush()
        return super().fileno()


@contextlib.contextmanager
def no_checksums_of_torch() -> Iterator[None]:
    """Whatever torch saves inside has no CRC-32 of its own: ours cover the whole file."""
    before = get_crc32_options()
    set_crc32_options(False)  # for all threads, unlike torch.utils.serialization.config.patch
    try:
        yield
    finally:
        set_crc32_options(before)


def mismatch(directory: Path, saved: dict[str, list[int]]) -> str | None:
    """The first of `saved` (name -> [bytes, CRC-32]) that is not what was saved, in words; none when all are."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return next(filter(None, threads.map(lambda entry: _mismatch(directory / entry[0], *entry[1]), saved.items())), None)


def _mismatch(path: Path, size: int, crc: int) -> str | None:
    try:
        if path.lstat().st_size == size and checksum(path) == crc:
            return None
        return f"checkpoint {path.parent} is damaged: the bytes of {path.name} are not those that were saved (checksum differs)"
    except OSError as error:
        return f"checkpoint {path.parent} cannot be read: {path.name}: {error}"


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the plain data of `.metadata`; refuses to look up anything else, so nothing the file names can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 pickle a member of an enumeration
            return _member
        if module in (*_METADATA_MODULES, "torch") or (module, name) in _METADATA_NAMES:
            found = super().find_class(module, name)
            if (module, name) in _METADATA_NAMES or isinstance(found, torch.dtype) or _is_record(found, module):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _member(kind: Any, name: Any) -> Any:
    """A member of an enumeration that a file was allowed to name; no other attribute of anything."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it names {kind}.{name}, which no checkpoint needs")
    return kind[name]


def _is_record(found: Any, module: str) -> bool:
    """A class of `module`'s own that only holds values. What a module merely imports is not its own."""
    return (isinstance(found, type) and found.__module__ == module
            and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)))


def read_metadata(directory: Path) -> Metadata:
    """`.metadata`, unpickled without running code.

    Raises:
        CheckpointError: the file is missing, damaged, or asks for anything but plain checkpoint metadata.
    """
    try:
        with (directory / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"checkpoint {directory}: .metadata is unsafe or damaged ({type(error).__name__}: {error}); "
                              "nothing was loaded") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"checkpoint {directory}: .metadata holds a {type(metadata).__name__}; nothing was loaded")
    return metadata


def require_safe(directory: Path) -> None:
    """Raise `CheckpointError` if any pickle in the checkpoint names code. torch and megatron-core would run it on loading.

    `common.pt` needs no look: torch.load opens it with weights_only.
    """
    metadata = read_metadata(directory)
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            place = metadata.storage_data[MetadataIndex(key)]
            with (directory / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                content = file.read(place.length)
            try:
                torch.load(io.BytesIO(content), weights_only=True)
            except Exception as error:
                raise CheckpointError(f"checkpoint {directory}: object {key!r} is unsafe or damaged "
                                      f"({str(error).splitlines()[0]}); nothing was loaded") from None
