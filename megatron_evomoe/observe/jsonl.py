"""Files with one JSON object per line, from which plots and tables are made.

They survive a killed process and hold any float.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_KEPT = 10_000  # lines held in memory while they cannot be written

log = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """Convert `value` to types that JSON has.

    Tensors and numpy values become numbers or lists. Non-finite floats become the strings "nan", "inf" and
    "-inf", which `float` and `numpy.asarray(…, dtype=float)` read back.

    Raises:
        TypeError: `value` holds an object of another type.
    """
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):  # numpy.float64 is one too; float() drops its type
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "tolist"):  # torch tensors, numpy arrays and scalars
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return str(value)
    raise TypeError(
        f"cannot write a {type(value).__name__} as JSON: {value!r}; pass numbers, strings, lists, dicts or "
        "tensors"
    )


def dumps(record: dict[str, Any]) -> str:
    """`record` as one line with its newline. Floats are written exactly."""
    return json.dumps(plain(record), allow_nan=False, ensure_ascii=False) + "\n"


def append(path: Path, record: dict[str, Any]) -> None:
    """Append one record to a file that is not kept open. For many records use `LineFile`.

    Raises:
        OSError: it could not be written.
    """
    with LineFile(path) as file:
        file.write(record)
        if file.error is not None:
            raise file.error


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of `path` in order; none if the file is missing. A last line that was cut off is skipped.

    Raises:
        ValueError: a line before the last is not JSON, so the file is damaged.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        bad: tuple[int, str] | None = None
        for number, line in enumerate(file, start=1):
            if bad is not None:
                raise ValueError(
                    f"{path}, line {bad[0]} is not JSON: {bad[1][:80]!r}; repair or remove that line"
                )
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                bad = (number, line)


def replace(path: Path, text: str) -> None:
    """Replace the file atomically."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def rewind(path: Path, stage: str, step: int) -> None:
    """Remove the records of `stage` after `step`, and a last line that was cut off.

    Replaces the file atomically.
    """
    if not path.exists():
        return
    kept = [r for r in read(path) if r.get("stage") != stage or r.get("step", step) <= step]
    replace(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))


class LineFile:
    """A file open for appending, without a buffer: a reader and a killed run have every line.

    A line that cannot be written, as on a full disk, is kept in memory and written before the next one once
    there is room. This is logged once. The file never holds half a line, and its lines keep their order.

    Attributes:
        error: why lines are kept in memory; none while all are written.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend(path)
        self._path, self._file = path, path.open("ab", buffering=0)
        self._waiting: list[bytes] = []
        self._lost = 0
        self.error: OSError | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Append `record` (see `plain`)."""
        self._waiting.append(dumps(record).encode())
        self.flush()
        if len(self._waiting) > _KEPT:
            del self._waiting[0]
            self._lost += 1

    def flush(self) -> None:
        """Write the lines kept in memory, as far as that is possible now."""
        waited = len(self._waiting)
        try:
            while self._waiting:
                self._append(self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            if self.error is None:
                log.warning(
                    "%s cannot be written (%s); its lines are kept in memory until it can", self._path, error
                )
            self.error = error
            return
        if self.error is not None:
            log.warning("%s is written again; %d lines had waited", self._path, waited)
            self.error = None

    def _append(self, line: bytes) -> None:
        end, rest = os.fstat(self._file.fileno()).st_size, memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._file.fileno(), end)
            raise

    def close(self) -> None:
        """Try once more to write the kept lines, and log how many are lost. May be called twice."""
        if self._file.closed:
            return
        self.flush()
        if lost := len(self._waiting) + self._lost:
            log.warning("%s lacks %d lines, which could not be written: %s", self._path, lost, self.error)
        self._file.close()

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mend(path: Path) -> None:
    """Remove a last line without newline, which would make one invalid line with the next record."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        position = file.seek(0, os.SEEK_END)
        while position > 0:  # search backwards in blocks; only lines of diagnostics exceed one
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        file.truncate(position)
