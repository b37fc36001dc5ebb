"""Writes safetensors files one tensor at a time.

The safetensors library writes a file from tensors that are all in memory. Here the shapes are known in
advance, so the header is written first and each tensor follows as soon as it is there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_evomoe.config import ConfigError

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
INDEX = "model.safetensors.index.json"


def parse_size(text: str) -> int:
    """The number of bytes in a text such as "5GB", "800MiB" or "123456".

    Raises:
        ConfigError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, flags=re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ConfigError(
            f"--max-shard-size {text!r} is not a size; give one such as 5GB, 800MB or a number of bytes"
        )
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


@dataclass
class _File:
    name: str = ""
    tensors: list[str] = field(default_factory=list)
    size: int = 0


class ShardedWriter:
    """Writes tensors in a fixed order to files of a limited size, and an index if there are several files.

    Args:
        directory: an existing directory for the files.
        shapes: name -> shape, in the order of `put`.
        dtype: of all tensors in the files.
        max_bytes: largest size of a file; only a single tensor that is larger exceeds it.
    """

    def __init__(
        self, directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_bytes: int
    ) -> None:
        self._directory, self._shapes, self._dtype = directory, dict(shapes), dtype
        self._files = self._plan(max_bytes)
        self._expected = [(name, file) for file in self._files for name in file.tensors]
        self._next = 0
        self._open: IO[bytes] | None = None

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(file.size for file in self._files)

    @property
    def file_names(self) -> list[str]:
        """Of the weights."""
        return [file.name for file in self._files]

    def _bytes(self, name: str) -> int:
        return math.prod(self._shapes[name]) * self._dtype.itemsize

    def _plan(self, max_bytes: int) -> list[_File]:
        files = [_File()]
        for name in self._shapes:
            if files[-1].tensors and files[-1].size + self._bytes(name) > max_bytes:
                files.append(_File())
            files[-1].tensors.append(name)
            files[-1].size += self._bytes(name)
        for i, file in enumerate(files):
            file.name = (
                "model.safetensors"
                if len(files) == 1
                else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
            )
        return files

    def put(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, converted to the writer's dtype."""
        expected, file = self._expected[self._next]
        assert (name, tuple(tensor.shape)) == (expected, self._shapes[expected]), (
            f"{name} comes where {expected} should"
        )
        if name == file.tensors[0]:
            self._begin(file)
        assert self._open is not None
        raw = tensor.to(self._dtype).contiguous().view(-1).view(torch.uint8)
        self._open.write(raw.numpy().data)
        self._next += 1

    def finish(self) -> None:
        """Close the last file and write the index."""
        assert self._next == len(self._expected), f"{len(self._expected) - self._next} tensors never came"
        if self._open is not None:
            self._open.close()
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": self.total_size},
                "weight_map": {n: file.name for n, file in self._expected},
            }
            (self._directory / INDEX).write_text(json.dumps(index, indent=1))

    def _begin(self, file: _File) -> None:
        if self._open is not None:
            self._open.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in file.tensors:
            end = offset + self._bytes(name)
            header[name] = {
                "dtype": _NAMES[self._dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._open = (self._directory / file.name).open("wb", buffering=0)
        self._open.write(len(text).to_bytes(8, "little") + text)
