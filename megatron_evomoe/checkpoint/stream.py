"""Reads and writes `torch_dist` checkpoints tensor by tensor, without process group, GPU or megatron-core.

`store.py` serves a running model, and this module serves a converter: memory holds one tensor, whatever the
size of the model. The files are those of torch.distributed.checkpoint, so megatron-core loads them under any
layout.

    SAVE/latest_checkpointed_iteration.txt          written last
    SAVE/iter_0000000/__0_0.distcp .metadata common.pt metadata.json run_config.yaml evomoe.json
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_evomoe.checkpoint import contents, integrity, metadata
from megatron_evomoe.checkpoint.mapped import alone, view_of
from megatron_evomoe.checkpoint.record import CheckpointError, Record, read, write_tracker

_DATA_FILE = "__0_0.distcp"
_ALIGNMENT = 64  # bytes; torch aligns so inside an archive, and its kernels may rely on it
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class CheckpointReader:
    """The tensors of one checkpoint (``iter_…``), joined from the chunks that its ranks wrote.

    Attributes:
        record: the record of the checkpoint.
        shapes: the global shape of every tensor by key; optimizer state and generators are among them.
        dtypes: the dtype of every tensor by key.

    Raises:
        CheckpointError: the checkpoint is not complete, or its metadata is damaged or names code.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.record = read(self.directory)
        found = metadata.read(self.directory)
        self._tensors = {
            k: e for k, e in found.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)
        }
        self._places: dict[MetadataIndex, _StorageInfo] = found.storage_data
        self.shapes = {k: tuple(e.size) for k, e in self._tensors.items()}
        self.dtypes = {k: e.properties.dtype for k, e in self._tensors.items()}

    def read(self, key: str, index: int | None = None) -> Tensor:
        """One tensor, or one expert of it. Only the chunks that are needed are read.

        Args:
            key: the key of the tensor.
            index: read only this element of the leading axis.

        Raises:
            CheckpointError: there is no such tensor, or its chunks are damaged or do not cover it.
        """
        if key not in self._tensors:
            raise CheckpointError(f"checkpoint {self.directory} has no tensor {key!r}")
        shape, chunks = self.shapes[key], self._tensors[key].chunks
        first, count = (0, shape[0] if shape else 1) if index is None else (index, 1)
        wanted = [
            c
            for c in chunks
            if not shape or (c.offsets[0] < first + count and first < c.offsets[0] + c.sizes[0])
        ]
        pieces = [(c, self._chunk(key, c)) for c in wanted]
        if len(pieces) == 1 and tuple(pieces[0][0].sizes) == (count, *shape[1:])[: len(shape)]:
            return pieces[0][1] if index is None else pieces[0][1][0]
        whole = torch.empty((count, *shape[1:]), dtype=self.dtypes[key])
        if sum(_overlap(c, first, count) for c, _ in pieces) != whole.numel():
            raise CheckpointError(
                f"checkpoint {self.directory}: the chunks of {key!r} do not cover its shape {shape}"
            )
        while pieces:  # each is released once it is copied
            chunk, piece = pieces.pop()
            start, stop = max(chunk.offsets[0], first), min(chunk.offsets[0] + chunk.sizes[0], first + count)
            target = whole[start - first : stop - first]
            for axis, (offset, size) in enumerate(zip(chunk.offsets[1:], chunk.sizes[1:], strict=True), 1):
                target = target.narrow(axis, offset, size)
            target.copy_(piece[start - chunk.offsets[0] : stop - chunk.offsets[0]])
        return whole if index is None else whole[0]

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._places.get(MetadataIndex(key, chunk.offsets))
        path = self.directory / (place.relative_path if place else "")
        try:
            if place is None:
                raise KeyError(f"no place for the chunk at {tuple(chunk.offsets)}")
            tensor = _read_saved(path, place.offset, place.length)
        except Exception as error:  # a damaged archive can raise anything
            raise CheckpointError(
                f"checkpoint {self.directory}: {key!r} in {path.name} is unsafe or damaged "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            ) from None
        if tensor.shape != chunk.sizes or tensor.dtype != self.dtypes[key]:
            raise CheckpointError(
                f"checkpoint {self.directory}: {key!r} holds a {tensor.dtype} of shape {tuple(tensor.shape)} "
                f"where .metadata says {self.dtypes[key]} and {tuple(chunk.sizes)}"
            )
        return tensor


def _overlap(chunk: ChunkStorageMetadata, first: int, count: int) -> int:
    rows = min(chunk.offsets[0] + chunk.sizes[0], first + count) - max(chunk.offsets[0], first)
    return rows * math.prod(chunk.sizes[1:])


def _read_saved(path: Path, offset: int, length: int) -> Tensor:
    """The tensor that torch.save wrote at `offset`, without running anything; a view if possible."""
    with path.open("rb", buffering=0) as file:
        # shape, strides and place, without the data
        outline = contents.load(_Window(file, offset, length), "meta")
        start = offset + getattr(outline.untyped_storage(), "_checkpoint_offset", 1)
        is_plain = outline.is_contiguous() and outline.untyped_storage().nbytes() == outline.nbytes
        if is_plain and start % _ALIGNMENT == 0 and start + outline.nbytes <= offset + length:
            return view_of(path, start, outline.dtype, outline.shape)
        return contents.load(_Window(file, offset, length))


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, which is read directly into the memory of a tensor."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += count
        return count


class CheckpointWriter:
    """Writes one checkpoint of weights.

    It is a context manager, which publishes the checkpoint at the end of the block and removes it on an
    error.

    Args:
        directory: the directory for ``iter_{step}`` and the tracker file.
        record: everything except `files`, which is filled in.
        config_yaml: the content of ``run_config.yaml``.
    """

    def __init__(self, directory: str | Path, record: Record, config_yaml: str) -> None:
        self._directory, self._record, self._yaml = Path(directory), record, config_yaml
        self.path = self._directory / f"iter_{record.step:07d}"
        self._pending = self._directory / f"saving_{record.step:07d}_{os.getpid():x}"
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def __enter__(self) -> CheckpointWriter:
        self._pending.mkdir(parents=True)
        self._file = integrity.SummedFile(self._pending / _DATA_FILE)
        return self

    def put(
        self, key: str, tensor: Tensor, *, shape: Sequence[int] | None = None, offset: Sequence[int] = ()
    ) -> None:
        """Write a tensor, or a chunk of one.

        Args:
            shape: the shape of the whole tensor, if `tensor` is a chunk of it.
            offset: the position of the chunk; zeros at the end can be left out.
        """
        shape = torch.Size(tensor.shape if shape is None else shape)
        offset = torch.Size((*offset, *[0] * (len(shape) - len(offset))))
        entry = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), shape, [])
        )
        assert entry.size == shape and entry.properties.dtype == tensor.dtype, f"chunks of {key} disagree"
        entry.chunks.append(ChunkStorageMetadata(offset, tensor.shape))
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))  # so that the data can be mapped
        start = self._file.tell()
        with integrity.no_checksums_of_torch():
            torch.save(alone(tensor), self._file)
        self._places[MetadataIndex(key, offset)] = _StorageInfo(_DATA_FILE, start, self._file.tell() - start)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            with self._file:
                pass
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._pending, ignore_errors=True)

    def _publish(self) -> None:
        """Write everything besides tensors, then checksums, the new name and the tracker, in this order."""
        for key, entry in self._tensors.items():
            assert sum(c.sizes.numel() for c in entry.chunks) == entry.size.numel(), (
                f"the chunks of {key} do not cover it"
            )
        pending = self._pending
        described = Metadata(dict(self._tensors), None, self._places, StorageMeta(), "1.0.0")
        (pending / metadata.FILE_NAME).write_bytes(pickle.dumps(described, protocol=4))
        (pending / "metadata.json").write_text(json.dumps(_FORMAT))
        torch.save({}, pending / "common.pt")
        (pending / "run_config.yaml").write_text(self._yaml)
        sums = {
            p.name: [p.stat().st_size, integrity.checksum(p)]
            for p in pending.iterdir()
            if p.name != _DATA_FILE
        }
        files = {_DATA_FILE: [(pending / _DATA_FILE).stat().st_size, self._file.crc], **sums}
        replace(self._record, files=files).write(pending)
        os.replace(pending, self.path)
        write_tracker(self._directory, self._record.step)
