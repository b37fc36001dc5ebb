"""The table of a set of shards: one row per shard, so that starting does not depend on the number of samples.

The table lies in one file beside the first shard (or in a cache directory, where that directory is
read-only), which all processes of a node map. Its rows say how many samples and images a shard has, its
digest and its problems. The index of a shard itself is only opened when one of its samples is read.

Only the stamps of the shards decide whether a row is current: size, time of modification, and time of the
last change of the inode, which a program cannot set. Rows that are not current are made by all processes that
ask for them at the same time (`shared_work`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from megatron_evomoe.data.files import write_atomically
from megatron_evomoe.data.fingerprint import shard_digest
from megatron_evomoe.data.mapped_arrays import map_arrays
from megatron_evomoe.data.shard_index import ShardIndex, are_problems, load_index, tar_stamp
from megatron_evomoe.data.shared_work import build_together

logger = logging.getLogger(__name__)

_VERSION = 1
_MAX_BYTES = 1 << 32
_PIECE = 16
"""Shards that a process indexes at a time."""
_MANY = 256
"""From so many shards on, their stamps are read by threads, because file systems answer slowly."""
_TABLES = 8  # tables of other sets in the same directory whose rows are looked at
SUFFIX = ".evomoe-set"
_ARRAYS = ("version", "stamps", "samples", "images", "digests", "starts", "names", "ends", "problems")
Problems = dict[str, list[str]]
Row = tuple[int, int, str, Problems]
"""Samples, images, digest and problems of a shard."""


class ShardSet:
    """The rows of s shards, mapped from a file or held in memory.

    Attributes:
        path: the file; none if it could not be written anywhere.
        paths: the files of the shards.
        stamps: int64 [s, 3]: `shard_index.tar_stamp` of each shard.
        samples: int64 [s]: numbers of samples.
        images: int64 [s]: numbers of images.
        starts: int64 [s + 1]: the number of the first sample of each shard, and of all samples.
        problems: what is odd inside shards, by the number of the shard: slug to the names of members or keys.
    """

    def __init__(self, arrays: dict[str, np.ndarray], folder: Path, path: Path | None = None) -> None:
        self._arrays, self.path = arrays, path
        self.stamps, self.samples, self.images = (arrays[n] for n in ("stamps", "samples", "images"))
        self.starts, self._digests = arrays["starts"], arrays["digests"]
        self.paths: Sequence[Path] = _Paths(folder, arrays["names"], arrays["ends"])
        found = json.loads(arrays["problems"].tobytes())
        self.problems: dict[int, Problems] = {int(shard): problems for shard, problems in found.items()}

    @classmethod
    def open(cls, path: Path, folder: Path, *, is_plan: bool = False) -> ShardSet | None:
        """The set in a file; none if it is missing or damaged.

        Args:
            folder: the directory of the first shard.
            is_plan: rows may be missing.
        """
        try:
            arrays, _ = map_arrays(path, _MAX_BYTES)
            if arrays["seal"].tobytes() != _seal(arrays) or int(arrays["version"][0]) != _VERSION:
                return None
            found = cls(arrays, folder, path)
            return found if _holds_together(found, arrays, -1 if is_plan else 1) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def __len__(self) -> int:
        return len(self.samples)

    def digest(self, shard: int) -> str:
        """The digest of a shard (`fingerprint.shard_digest`)."""
        return self._digests[shard].tobytes().hex()

    def names(self) -> list[bytes]:
        """The names of the shards in the table."""
        blob, ends = self._arrays["names"].tobytes(), self._arrays["ends"].tolist()
        return [blob[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    def unknown(self) -> np.ndarray:
        """The numbers of the shards that have no row yet, int64 [k]."""
        return np.flatnonzero(self.samples < 0)

    def with_rows(self, rows: dict[int, Row], folder: Path, path: Path | None = None) -> ShardSet:
        """A copy with the rows of some more shards."""
        arrays = {name: self._arrays[name].copy() for name in ("stamps", "samples", "images", "digests")}
        arrays |= {name: self._arrays[name] for name in ("names", "ends")}
        problems = {**self.problems}
        for shard, (samples, images, digest, odd) in rows.items():
            arrays["samples"][shard], arrays["images"][shard] = samples, images
            arrays["digests"][shard] = np.frombuffer(bytes.fromhex(digest), np.uint8)
            if odd:
                problems[shard] = odd
        arrays["starts"] = np.concatenate([[0], np.cumsum(arrays["samples"].clip(min=0))]).astype(np.int64)
        arrays["problems"] = np.frombuffer(json.dumps(problems).encode(), np.uint8)
        return ShardSet(arrays, folder, path)

    def save(self, path: Path) -> None:
        """Write the table to a file. Raises `OSError`."""
        arrays = {**self._arrays, "version": np.array([_VERSION], np.int64)}
        arrays["seal"] = np.frombuffer(_seal(arrays), np.uint8)
        data = safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in arrays.items()})
        write_atomically(path, data)

    def log_problems(self) -> None:
        """Log what is odd inside the shards."""
        for shard, problems in self.problems.items():
            for slug, names in problems.items():
                logger.warning(
                    "shard %s: %s: %d (%s)", self.paths[shard], slug, len(names), ", ".join(names[:3])
                )


class _Paths(Sequence[Path]):
    """Paths that are made when they are asked for: as objects, 10^5 paths take 50 MB in each process."""

    def __init__(self, folder: Path, names: np.ndarray, ends: np.ndarray) -> None:
        self._folder, self._names, self._ends = folder, names, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"shard {i} of {len(self)}")
        i %= len(self)
        start = int(self._ends[i - 1]) if i else 0
        return self._folder / os.fsdecode(self._names[start : int(self._ends[i])].tobytes())


def draft_of(paths: Sequence[Path], cache: Path | None = None) -> tuple[ShardSet, list[Path]]:
    """A set of shards as it lies on the disk now, and the files that may hold its table, in order.

    Rows that tables beside the shards or in `cache` already have are taken from there; if a file has all of
    them, the set is mapped from it. `complete` makes the others.

    Raises:
        ConfigError: a shard is missing or not a file.
    """
    folder = paths[0].parent
    names = [os.fsencode(p.name if p.parent == folder else os.path.abspath(p)) for p in paths]
    stamps = _stamps(paths)
    identity = hashlib.sha256(b"\0".join(names)).hexdigest()[:16]
    version = hashlib.sha256(stamps.tobytes()).hexdigest()[:16]
    file = f".{identity}-{version}.evomoe-set"
    places = [folder / file, *([cache / file] if cache is not None else [])]
    for place in places:
        found = ShardSet.open(place, folder)
        if found is not None and np.array_equal(found.stamps, stamps) and found.names() == names:
            return found, places
    s = len(names)
    arrays = {
        "stamps": stamps,
        "samples": np.full(s, -1, np.int64),
        "images": np.zeros(s, np.int64),
        "digests": np.zeros((s, 16), np.uint8),
        "starts": np.zeros(s + 1, np.int64),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "problems": np.frombuffer(b"{}", np.uint8),
    }
    draft = ShardSet(arrays, folder)
    return draft.with_rows(_known_rows(names, stamps, folder, places), folder), places


def complete(
    draft: ShardSet,
    place: Path,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ShardSet:
    """Make the rows that `draft` lacks, and its file, with all processes that call this for the same draft.

    Args:
        place: the file.
        cache: the directory for indexes of shards in read-only directories.
        progress: called several times a second with the finished and the unknown number of shards, roughly.

    Raises:
        ConfigError: a shard is empty, compressed, not a tar, or without a sample.
        OSError: the file cannot be written; finished rows stay.
    """
    unknown, folder = draft.unknown(), draft.paths[0].parent
    pieces = max(1, -(-len(unknown) // _PIECE))

    def work(piece: int) -> bytes:
        shards = unknown[piece * _PIECE : (piece + 1) * _PIECE].tolist()
        return json.dumps({i: row_of(load_index(draft.paths[i], cache)) for i in shards}).encode()

    def assemble(parts: Sequence[Path], path: Path) -> None:
        rows: dict[int, Row] = {}
        for part in parts:
            rows |= {int(i): row for i, row in json.loads(part.read_bytes()).items()}
        draft.with_rows(rows, folder).save(path)

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(min(done * _PIECE, len(unknown)), len(unknown))

    build_together(
        place,
        pieces,
        work,
        assemble,
        is_current=lambda: ShardSet.open(place, folder) is not None,
        progress=report,
    )
    with contextlib.suppress(OSError):
        place.with_name(f".{place.name.lstrip('.')}.plan").unlink()
    for old in place.parent.glob(f"{place.name.partition('-')[0]}-*{SUFFIX}"):
        if old != place:
            with contextlib.suppress(OSError):
                old.unlink()
    found = ShardSet.open(place, folder)
    if found is None:
        raise FileNotFoundError(f"{place} was removed while it was being used")
    return found


def open_set(
    paths: Sequence[Path], cache: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> tuple[ShardSet, dict[int, ShardIndex]]:
    """The set of shards, from a file or made now, and the indexes of shards that no file could hold.

    Raises:
        ConfigError: as for `draft_of` and `complete`.
    """
    draft, places = draft_of(paths, cache)
    if draft.path is not None:
        return draft, {}
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            return complete(draft, place, cache, progress), {}
        except OSError as error:
            logger.info("%s cannot be written (%s)", place, error)
    logger.info("the index of %s is kept in memory, and made at every start", paths[0].parent)
    indexes = {i: load_index(draft.paths[i], cache) for i in draft.unknown().tolist()}
    rows = {i: row_of(index) for i, index in indexes.items()}
    kept = {i: index for i, index in indexes.items() if not index.is_stored}
    return draft.with_rows(rows, paths[0].parent), kept


def row_of(index: ShardIndex) -> Row:
    """The row of a shard in the table."""
    return len(index), len(index.images), shard_digest(index), index.problems


def _known_rows(
    names: list[bytes], stamps: np.ndarray, folder: Path, places: Sequence[Path]
) -> dict[int, Row]:
    """The rows of shards that another table beside the set's own has under the same stamp."""
    numbers = {name: i for i, name in enumerate(names)}
    rows: dict[int, Row] = {}
    for place in places:
        tables = sorted(place.parent.glob(f".*{SUFFIX}"), key=_age)[:_TABLES]
        for table in tables:
            found = ShardSet.open(table, folder)
            if found is None:
                continue
            for there, name in enumerate(found.names()):
                i = numbers.get(name)
                if i is not None and found.samples[there] >= 0 and (found.stamps[there] == stamps[i]).all():
                    rows[i] = (
                        int(found.samples[there]),
                        int(found.images[there]),
                        found.digest(there),
                        found.problems.get(there, {}),
                    )
    return rows


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def _stamps(paths: Sequence[Path]) -> np.ndarray:
    if len(paths) < _MANY:
        return np.array([tar_stamp(path) for path in paths], np.int64)
    with ThreadPoolExecutor(8) as pool:
        return np.array(list(pool.map(tar_stamp, paths, chunksize=256)), np.int64)


def _holds_together(found: ShardSet, arrays: dict[str, np.ndarray], least: int) -> bool:
    """Whether shapes and types are right, and counts, places of names and problems fit each other."""
    s = len(arrays["samples"])
    shapes = {"stamps": (s, 3), "samples": (s,), "images": (s,), "starts": (s + 1,), "ends": (s,)}
    if s == 0 or any(arrays[n].shape != shape or arrays[n].dtype != np.int64 for n, shape in shapes.items()):
        return False
    if arrays["digests"].shape != (s, 16) or any(
        arrays[n].dtype != np.uint8 for n in ("digests", "names", "problems")
    ):
        return False
    samples, ends = arrays["samples"], arrays["ends"]
    return bool(
        (samples >= least).all()
        and (samples < 1 << 40).all()
        and (arrays["images"] >= 0).all()
        and arrays["starts"][0] == 0
        and (np.diff(arrays["starts"]) == samples.clip(min=0)).all()
        and ends[0] > 0
        and (np.diff(ends) > 0).all()
        and ends[-1] == arrays["names"].size
        and all(0 <= i < s and are_problems(odd) for i, odd in found.problems.items())
    )


def _seal(arrays: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for name in _ARRAYS:
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(arrays[name].tobytes())
    return digest.digest()
