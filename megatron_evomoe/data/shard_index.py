"""The index of a shard: where each of its samples lies. One pass over the headers of the tar builds it.

With the index, any sample can be read by pread in any order, which a resumable global order needs. The index
is a cache in a hidden file beside the tar, whose name neither webdataset nor energon nor ``*.tar`` matches.
It is rebuilt if it is missing or damaged, if the size or the time of the tar has changed, or if it does not
match the tar. `shards.ShardDataset` compares what the index says of a member with the member's own header
whenever it reads that member.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.fingerprint import sampled_sum
from megatron_evomoe.data.mapped_arrays import map_arrays
from megatron_evomoe.data.shard_members import DEFECTS, MAX_KEY, find_samples, split_name
from megatron_evomoe.data.tar import BLOCK, Member, TarError, next_member

logger = logging.getLogger(__name__)

_VERSION = 3
_SLACK = 1 << 20


class Range(NamedTuple):
    """The place of a member: `size` bytes at `offset`, after `lead` blocks of headers."""

    offset: int
    size: int
    lead: int


@dataclass
class ShardIndex:
    """The index of n samples with m images; c samples have both KEY.json and KEY.txt.

    Byte ranges are (offset, size) in the tar. Sample i has the images first[i] … first[i + 1] - 1.
    """

    keys: np.ndarray
    """bytes [n], UTF-8."""
    text: np.ndarray
    """int64 [n, 2]: byte ranges of KEY.json, or of KEY.txt."""
    is_json: np.ndarray
    """bool [n]: whether that is KEY.json."""
    first: np.ndarray
    """int64 [n + 1]: the number of the first image of each sample, and m."""
    images: np.ndarray
    """int64 [m, 2]: byte ranges of the images."""
    captions: np.ndarray
    """int64 [c, 2]: byte ranges of the KEY.txt of samples that also have a KEY.json."""
    captioned: np.ndarray
    """int64 [c]: the numbers of those samples, in order."""
    defects: np.ndarray
    """uint8 [n]: why a sample is unusable, as a position in `shard_members.DEFECTS`; 0 if it is usable."""
    text_lead: np.ndarray
    """uint8 [n]: blocks of headers before the text."""
    image_lead: np.ndarray
    """uint8 [m]: blocks of headers before each image."""
    caption_lead: np.ndarray
    """uint8 [c]: blocks of headers before each caption."""
    content: np.ndarray
    """uint32 [n]: checksums of the bytes that `fingerprint.sampled_sum` reads of each sample."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """What was left out or is odd: slug to the names of members or keys."""
    is_stored: bool = False
    """Whether a file holds the index."""

    def __len__(self) -> int:
        return len(self.keys)

    def text_range(self, i: int) -> Range:
        """The place of the KEY.json, or of the KEY.txt, of sample i."""
        return _range(self.text[i], self.text_lead[i])

    def image_range(self, image: int) -> Range:
        """The place of an image, by its number in the shard."""
        return _range(self.images[image], self.image_lead[image])

    def caption_range(self, i: int) -> Range | None:
        """The place of the KEY.txt beside the KEY.json of sample i; None if there is none."""
        at = int(np.searchsorted(self.captioned, i))
        if at == len(self.captioned) or self.captioned[at] != i:
            return None
        return _range(self.captions[at], self.caption_lead[at])


def _range(at: np.ndarray, lead: np.integer) -> Range:
    """A row of byte ranges as a `Range`."""
    return Range(int(at[0]), int(at[1]), int(lead))


_ARRAYS = tuple(f.name for f in fields(ShardIndex) if f.name not in ("problems", "is_stored"))


def index_path(tar: Path) -> Path:
    """The file that holds the index of a tar."""
    return tar.with_name(f".{tar.name}.evomoe-index")


def index_places(tar: Path, cache: Path | None) -> list[Path]:
    """Where the index of a tar may lie: beside it, or in `cache`, if its own directory is read-only."""
    beside = index_path(tar)
    if cache is None:
        return [beside]
    folder = hashlib.sha256(os.path.abspath(tar.parent).encode(errors="surrogateescape")).hexdigest()[:16]
    return [beside, cache / folder / beside.name]


def load_index(tar: Path, cache: Path | None = None) -> ShardIndex:
    """The index of a tar: one that is there, if it is current and matches the tar, else a new one.

    A new index is written beside the tar, or in `cache` if that directory is read-only. `is_stored` tells
    whether a file holds it.

    Raises:
        ConfigError: the file is missing, empty, compressed or not a tar.
    """
    stamp = _stamp(*tar_stamp(tar)[:2])
    if (index := stored_index(tar, stamp, cache)) is not None:
        return index
    return renewed_index(tar, cache)


def renewed_index(tar: Path, cache: Path | None = None) -> ShardIndex:
    """A new index of a tar, which is also written. Raises `ConfigError` as `load_index` does."""
    stamp = _stamp(*tar_stamp(tar)[:2])
    index = build_index(tar)
    index.is_stored = any(_write(path, stamp, index) for path in index_places(tar, cache))
    return index


def tar_stamp(tar: Path) -> tuple[int, int, int]:
    """Size, time of modification and time of the last change of the inode, the times in nanoseconds.

    Raises:
        ConfigError: there is no such file.
    """
    try:
        status = tar.stat()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"shard {tar} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"shard {tar} is not a file; give the path of a tar, or of a directory with tars")
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _stamp(size: int, mtime: int) -> np.ndarray:
    return np.array([_VERSION, size, mtime], dtype=np.int64)


def stored_index(
    tar: Path,
    stamp: np.ndarray | tuple[int, int],
    cache: Path | None = None,
    *,
    is_known: bool = False,
    compare: bool = True,
) -> ShardIndex | None:
    """The index of a tar, mapped from a file; none if no file has it, or it does not match the tar.

    Args:
        stamp: size and time of modification of the tar.
        is_known: the file was checked before by this process, and is not read as a whole again.
        compare: compare three members with the tar.
    """
    if not isinstance(stamp, np.ndarray):
        stamp = _stamp(*stamp)
    for path in index_places(tar, cache):
        index = _read(path, stamp, is_known)
        if index is not None and (is_known or not compare or _is_of(tar, index)):
            index.is_stored = True
            return index
    return None


def build_index(tar: Path) -> ShardIndex:
    """Build the index of a tar from all its headers.

    Samples that the end of the file cuts off are left out and reported, and so are members that are not data.

    Raises:
        ConfigError: the file is empty or unreadable, or contains no sample.
    """
    size = tar.stat().st_size
    if size == 0:
        raise ConfigError(f"shard {tar} is empty (0 bytes); write it again or leave it out")
    try:
        with open(tar, "rb", buffering=0) as file:
            samples, problems = find_samples(lambda at, count: os.pread(file.fileno(), count, at), size)
            sums = [sampled_sum(file.fileno(), [(m.offset, m.size) for m in s.used()]) for s in samples]
    except OSError as error:
        raise ConfigError(f"shard {tar} cannot be read: {error.strerror or error}") from None
    if not samples:
        found = "; ".join(f"{slug}: {names[0]}" for slug, names in problems.items()) or "no members"
        if "bad-header" in problems:
            raise ConfigError(
                f"shard {tar} is not an uncompressed tar, or damaged ({found}); decompress it, because "
                "samples are read in place"
            )
        raise ConfigError(
            f"shard {tar} holds no sample ({found}); KEY.json, with KEY.jpg/png/webp beside it, is expected"
        )
    texts = [s.text for s in samples]
    pictures = [image for s in samples for image in s.images]
    captions = {i: s.caption for i, s in enumerate(samples) if s.caption is not None}
    return ShardIndex(
        keys=np.array([s.key for s in samples]),
        text=_ranges(texts),
        is_json=np.array(["json" in s.members for s in samples]),
        first=np.cumsum([0, *(len(s.images) for s in samples)], dtype=np.int64),
        images=_ranges(pictures),
        captions=_ranges(captions.values()),
        captioned=np.array(list(captions), np.int64),
        defects=np.array([s.defect for s in samples], np.uint8),
        text_lead=_leads(texts),
        image_lead=_leads(pictures),
        caption_lead=_leads(captions.values()),
        content=np.array(sums, np.uint32),
        problems=problems,
    )


def _ranges(members: Iterable[Member]) -> np.ndarray:
    return np.array([(m.offset, m.size) for m in members], np.int64).reshape(-1, 2)


def _leads(members: Iterable[Member]) -> np.ndarray:
    return np.array([(m.offset - m.start) // BLOCK for m in members], np.uint8)


def extension_of(header: bytes, found: Range, key: bytes) -> str | None:
    """The extension that a member's header gives; None if it is not the header of this member.

    Args:
        header: the `found.lead` blocks before the bytes of the member.
        found: the place of the member by the index.
        key: the key of its sample.
    """
    try:
        member = next_member(lambda at, count: header[at : at + count], 0)
    except TarError:
        return None
    if (
        not isinstance(member, Member)
        or member.kind != "file"
        or member[3:] != (found.lead * BLOCK, found.size)
    ):
        return None
    own_key, extension = split_name(member.name)
    is_its = own_key == key or (key.startswith(own_key + b"~") and key[len(own_key) + 1 :].isdigit())
    return extension if is_its else None


def _is_of(tar: Path, index: ShardIndex) -> bool:
    """Whether the first, the middle and the last sample are where the index says.

    Another tar could have the same size and time.
    """
    try:
        with open(tar, "rb", buffering=0) as file:
            for i in {0, len(index) // 2, len(index) - 1}:
                found = index.text_range(i)
                header = os.pread(file.fileno(), found.lead * BLOCK, found.offset - found.lead * BLOCK)
                if extension_of(header, found, bytes(index.keys[i])) != (
                    "json" if index.is_json[i] else "txt"
                ):
                    return False
    except OSError:
        return False
    return True


def _read(path: Path, stamp: np.ndarray, is_known: bool) -> ShardIndex | None:
    """The index in a file; None if it is missing, stale or damaged, or cannot belong to such a tar."""
    size = int(stamp[1])
    try:
        # each sample takes at least a header in the tar, and its key and the ranges of its members here
        saved, mapped = map_arrays(path, 4 * size + _SLACK)
        if not np.array_equal(saved["stamp"], stamp):
            return None
        if not is_known and saved["digest"].tobytes() != _digest(saved):
            return None
        index = ShardIndex(
            saved["keys"].reshape(-1).view(f"S{saved['keys'].shape[1]}"),
            **{name: saved[name] for name in _ARRAYS[1:]},
            is_stored=True,
            problems={} if is_known else json.loads(saved["problems"].tobytes()),
        )
        if not is_known:
            is_whole = _holds_together(index, size)
            mapped.madvise(mmap.MADV_DONTNEED)  # of the pages read for this, few are needed again
            return index if is_whole else None
        return index
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _holds_together(index: ShardIndex, size: int) -> bool:
    """Whether shapes, types and order are right, and all members lie within the `size` bytes of the tar."""
    n, m, c = len(index.keys), len(index.images), len(index.captioned)
    shapes = dict(
        text=(n, 2),
        is_json=(n,),
        first=(n + 1,),
        images=(m, 2),
        captions=(c, 2),
        captioned=(c,),
        defects=(n,),
        text_lead=(n,),
        image_lead=(m,),
        caption_lead=(c,),
        content=(n,),
    )
    dtypes = {
        "is_json": np.bool_,
        "defects": np.uint8,
        "text_lead": np.uint8,
        "image_lead": np.uint8,
        "caption_lead": np.uint8,
        "content": np.uint32,
    }
    if n == 0 or index.keys.itemsize > MAX_KEY + 24 or not are_problems(index.problems):
        return False
    if any(
        getattr(index, name).shape != shape or getattr(index, name).dtype != dtypes.get(name, np.int64)
        for name, shape in shapes.items()
    ):
        return False
    in_order = (
        index.first[0] == 0
        and index.first[-1] == m
        and (np.diff(index.first) >= 0).all()
        and (np.diff(index.captioned) > 0).all()
        and (index.captioned >= 0).all()
        and (index.captioned < n).all()
    )
    return bool(
        in_order
        and (index.defects < len(DEFECTS)).all()
        and all(
            _lie_within(ranges, lead, size)
            for ranges, lead in (
                (index.text, index.text_lead),
                (index.images, index.image_lead),
                (index.captions, index.caption_lead),
            )
        )
    )


def _lie_within(ranges: np.ndarray, lead: np.ndarray, size: int) -> bool:
    offset, length = ranges[:, 0], ranges[:, 1]
    return bool(
        (
            (lead > 0)
            & (offset % BLOCK == 0)
            & (offset >= lead.astype(np.int64) * BLOCK)
            & (offset <= size)
            & (length >= 0)
            & (length <= size - offset)
        ).all()
    )


def are_problems(problems: object) -> bool:
    """Whether an object read from a file maps slugs to lists of names."""
    return isinstance(problems, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in problems.values()
    )


def _digest(saved: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for name in ("stamp", *_ARRAYS, "problems"):
        digest.update(f"{name} {saved[name].dtype} {saved[name].shape}\n".encode())
        digest.update(saved[name].tobytes())
    return digest.digest()


def _write(path: Path, stamp: np.ndarray, index: ShardIndex) -> bool:
    """Write the file of an index atomically, because several ranks can write it at once.

    A read-only directory is not an error. Returns whether the file was written.
    """
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in _ARRAYS}
    arrays["keys"] = arrays["keys"].view(np.uint8).reshape(len(index), -1)
    arrays |= {"stamp": stamp, "problems": np.frombuffer(json.dumps(index.problems).encode(), dtype=np.uint8)}
    arrays["digest"] = np.frombuffer(_digest(arrays), dtype=np.uint8)
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(safetensors.numpy.save(arrays))
        os.replace(temporary, path)
        return True
    except OSError as error:
        logger.info("index %s cannot be written (%s)", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
