"""Reads tensors of safetensors files one at a time, through the safetensors library.

The library checks a header against its file: types, shapes, lengths, and offsets without holes or overlaps.
    It
does not check that each name occurs once, which the format demands: it keeps the last of two entries
    silently,
so a file could show one tensor to a scanner and another one to a loader. `list_tensors` therefore reads the
header a second time, for that check alone.
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
"""safetensors' codes of the dtypes that can be imported. Quantised types are not among them."""
_BYTES_PER_OPENING = 2**26


@dataclass(frozen=True)
class Place:
    """File, dtype and shape of one tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object's pairs, as json's ``object_pairs_hook``.

    Raises:
        ValueError: a key occurs twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def list_tensors(file: Path) -> Iterator[tuple[str, Place]]:
    """Yield name and place of each tensor of a file. Only the header is read.

    Raises:
        CheckpointError: the header is damaged, does not fit the file, names a tensor twice, or has a dtype
            that cannot be imported.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not a mapping)
            entries = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()]
        _refuse_duplicate_names(file)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise _damaged(file, error) from None
    for name, dtype, shape in entries:
        if dtype not in DTYPE_OF_CODE:
            raise CheckpointError(
                f"{file}: {name} has dtype {dtype}, which cannot be imported (quantised?); "
                f"known: {', '.join(DTYPE_OF_CODE)}"
            )
        yield name, Place(file, DTYPE_OF_CODE[dtype], shape)


def _refuse_duplicate_names(file: Path) -> None:
    """Raise `ValueError` if a header, which the library has found valid, names a tensor twice."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        json.loads(stream.read(length), object_pairs_hook=unique)


@dataclass
class Reader:
    """Reads tensors, and opens a file again after every 64 MiB that were read from it.

    An open file is mapped into memory, and what was read stays there until the file is closed. Opening a file
    parses its header, which takes 7 ms for 12,000 tensors, so it is not done for every tensor.
    """

    _file: Path | None = None
    _opened: Any = field(default=None, repr=False)
    _bytes: int = 0

    def read(self, name: str, place: Place) -> Tensor:
        """Read one tensor.

        It is a private mapping of the file: writing to it does not change the file, and its memory is freed
        when it and the tensors that were read through the same opening are no longer referenced.

        Raises:
            CheckpointError: the file has changed since it was listed.
        """
        try:
            if self._file != place.file or self._bytes > _BYTES_PER_OPENING:
                self._opened, self._file, self._bytes = None, None, 0
                self._opened, self._file = safe_open(place.file, framework="pt"), place.file
            self._bytes += place.nbytes
            return self._opened.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise _damaged(place.file, error) from None


def _damaged(file: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{file} is damaged: {reason[:300]}; fetch it again")
