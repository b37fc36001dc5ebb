"""Reads published files, and reports every problem with its file and its line or field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_evomoe.evaluation.item import BenchmarkError, Source


def read_text(path: Path) -> str:
    """The file as text. Raises `BenchmarkError` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: Path) -> Any:
    """A JSON document. Raises `BenchmarkError` if it cannot be read."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path} is not valid JSON: {error}") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """``file:line`` and value of every line that is not blank. Raises `BenchmarkError` for damaged lines."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except ValueError as error:
            raise BenchmarkError(f"{path}:{number} is not valid JSON: {error}") from None


def field(record: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """``record[name]``. Raises `BenchmarkError` if it is missing or has another type."""
    if not isinstance(record, dict):
        raise BenchmarkError(f"{where}: expected an object with {name!r}, got a {type(record).__name__}")
    if name not in record:
        raise BenchmarkError(
            f"{where}: field {name!r} is missing; it has {', '.join(map(repr, record)) or 'none'}"
        )
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise BenchmarkError(f"{where}: field {name!r} must be {wanted}, got {value!r:.80}")
    return value


def one_of(value: Any, allowed: tuple[str, ...], where: str, name: str) -> str:
    """`value` in lower case. Raises `BenchmarkError` if it is not in `allowed`."""
    found = value.strip().lower() if isinstance(value, str) else value
    if found not in allowed:
        raise BenchmarkError(f"{where}: {name} must be {' or '.join(allowed)}, got {value!r:.80}")
    return found


def find_image(source: Source, candidates: tuple[str, ...], where: str) -> Path:
    """The first of `candidates` that exists in the image folder. Raises `BenchmarkError` if none does."""
    if source.images is None:
        raise BenchmarkError(f"{where} names an image; give the folder of the images with --images")
    for name in candidates:
        path = source.images / name
        if path.is_file():
            return path
    raise BenchmarkError(f"{where}: image {' or '.join(candidates)} is not in {source.images}")
