"""A Hugging Face directory read raw: ``config.json`` and its tensors, by name, one at a time. No model class,
no code of theirs.

transformers may fill what it does not find with random numbers and a warning; here what is not found is an
error.
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
from megatron_evomoe.hf.from_hf.safetensors_reader import DTYPE_OF_CODE, Place, Reader, read_header, unique

log = logging.getLogger(__name__)

_FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))


class HfDirectory:
    """The configuration and the tensors of a directory in one of Hugging Face's formats.

    Attributes:
        config: ``config.json``.
        tensors: name -> place of every tensor; sizes are checked against the files, contents are read later.

    Raises:
        ConfigError: no directory, no ``config.json``, or a damaged one.
        CheckpointError: no weights, a damaged file, an index that names a file that is missing or elsewhere,
            or a tensor that is not in the file it names; a name that occurs twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} is no directory; give a Hugging Face model's directory")
        self.config = _read_json(self.path / "config.json")
        self.tensors: dict[str, Place] = {}
        index, files = self._weight_files()
        for file in files:
            for name, place in read_header(file) if file.suffix == ".safetensors" else _list_pickled(file):
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
        """The tensor of that name. From safetensors it is a view of the file, gone from memory when it is let
        go.
        """
        place = self.tensors[name]
        if place.file.suffix == ".safetensors":
            return self._reader.read(name, place)
        if self._opened is None or self._opened[0] != place.file:
            self._opened = (place.file, _load_pickled(place.file))
        return self._opened[1][name]

    def _weight_files(self) -> tuple[Path | None, list[Path]]:
        """The index if there is one, and the files: safetensors where there are any, else torch's own."""
        present = {entry.name for entry in os.scandir(self.path) if entry.is_file()}
        for stem, suffix in _FORMATS:
            index = self.path / f"{stem}.{suffix}.index.json"
            if index.name in present:
                names = sorted(set(_weight_map(index).values()))
                for name in names:
                    if not name.endswith(f".{suffix}") or "/" in name:
                        raise CheckpointError(
                            f"{index} names {name!r} as a file of weights; files are *.{suffix} beside the "
                            "index"
                        )
                    if name not in present:
                        raise CheckpointError(
                            f"{index} names {name}, which is not there; fetch the whole model again"
                        )
                return index, [self.path / name for name in names]
            if f"{stem}.{suffix}" in present:
                return None, [self.path / f"{stem}.{suffix}"]
        raise CheckpointError(
            f"{self.path} holds no weights: no model.safetensors or pytorch_model.bin, nor an index of one"
        )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index has it."""
    try:
        found = _read_json(index, once=True).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(f"{error}; fetch it again") from None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(
            f"{index} is damaged: weight_map must name the file of each tensor; fetch it again"
        )
    return found


def _check_index(index: Path, tensors: dict[str, Place]) -> None:
    """Raises `CheckpointError` if the index and its files disagree; says so if only its total does."""
    for name, file in _weight_map(index).items():
        if name not in tensors:
            raise CheckpointError(
                f"{index} places {name} in {file}, which has no such tensor; fetch the whole model again"
            )
        if (found := tensors[name].file.name) != file:
            raise CheckpointError(
                f"{index} places {name} in {file}, and it is in {found}; fetch the whole model again"
            )
    metadata = _read_json(index).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != (size := sum(place.nbytes for place in tensors.values())):
        log.warning(
            "%s says that its tensors have %r bytes together; they have %d, and each is whole",
            index,
            total,
            size,
        )


def _list_pickled(file: Path) -> Iterator[tuple[str, Place]]:
    _check_sums(file)
    for name, tensor in _load_pickled(file).items():
        yield name, Place(file, tensor.dtype, tuple(tensor.shape))


def _check_sums(file: Path) -> None:
    """Raises `CheckpointError` unless an archive is what its checksums say; torch does not look at them."""
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
            f"{file} is damaged: its checksums disagree with its contents ({bad[:300]}); fetch it again"
        )


def _load_pickled(file: Path) -> dict[str, Tensor]:
    """A ``pytorch_model*.bin``, opened without running what it may name."""
    try:
        # files of before torch 1.6 are no archives, and only an archive can be mapped
        loaded = contents.load(file, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged or malicious pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file} is unsafe or damaged ({reason[:300]}); nothing was loaded. Ask its author for "
            "safetensors"
        ) from None
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and torch.is_tensor(v) for k, v in loaded.items()
    ):
        raise CheckpointError(f"{file} holds something else than a dictionary of tensors by name")
    for name, tensor in loaded.items():
        if (
            tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or tensor.dtype not in DTYPE_OF_CODE.values()
        ):
            raise CheckpointError(
                f"{file}: {name} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, which is "
                "not "
                "read here (quantised?)"
            )
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _read_json(file: Path, *, once: bool = False) -> dict[str, Any]:
    """A file's mapping; with `once` every key may occur once, else the last counts, as for everybody who
    reads it.
    """
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; {file.parent} is no Hugging Face model directory")
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique if once else None)
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, a mapping is expected")
    return content
