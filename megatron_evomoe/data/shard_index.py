"""Where each sample of a tar lies: built by one pass over the headers, kept beside the tar, read without the tar.

The index makes a shard addressable (any sample by pread, in any order), which is what a resumable global order rests on. It is a
cache: it names the tar's size and modification time, and is rebuilt when they differ or it cannot be read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.fingerprint import sampled_sum

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
PICKLE_EXTENSIONS = ("pkl", "pickle", "pyd", "pth", "pt")
INDEX_SUFFIX = ".idx"
_VERSION = 2
_BLOCK = 512
_ARRAYS = ("keys", "text", "is_json", "first", "images", "content")


@dataclass
class ShardIndex:
    """n samples with m images. Byte ranges are (offset, size) in the tar; sample i has images first[i] … first[i + 1] - 1."""

    keys: np.ndarray
    """bytes [n], UTF-8."""
    text: np.ndarray
    """int64 [n, 2]: the KEY.json or KEY.txt member."""
    is_json: np.ndarray
    """bool [n]: json, or a txt caption."""
    first: np.ndarray
    """int64 [n + 1]."""
    images: np.ndarray
    """int64 [m, 2]."""
    content: np.ndarray
    """uint32 [n]: a checksum of what `fingerprint.sampled_sum` reads of each sample."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """What was left out or is odd: slug -> the members or keys."""

    def __len__(self) -> int:
        return len(self.keys)


def load_index(tar: Path) -> ShardIndex:
    """The index of `tar`, from beside it if that is current, else built (and written, where the folder lets us).

    Raises:
        ConfigError: the tar is missing, empty, compressed or no tar.
    """
    try:
        stat = tar.stat()
    except OSError as error:
        raise ConfigError(f"shard {tar} cannot be read: {error.strerror or error}") from None
    stamp = np.array([_VERSION, stat.st_size, stat.st_mtime_ns], dtype=np.int64)
    path = tar.with_name(tar.name + INDEX_SUFFIX)
    index = _read(path, stamp)
    if index is None:
        index = build_index(tar)
        _write(path, stamp, index)
    return index


def build_index(tar: Path) -> ShardIndex:
    """Read all headers of `tar`. Samples cut off by a truncated end are left out and reported, and so is what is not data."""
    size = tar.stat().st_size
    if size == 0:
        raise ConfigError(f"shard {tar} is empty (0 bytes); write it again or leave it out")
    problems: dict[str, list[str]] = {}
    samples = _group(_members(tar, size, problems), size, problems)
    keys, text, is_json, first, images = [], [], [], [0], []
    for key, members in samples:
        kind = "json" if "json" in members else "txt"
        if kind not in members:
            problems.setdefault("no-json", []).append(key)
            continue
        keys.append(key.encode(errors="surrogateescape"))
        text.append(members[kind])
        is_json.append(kind == "json")
        images += [members[e] for e in sorted((e for e in members if e not in ("json", "txt")), key=_image_order)]
        first.append(len(images))
    if not keys:
        found = "; ".join(f"{slug}: {len(names)}" for slug, names in problems.items()) or "no members"
        raise ConfigError(f"shard {tar} holds no sample ({found}); KEY.json, with KEY.jpg/png/webp beside it, is expected")
    return ShardIndex(np.array(keys), np.array(text, np.int64), np.array(is_json), np.array(first, np.int64),
                      np.array(images, np.int64).reshape(-1, 2), _content(tar, text, first, images), problems)


def _content(tar: Path, text: list[tuple[int, int]], first: list[int], images: list[tuple[int, int]]) -> np.ndarray:
    """The checksum of each sample, for `ShardIndex.content`."""
    fd = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sums = [sampled_sum(fd, [member, *images[start:end]])
                for member, (start, end) in zip(text, itertools.pairwise(first), strict=True)]
    finally:
        os.close(fd)
    return np.array(sums, np.uint32)


def _members(tar: Path, size: int, problems: dict[str, list[str]]) -> list[tarfile.TarInfo]:
    """All headers; notes `truncated` when the archive has no end marker or stops inside a member."""
    members: list[tarfile.TarInfo] = []
    try:
        archive = tarfile.open(tar, mode="r:")  # noqa: SIM115 (a with block would not tell a bad start from a bad middle)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigError(f"shard {tar} is no uncompressed tar ({error}); unpack it, samples are read in place") from None
    with archive:
        try:
            while (member := archive.next()) is not None:
                members.append(member)
                archive.members = []  # it would keep them all
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            problems["truncated"] = [f"{error} after {len(members)} members"]
        end = archive.offset
    with open(tar, "rb") as file:
        file.seek(end)
        if "truncated" not in problems and (end >= size or file.read(_BLOCK).strip(b"\0")):
            problems["truncated"] = [f"no end-of-archive marker after {len(members)} members"]
    return members


def _group(members: list[tarfile.TarInfo], size: int, problems: dict[str, list[str]]) -> list[tuple[str, dict]]:
    """Members to samples by key, adjacent or not. A key that comes again with a kind it has already had starts a new sample."""
    samples: list[tuple[str, dict]] = []
    current: dict[str, int] = {}  # key -> its newest sample
    times: Counter[str] = Counter()
    cut: set[int] = set()

    def note(slug: str, name: str) -> None:
        problems.setdefault(slug, []).append(name)

    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = (f"{folder}/{stem}" if folder else stem), extension.lower()
        if member.isdir():
            continue
        if extension.rpartition(".")[2] in PICKLE_EXTENSIONS:
            note("pickle-member", member.name)
        elif not member.isreg():
            note("not-a-file", member.name)
        elif extension not in ("json", "txt") and not _is_image(extension):
            note("ignored-member", member.name)
        else:
            if key not in current or extension in samples[current[key]][1]:
                times[key] += 1
                if times[key] > 1:
                    note("duplicate-key", key)
                current[key] = len(samples)
                samples.append((key if times[key] == 1 else f"{key}~{times[key]}", {}))
            samples[current[key]][1][extension] = (member.offset_data, member.size)
            if member.offset_data + member.size > size:
                cut.add(current[key])
    for i in cut:
        note("truncated", samples[i][0])
    return [sample for i, sample in enumerate(samples) if i not in cut]


def _is_image(extension: str) -> bool:
    """``jpg``, or ``3.jpg`` for the fourth of several; ``seg.png`` belongs to somebody else."""
    number, dot, last = extension.rpartition(".")
    return last in IMAGE_EXTENSIONS and (not dot or number.isdecimal())


def _image_order(extension: str) -> tuple[int, str]:
    number = extension.rpartition(".")[0]
    return (int(number) if number else -1), extension


def _read(path: Path, stamp: np.ndarray) -> ShardIndex | None:
    """None when there is none, or it is stale or damaged."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            if not np.array_equal(saved["stamp"], stamp):
                return None
            problems = json.loads(saved["problems"].tobytes())
            return ShardIndex(*(saved[name] for name in _ARRAYS), problems)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(path: Path, stamp: np.ndarray, index: ShardIndex) -> None:
    """Write beside and rename, so that ranks doing the same at once cannot harm each other. A read-only folder is fine."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, stamp=stamp, problems=np.frombuffer(json.dumps(index.problems).encode(), dtype=np.uint8),
                     **{name: getattr(index, name) for name in _ARRAYS})
        os.replace(temporary, path)
    except OSError as error:
        logger.info("index %s cannot be written (%s); it is rebuilt in memory at every start", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
