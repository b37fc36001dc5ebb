"""The file of the lengths of samples: safetensors whose largest tensor is mapped into memory.

    samples   int32 [n, 4]        the numbers of each sample (`sample_length.Column`)
    several   int32 [m]           the places of images of samples that have several, block by block
    starts    int64 [blocks + 1]  where each block's part of `several` begins
    sums      uint32 [blocks]     CRC-32 of the numbers of each block, samples and several

A block is `BLOCK` samples in a row. Metadata holds the fingerprint of what the numbers depend on, the first
sample, the unusable samples by reason, and a digest over everything but the two large tensors. A file that
was cut, changed or made for something else is therefore told at once, except for a changed block of a large
file: its checksum is compared when the block is first read.

The parts of unfinished work have the same form.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_evomoe.data.errors import DataError
from megatron_evomoe.data.sample_length import Column, Measured

BLOCK = 4096
"""Samples of a block."""
_WHOLE = 1 << 26  # bytes of a file up to which all blocks are compared when it is opened
_MAX_HEADER = 1 << 24
_EXAMPLES = 5
_DTYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8"), "U32": np.dtype("<u4")}
_FORM = {"samples": "I32", "several": "I32", "starts": "I64", "sums": "U32"}


class DamagedError(DataError):
    """A file of lengths that is not what it should be; it is computed again."""


@dataclass
class Problem:
    """The samples that are unusable for one reason."""

    count: int = 0
    examples: list[tuple[int, str]] = field(default_factory=list)
    """Number and message of the first of them, at most 5."""

    def add(self, other: Problem) -> None:
        """Add the samples that come after those that were counted."""
        self.count += other.count
        self.examples += other.examples[: _EXAMPLES - len(self.examples)]


def problems_of(first: int, measured: Measured) -> dict[str, Problem]:
    """The unusable samples by reason; `first` is the number of the first sample measured."""
    found: dict[str, Problem] = {}
    for at, error in measured.problems.items():
        found.setdefault(error.reason, Problem()).add(Problem(1, [(first + at, error.message)]))
    return found


class LengthsFile:
    """The numbers of n samples in a row, read from a file that is mapped into memory.

    Attributes:
        path: the file.
        problems: the unusable samples by reason.
        digest: identifies the contents.
    """

    def __init__(self, path: Path, fingerprint: str, samples: range) -> None:
        """Open a file and check that it is whole and that it is of these samples.

        Raises:
            DamagedError: it is not.
            FileNotFoundError: there is no such file.
        """
        self.path = path
        try:
            tensors, metadata = _mapped(path)
            self.samples, self.several = tensors["samples"], tensors["several"]
            self._starts, self._sums = np.array(tensors["starts"]), np.array(tensors["sums"])
            said = json.loads(metadata["about"])
            self.problems = {reason: _problem(found) for reason, found in said["problems"].items()}
        except FileNotFoundError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{path} is not a whole file of lengths ({error})") from None
        self.digest = _digest(metadata["about"], self._starts, self._sums)
        if self.digest != metadata.get("digest"):
            raise DamagedError(f"{path} was changed: its digest differs")
        if (said.get("fingerprint"), said.get("first")) != (fingerprint, samples.start):
            raise DamagedError(f"{path} holds lengths of other samples, of another tokenizer or template")
        self._check_shapes(len(samples))
        self._checked = np.zeros(len(self._sums), bool)
        if path.stat().st_size <= _WHOLE:
            self.check(np.arange(len(self._sums)))

    def _check_shapes(self, count: int) -> None:
        blocks = -(-count // BLOCK)
        shapes = self.samples.shape, self.several.ndim, self._starts.shape, self._sums.shape
        if shapes != ((count, len(Column)), 1, (blocks + 1,), (blocks,)):
            raise DamagedError(f"{self.path} has tensors of {shapes}, which are not those of {count} samples")
        ends = self._starts[[0, -1]].tolist()
        if ends != [0, len(self.several)] or (np.diff(self._starts) < 0).any():
            raise DamagedError(f"{self.path} has blocks that do not follow each other")

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """The numbers of some samples, counted from the file's first, int32 [k, 4]. Raises `DamagedError`."""
        self.check(samples // BLOCK)
        return self.samples[samples]

    def images(self, sample: int, image: int) -> np.ndarray:
        """The first positions of the images of a sample that has several; `image` is its `Column.IMAGE`."""
        block = self.several[slice(*self._starts[sample // BLOCK : sample // BLOCK + 2].tolist())]
        at = -2 - image
        return block[at + 1 : at + 1 + int(block[at])]

    def check(self, blocks: np.ndarray) -> None:
        """Compare the checksums of blocks that were not compared before. Raises `DamagedError`."""
        new = blocks[~self._checked[blocks]]
        for block in np.unique(new).tolist():
            rows, several = self.block(block)
            if _sum(rows, several) != int(self._sums[block]):
                raise DamagedError(f"{self.path} is damaged: the checksum of block {block} differs")
            self._checked[block] = True

    def block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """A block's rows, int32 [≤ BLOCK, 4], and its part of `several`."""
        start, end = self._starts[block : block + 2].tolist()
        return self.samples[block * BLOCK : (block + 1) * BLOCK], self.several[start:end]

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return len(self._sums)


def read_lengths(path: Path) -> np.ndarray:
    """The tokens of all samples that have a file of lengths, int32 [n]; negative where one is unusable.

    Raises:
        DataError: the file is missing, cut or something else. Checksums are not compared.
    """
    try:
        return np.array(_mapped(path)[0]["samples"][:, Column.LENGTH])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is not a whole file of lengths ({error}); training with packing sort or pack writes "
            "one beside its first shard, .evomoe-lengths-…"
        ) from None


def _problem(found: dict[str, Any]) -> Problem:
    return Problem(int(found["count"]), [(int(i), str(message)) for i, message in found["examples"]])


def _mapped(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file, mapped, and its metadata."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
        end = 8 + length
        data = np.memmap(file, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    tensors = {}
    for name, kind in _FORM.items():  # in the order in which they lie
        found = header[name]
        dtype, shape = _DTYPES[kind], tuple(int(one) for one in found["shape"])
        count = int(np.prod(shape, dtype=object)) if min(shape) >= 0 else -1
        begin, stop = end, end + count * dtype.itemsize
        offsets = [begin - 8 - length, stop - 8 - length]
        if found["dtype"] != kind or found["data_offsets"] != offsets or not begin <= stop <= size:
            raise ValueError(f"tensor {name} is not where it should be")
        tensors[name], end = data[begin:stop].view(dtype).reshape(shape), stop
    if end != size:
        raise ValueError(f"{size - end} bytes too many")
    return tensors, header["__metadata__"]


def _sum(rows: np.ndarray, several: np.ndarray) -> int:
    return zlib.crc32(several.astype("<i4").tobytes(), zlib.crc32(rows.astype("<i4").tobytes()))


def _digest(about: str, starts: np.ndarray, sums: np.ndarray) -> str:
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for array in (starts.astype("<i8"), sums.astype("<u4")):
        digest.update(array.tobytes())
    return digest.hexdigest()


def file_content(
    fingerprint: str,
    first: int,
    blocks: Sequence[tuple[np.ndarray, np.ndarray]],
    problems: dict[str, Problem],
) -> Iterator[bytes]:
    """The bytes of a file of these blocks, one after the other.

    Args:
        first: the number of the first sample.
        blocks: rows and `several` of each block; all but the last have BLOCK rows. They are read three times,
            and need not be in memory.
    """
    sums = np.array([_sum(*block) for block in blocks], "<u4")
    starts = np.cumsum([0, *(len(several) for _, several in blocks)], dtype="<i8")
    about = json.dumps(
        {
            "fingerprint": fingerprint,
            "first": first,
            "problems": {reason: asdict(problem) for reason, problem in problems.items()},
        }
    )
    count = sum(len(rows) for rows, _ in blocks)
    shapes = {
        "samples": (count, len(Column)),
        "several": (int(starts[-1]),),
        "starts": starts.shape,
        "sums": sums.shape,
    }
    yield _header(shapes, {"about": about, "digest": _digest(about, starts, sums)})
    for which in (0, 1):
        for block in blocks:
            yield np.ascontiguousarray(block[which], "<i4").tobytes()
    yield starts.tobytes()
    yield sums.tobytes()


def _header(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, kind in _FORM.items():
        size = int(np.prod(shapes[name], dtype=np.int64)) * _DTYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
