"""A Hugging Face directory read raw: ``config.json`` and its tensors, by name, one at a time. No model class, no code of theirs.

transformers may fill what it does not find with random numbers and a warning; here what is not found is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_evomoe.checkpoint.mapped import view_of
from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import ConfigError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
"""safetensors' names of the types that are read."""
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class Place:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    """First byte in the file (safetensors only)."""


class HfDirectory:
    """The configuration and the tensors of a directory in one of Hugging Face's formats.

    Attributes:
        config: ``config.json``.
        tensors: name -> place of every tensor; sizes are checked against the files, contents are read later.

    Raises:
        ConfigError: no directory, no ``config.json``, or a damaged one.
        CheckpointError: no weights, a damaged file, a file the index names is missing, a name that occurs twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} is no directory; give a Hugging Face model's directory")
        self.config = _read_json(self.path / "config.json")
        self.tensors: dict[str, Place] = {}
        for file in self._weight_files():
            for name, place in read_header(file) if file.suffix == ".safetensors" else _list_pickled(file):
                if name in self.tensors:
                    raise CheckpointError(f"{self.path}: {name} is in both {self.tensors[name].file.name} and {file.name}")
                self.tensors[name] = place
        self._opened: tuple[Path, dict[str, Tensor]] | None = None

    def read(self, name: str) -> Tensor:
        """The tensor of that name. From safetensors it is a view of the file, gone from memory when it is let go."""
        place = self.tensors[name]
        if place.file.suffix == ".safetensors":
            return view_of(place.file, place.start, place.dtype, place.shape)
        if self._opened is None or self._opened[0] != place.file:
            self._opened = (place.file, _load_pickled(place.file))
        return self._opened[1][name]

    def _weight_files(self) -> list[Path]:
        """safetensors where there are any: an index says which; else torch's own files."""
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            index = self.path / f"{stem}.{suffix}.index.json"
            if index.exists():
                files = [self.path / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
                for file in files:
                    if not file.is_file() or file.parent != self.path:
                        raise CheckpointError(f"{index} names {file.name}, which is not there; fetch the whole model again")
                return files
            if (single := self.path / f"{stem}.{suffix}").exists():
                return [single]
        raise CheckpointError(f"{self.path} holds no weights: no model.safetensors or pytorch_model.bin, nor an index of one")


def read_header(file: Path) -> Iterator[tuple[str, Place]]:
    """Name and place of each tensor of a safetensors file.

    Raises:
        CheckpointError: the header is no header, or says what the file does not hold.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{file} is damaged: its header claims {length} bytes, the file has {size}; fetch it again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = [(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged: its header cannot be read ({error}); fetch it again") from None
    for name, dtype, shape, start, stop in entries:
        if dtype not in DTYPES:
            raise CheckpointError(f"{file}: {name} has dtype {dtype}, which is not read here (quantised?); "
                                  f"known: {', '.join(DTYPES)}")
        if stop - start != math.prod(shape) * DTYPES[dtype].itemsize or start < 0 or 8 + length + stop > size:
            raise CheckpointError(f"{file} is damaged: {name}, {dtype} of shape {shape}, cannot be bytes {start} to {stop} of a "
                                  f"file of {size}; fetch it again")
        yield name, Place(file, DTYPES[dtype], shape, 8 + length + start)


def _list_pickled(file: Path) -> Iterator[tuple[str, Place]]:
    for name, tensor in _load_pickled(file).items():
        yield name, Place(file, tensor.dtype, tuple(tensor.shape))


def _load_pickled(file: Path) -> dict[str, Tensor]:
    """A ``pytorch_model*.bin``, opened without running what it may name."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or malicious pickle can raise anything
        raise CheckpointError(f"{file} is unsafe or damaged ({str(error).splitlines()[0]}); nothing was loaded. Ask its author "
                              "for safetensors") from None
    if not isinstance(loaded, dict) or not all(torch.is_tensor(v) for v in loaded.values()):
        raise CheckpointError(f"{file} holds something else than a dictionary of tensors")
    return loaded


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; {file.parent} is no Hugging Face model directory") from None
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, a mapping is expected")
    return content


def require_empty(output: Path) -> None:
    """Raises `CheckpointError` if something is there."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not empty; choose another --output, or remove it")
