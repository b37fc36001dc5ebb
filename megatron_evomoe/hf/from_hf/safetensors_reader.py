"""Tensors of safetensors files, by safetensors' own reader, one at a time.

Its reader checks a header against the file (types, shapes, offsets without holes or overlaps, lengths). What
it lets pass is that a name occurs twice, where the last one would win; that is refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_evomoe.checkpoint.record import CheckpointError

DTYPE_OF_CODE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The codes by which a safetensors header names the types that are read."""
_MAPPED = 2**26  # bytes read through one opening


@dataclass(frozen=True)
class Place:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the contents."""
        return math.prod(self.shape) * self.dtype.itemsize


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's ``object_pairs_hook``: a mapping, or a `ValueError` that names what occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def read_header(file: Path) -> Iterator[tuple[str, Place]]:
    """Name and place of each tensor of a file; contents are not read.

    Raises:
        CheckpointError: the header is no header, or says what the file does not hold, or a type that is not
            read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (it is no mapping)
            entries = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()]
        with file.open("rb") as stream:
            json.loads(stream.read(int.from_bytes(stream.read(8), "little")), object_pairs_hook=unique)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise _damaged(file, error) from None
    for name, dtype, shape in entries:
        if dtype not in DTYPE_OF_CODE:
            raise CheckpointError(
                f"{file}: {name} has dtype {dtype}, which is not read here (quantised?); "
                f"known: {', '.join(DTYPE_OF_CODE)}"
            )
        yield name, Place(file, DTYPE_OF_CODE[dtype], shape)


@dataclass
class Reader:
    """Reads tensors through as few openings as memory allows.

    An opening maps the whole file, and what was read stays resident as long as it is open, while opening anew
    parses the header again (7 ms where it names 12,000 tensors). So a file is opened anew after every 64 MiB
    that were read.
    """

    _file: Path | None = None
    _opened: Any = field(default=None, repr=False)
    _bytes: int = 0

    def read(self, name: str, place: Place) -> Tensor:
        """One tensor, a private view of the file: it may be written to, and its memory is gone when it and
        those read through the same opening are let go.

        Raises:
            CheckpointError: the file is no longer what it was.
        """
        try:
            if self._file != place.file or self._bytes > _MAPPED:
                self._opened, self._file, self._bytes = None, None, 0
                self._opened, self._file = safe_open(place.file, framework="pt"), place.file
            self._bytes += place.nbytes
            return self._opened.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise _damaged(place.file, error) from None


def _damaged(file: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{file} is damaged: {reason[:300]}; fetch it again")
