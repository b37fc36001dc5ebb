"""Lines of JSON that survive a killed process and any float: the only format plots and tables are made
from.
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
    """`value` as valid JSON: tensors and numpy scalars become numbers or lists, non-finite floats "nan",
    "inf", "-inf".

    `float("nan")` and `numpy.asarray([...], dtype=float)` read these strings back, so readers need no special
    case.
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
    """One line, newline included. Floats keep full precision (Python's shortest exact form)."""
    return json.dumps(plain(record), allow_nan=False, ensure_ascii=False) + "\n"


def append(path: Path, record: dict[str, Any]) -> None:
    """Open, mend, write one line, close. For rare records; `LineFile` is for the many.

    Raises:
        OSError: it could not be written.
    """
    with LineFile(path) as file:
        file.write(record)
        if file.error is not None:
            raise file.error


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Records of `path` in order; none when the file is missing. A last line cut off by a kill is passed
    over.

    Raises:
        ValueError: a line other than the last is not JSON (the file was damaged, not just cut off).
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
    """Give `path` this content in one move: whoever reads, or kills, meets the old file or the new one."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def rewind(path: Path, stage: str, step: int) -> int:
    """Drop the records of `stage` beyond `step`, and a cut-off last line; returns how many records went.

    Other stages' records stay, as they are. The file is replaced in one move, so a kill leaves the old one or
    the new one.
    """
    if not path.exists():
        return 0
    records = list(read(path))
    kept = [r for r in records if r.get("stage") != stage or r.get("step", step) <= step]
    replace(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
    return len(records) - len(kept)


class LineFile:
    """A file open for appending, unbuffered so that `tail -f` and a killed run see all of it.

    A line that cannot be written (a full disk) is kept in memory, which is said once, and written before the
    next one when there is room: the file never holds half a line, nor lines out of order.

    Attributes:
        error: why the lines that wait could not be written; none when none waits.
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
        """Write the lines that wait, as far as that can be done now."""
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
        """Try once more what waits, and say how many lines are lost. Safe to call twice."""
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
    """Cut a last line without its newline: the next record would be glued to it and both be lost."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        position = file.seek(0, os.SEEK_END)
        while position > 0:  # last lines hold a few kB at most except diagnostics; step back in blocks
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        file.truncate(position)
