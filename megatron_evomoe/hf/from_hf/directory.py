"""Reads ``config.json`` and tensors of a Hugging Face directory.

This needs no transformers, and code in the directory is not run.

transformers replaces missing tensors by random ones and warns. Here everything that is missing is an error.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_evomoe.checkpoint import contents
from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import ConfigError
from megatron_evomoe.hf.from_hf.safetensors_reader import DTYPE_OF_CODE, Place, Reader, list_tensors, unique

log = logging.getLogger(__name__)

_FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))


class HfDirectory:
    """The configuration and the tensors of a directory, as safetensors or in torch's own format.

    Attributes:
        config: the contents of ``config.json``.
        tensors: name -> place of every tensor. Sizes have been checked against the files; contents are read
            later.

    Raises:
        ConfigError: there is no directory or no ``config.json``, or that file is damaged.
        CheckpointError: there are no weights, a file is damaged, a tensor's name occurs twice, or the index
            names a file that is missing or outside the directory, or does not fit the files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} is not a directory; give the directory of a Hugging Face model")
        self.config = _read_json(self.path / "config.json")
        self.tensors: dict[str, Place] = {}
        index, files = self._weight_files()
        for file in files:
            for name, place in list_tensors(file) if file.suffix == ".safetensors" else _list_pickled(file):
                if name in self.tensors:
                    raise CheckpointError(
                        f"{self.path}: {name} is in both {self.tensors[name].file.name} and {file.name}"
                    )
                self.tensors[name] = place
        if index:
            _check_index(index, self.tensors)
        self._reader = Reader()
        self._opened: tuple[Path, dict[str, Tensor]] | None = None

    def read(self, name: str) -> Tensor:
        """Read one tensor. From safetensors it is mapped, and freed when it is no longer referenced."""
        place = self.tensors[name]
        if place.file.suffix == ".safetensors":
            return self._reader.read(name, place)
        if self._opened is None or self._opened[0] != place.file:
            self._opened = (place.file, _load_pickled(place.file))
        return self._opened[1][name]

    def _weight_files(self) -> tuple[Path | None, list[Path]]:
        """The index, or None, and the weight files: safetensors if there are any, else torch's own."""
        present = {entry.name for entry in os.scandir(self.path) if entry.is_file()}
        for stem, suffix in _FORMATS:
            index = self.path / f"{stem}.{suffix}.index.json"
            if index.name in present:
                names = sorted(set(_weight_map(index).values()))
                for name in names:
                    if not name.endswith(f".{suffix}") or "/" in name:
                        raise CheckpointError(
                            f"{index} names {name!r} as a weight file; weight files must be *.{suffix} files "
                            "beside the index"
                        )
                    if name not in present:
                        raise CheckpointError(
                            f"{index} names {name}, which does not exist; download the whole model again"
                        )
                return index, [self.path / name for name in names]
            if f"{stem}.{suffix}" in present:
                return None, [self.path / f"{stem}.{suffix}"]
        raise CheckpointError(
            f"{self.path} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index of "
            "either; give a directory with weights in one of these formats"
        )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says."""
    try:
        found = _read_json(index, once=True).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(f"{error}; download it again") from None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(
            f"{index} is damaged: weight_map must name the file of each tensor; download it again"
        )
    return found


def _check_index(index: Path, tensors: dict[str, Place]) -> None:
    """Raise `CheckpointError` if the index contradicts the files; only warn if its total size is wrong."""
    for name, file in _weight_map(index).items():
        if name not in tensors:
            raise CheckpointError(
                f"{index} places {name} in {file}, which has no such tensor; download the whole model again"
            )
        if (found := tensors[name].file.name) != file:
            raise CheckpointError(
                f"{index} places {name} in {file}, but it is in {found}; download the whole model again"
            )
    metadata = _read_json(index).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != (size := sum(place.nbytes for place in tensors.values())):
        log.warning(
            "%s says that all tensors together have %r bytes, but they have %d; every tensor is complete",
            index,
            total,
            size,
        )


def _list_pickled(file: Path) -> Iterator[tuple[str, Place]]:
    _check_sums(file)
    for name, tensor in _load_pickled(file).items():
        yield name, Place(file, tensor.dtype, tuple(tensor.shape))


def _check_sums(file: Path) -> None:
    """Raise `CheckpointError` if an archive does not fit its checksums, which torch does not check."""
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        OSError,
        ValueError,
        EOFError,
        struct.error,
    ) as error:
        bad = str(error) or type(error).__name__
    if bad:
        raise CheckpointError(
            f"{file} is damaged: its contents do not fit its checksums ({bad[:300]}); download it again"
        )


def _load_pickled(file: Path) -> dict[str, Tensor]:
    """Load a ``pytorch_model*.bin`` without running code that the pickle may name."""
    try:
        # Files from before torch 1.6 are not archives, and only an archive can be mapped.
        loaded = contents.load(file, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged or malicious pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file} is unsafe or damaged ({reason[:300]}); nothing was loaded. Use a version of the model "
            "in safetensors"
        ) from None
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and torch.is_tensor(v) for k, v in loaded.items()
    ):
        raise CheckpointError(f"{file} must hold a dictionary of tensors by name, but holds something else")
    for name, tensor in loaded.items():
        if (
            tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or tensor.dtype not in DTYPE_OF_CODE.values()
        ):
            raise CheckpointError(
                f"{file}: {name} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, which "
                "cannot be imported (quantised?); give the unquantised model"
            )
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _read_json(file: Path, *, once: bool = False) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        once: refuse a key that occurs twice. Otherwise its last value counts, as in other programs.
    """
    if not file.is_file():
        raise ConfigError(
            f"{file} does not exist; {file.parent} is not the directory of a Hugging Face model"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique if once else None)
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, but holds a {type(content).__name__}")
    return content
