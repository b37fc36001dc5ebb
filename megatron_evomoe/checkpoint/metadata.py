"""Reads `.metadata`, which tells where the chunks of each tensor are.

torch and megatron-core unpickle this file, which runs whatever it contains. Here `inert_pickle` reads it as
data, once. The content is checked field by field, and torch's objects are made of it. The plans of the save,
which loading does not need, are left out.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_evomoe.checkpoint import integrity, renamed
from megatron_evomoe.checkpoint.inert_pickle import Call, Instance, Name, Pairs
from megatron_evomoe.checkpoint.inert_pickle import read as read_inert
from megatron_evomoe.checkpoint.record import CheckpointError, read_unchecked

FILE_NAME = ".metadata"
_LARGEST = 1 << 31  # bytes
_MOST = (1 << 63) - 1  # elements, bytes
_AXES = 64
_MODULES = {module.__name__: module for module in (torch_metadata, planner, filesystem)}
_TORCH_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_SIZE, _LAYOUT, _GETATTR = (
    Name("torch", "Size"),
    Name("torch.serialization", "_get_layout"),
    Name("builtins", "getattr"),
)


def read(directory: Path) -> Metadata:
    """The `.metadata` of a checkpoint as torch's own objects, without running anything.

    The bytes that are read are those whose checksum the record holds, and every place that they name is
    inside a file of the checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged or not the saved one, or contains anything except places
            of tensors.
    """
    record = read_unchecked(directory)
    content = integrity.read_verified(directory, FILE_NAME, record.files, _LARGEST)
    try:
        found = parse(content, {name: size for name, (size, _) in record.files.items()})
        return renamed.with_present_names(found)
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {directory}: {FILE_NAME} is unsafe or damaged ({error}); nothing was loaded"
        ) from None


def parse(content: bytes, sizes: dict[str, int]) -> Metadata:
    """The content of a `.metadata` file.

    Args:
        content: its bytes.
        sizes: the size in bytes of each file that it may name.

    Raises:
        ValueError: it contains anything except places of tensors; the message says what.
    """
    return _Builder(sizes, visits=len(content)).metadata(read_inert(content, _is_known, _is_known_call))


def _is_known(name: Name) -> bool:
    """Whether a name may appear: sizes, dtypes, and records and enumerations of three torch modules."""
    if name in (_SIZE, _LAYOUT, _GETATTR) or (name.module == "torch" and name.name in _TORCH_DTYPES):
        return True
    found = _class_of(name)
    return found is not None and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum))


def _is_known_call(call: Call) -> bool:
    """Whether a call may appear: of a size, the strided layout, or a member of an enumeration.

    A member is named by its value, or through `getattr` as Python 3.11.0 to 3.11.3 write it.
    """
    what, args = call.what, call.args
    if what == _SIZE:
        return len(args) == 1 and type(args[0]) in (tuple, list)
    if what == _LAYOUT:
        return len(args) == 1 and args[0] == "torch.strided"
    return _member(call) is not None


def _member(call: Call) -> enum.Enum | None:
    """The member of an enumeration that a call stands for; None if it stands for none."""
    what, args = call.what, call.args
    if what == _GETATTR and len(args) == 2 and type(args[0]) is Name and type(args[1]) is str:
        found = _class_of(args[0])
        return found.__members__.get(args[1]) if found and issubclass(found, enum.Enum) else None
    found = _class_of(what)
    if found is None or not issubclass(found, enum.Enum) or len(args) != 1 or type(args[0]) is not int:
        return None
    return next((member for member in found if member.value == args[0]), None)


def _class_of(name: Name) -> type | None:
    """A class that one of the three torch modules defines itself, not one that the module imports."""
    found = vars(_MODULES[name.module]).get(name.name) if name.module in _MODULES else None
    return found if isinstance(found, type) and found.__module__ == name.module else None


class _Builder:
    """Makes torch's objects of inert ones.

    Each value that is looked at counts as a visit. A file may cause at most one visit for each of its bytes
    (torch's own files need one for seven), so that values which a file shares many times cannot become large
    here.
    """

    def __init__(self, sizes: dict[str, int], visits: int) -> None:
        self.sizes, self.left = sizes, visits

    def metadata(self, found: Any) -> Metadata:
        fields = self.fields(found, Metadata)
        stored = dict(self.entries(fields.get("state_dict_metadata"), self.key, self.stored))
        places = dict(self.entries(fields.get("storage_data"), self.index, self.place))
        for key, entry in stored.items():
            for index, size in _needed(key, entry):
                if index not in places or places[index].length < size:
                    raise ValueError(f"{key!r} has no place, or too small a one")
        if len(places) != sum(
            len(entry.chunks) if isinstance(entry, TensorStorageMetadata) else 1 for entry in stored.values()
        ):
            raise ValueError("it has places for tensors that it does not have")
        version = fields.get("version")
        return Metadata(stored, None, places, StorageMeta(), None if version is None else self.key(version))

    def stored(self, found: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if type(found) is Instance and found.kind == _name_of(BytesStorageMetadata):
            return BytesStorageMetadata()
        fields = self.fields(found, TensorStorageMetadata)
        properties, size = self.properties(fields.get("properties")), self.size(fields.get("size"))
        if math.prod(size) * properties.dtype.itemsize > _MOST:
            raise ValueError(f"it has a tensor of shape {tuple(size)}")
        chunks = [self.chunk(item, size) for item in self.listed(fields.get("chunks"))]
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
            raise ValueError(f"the chunks of a tensor of shape {tuple(size)} do not cover it")
        return TensorStorageMetadata(properties, size, chunks)

    def chunk(self, found: Any, whole: torch.Size) -> ChunkStorageMetadata:
        fields = self.fields(found, ChunkStorageMetadata)
        offsets, sizes = self.size(fields.get("offsets")), self.size(fields.get("sizes"))
        if not len(offsets) == len(sizes) == len(whole) or any(
            a + b > c for a, b, c in zip(offsets, sizes, whole, strict=True)
        ):
            raise ValueError(
                f"a chunk of shape {tuple(sizes)} at {tuple(offsets)} does not lie in its tensor of "
                f"{tuple(whole)}"
            )
        return ChunkStorageMetadata(offsets, sizes)

    def properties(self, found: Any) -> TensorProperties:
        self.visit()
        if (
            type(found) is not Instance
            or found.kind != _name_of(TensorProperties)
            or type(found.state) is not tuple
        ):
            raise ValueError("a tensor's properties are missing")
        dtype, layout, requires_grad, memory_format, pin_memory = (
            found.state if len(found.state) == 5 else [None] * 5
        )
        if type(dtype) is not Name or dtype.module != "torch" or dtype.name not in _TORCH_DTYPES:
            raise ValueError("a tensor's dtype is missing")
        is_plain = (
            type(layout) is Call
            and layout.what == _LAYOUT
            and type(memory_format) is Call
            and _member(memory_format) is torch_metadata._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
        )
        if not is_plain or type(requires_grad) is not bool or type(pin_memory) is not bool:
            raise ValueError("a tensor is not strided and contiguous")
        return TensorProperties(
            _TORCH_DTYPES[dtype.name], torch.strided, requires_grad, torch.contiguous_format, pin_memory
        )

    def index(self, found: Any) -> MetadataIndex:
        fields = self.fields(found, MetadataIndex)
        offset, hint = fields.get("offset"), fields.get("index")
        return MetadataIndex(
            self.key(fields.get("fqn")),
            None if offset is None else self.size(offset),
            None if hint is None else self.count(hint),
        )

    def place(self, found: Any) -> _StorageInfo:
        fields = self.fields(found, _StorageInfo)
        name = self.key(fields.get("relative_path"))
        offset, length = self.count(fields.get("offset")), self.count(fields.get("length"))
        if not name.endswith(".distcp") or name not in self.sizes:
            raise ValueError(f"it points into {name!r}, which is not a tensor file of the record")
        if offset + length > self.sizes[name]:
            raise ValueError(
                f"it points to bytes {offset} to {offset + length} of {name}, which has {self.sizes[name]}"
            )
        if fields.get("transform_descriptors"):
            raise ValueError("it has tensors that were transformed")
        return _StorageInfo(name, offset, length)

    def size(self, found: Any) -> torch.Size:
        self.visit()
        if type(found) is not Call or found.what != _SIZE or len(found.args[0]) > _AXES:
            raise ValueError("a size is missing")
        return torch.Size([self.count(number) for number in found.args[0]])

    def count(self, found: Any) -> int:
        self.visit()
        if type(found) is not int or not 0 <= found <= _MOST:
            raise ValueError(f"{found if type(found) is int else type(found).__name__} is no count")
        return found

    def key(self, found: Any) -> str:
        self.visit()
        if type(found) is not str:
            raise ValueError(f"it has a {type(found).__name__} for a name")
        return found

    def listed(self, found: Any) -> list[Any]:
        if type(found) is not list:
            raise ValueError("a list of chunks is missing")
        return found

    def fields(self, found: Any, kind: type) -> dict[str, Any]:
        """The state of an object that must be of class `kind`."""
        if type(found) is not Instance or found.kind != _name_of(kind):
            raise ValueError(f"a {kind.__name__} is missing")
        return dict(self.entries(found.state, self.key, lambda value: value))

    def entries(
        self, found: Any, key: Callable[[Any], Any], value: Callable[[Any], Any]
    ) -> Iterator[tuple[Any, Any]]:
        """The pairs of a dictionary, whose keys must differ."""
        if type(found) is not Pairs:
            raise ValueError("a dictionary is missing")
        seen = set()
        for k, v in found:
            self.visit()
            if (made := key(k)) in seen:
                raise ValueError(f"it has {made} twice")
            seen.add(made)
            yield made, value(v)

    def visit(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError("one value appears in too many places")


def _name_of(kind: type) -> Name:
    return Name(kind.__module__, kind.__qualname__)


def _needed(
    key: str, entry: TensorStorageMetadata | BytesStorageMetadata
) -> Iterator[tuple[MetadataIndex, int]]:
    """The places that an entry needs, and the least number of bytes of each."""
    if isinstance(entry, BytesStorageMetadata):
        yield MetadataIndex(key), 0
        return
    for chunk in entry.chunks:
        yield MetadataIndex(key, chunk.offsets), math.prod(chunk.sizes) * entry.properties.dtype.itemsize
