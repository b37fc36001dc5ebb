"""Where each sample of a tar lies: built by one pass over the headers, kept beside the tar, read without the
tar.

The index makes a shard addressable (any sample by pread, in any order), which is what a resumable global
order rests on. It is a cache in a hidden file of a name of its own, so that webdataset, energon and ``*.tar``
never meet it. It is rebuilt when it is missing or damaged, when the tar's size or time has changed, or when
it says of the tar what is not so. What it says of a single member is held against the member's own header
when that member is read (`shards.ShardDataset`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.fingerprint import sampled_sum
from megatron_evomoe.data.shard_members import DEFECTS, MAX_KEY, find_samples, split_name
from megatron_evomoe.data.tar import BLOCK, Member, TarError, next_member

logger = logging.getLogger(__name__)

_VERSION = 3
_SLACK = 1 << 20


class Range(NamedTuple):
    """Where a member lies: `size` bytes at `offset`, behind `lead` blocks of headers."""

    offset: int
    size: int
    lead: int


@dataclass
class ShardIndex:
    """n samples with m images, c of them with both KEY.json and KEY.txt. Byte ranges are (offset, size) in
    the tar.

    Sample i has images first[i] … first[i + 1] - 1.
    """

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
    captions: np.ndarray
    """int64 [c, 2]: the KEY.txt member of a sample that has a KEY.json too."""
    captioned: np.ndarray
    """int64 [c]: those samples, in order."""
    defects: np.ndarray
    """uint8 [n]: position in `shard_members.DEFECTS` of what makes a sample unusable."""
    text_lead: np.ndarray
    """uint8 [n]: blocks of headers before the text."""
    image_lead: np.ndarray
    """uint8 [m]."""
    caption_lead: np.ndarray
    """uint8 [c]."""
    content: np.ndarray
    """uint32 [n]: a checksum of what `fingerprint.sampled_sum` reads of each sample."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """What was left out or is odd: slug -> the members or keys."""

    def __len__(self) -> int:
        return len(self.keys)

    def text_range(self, i: int) -> Range:
        """The KEY.json or KEY.txt of sample i."""
        return Range(*map(int, self.text[i]), int(self.text_lead[i]))

    def image_range(self, image: int) -> Range:
        """An image by its number in the shard."""
        return Range(*map(int, self.images[image]), int(self.image_lead[image]))

    def caption_range(self, i: int) -> Range | None:
        """The KEY.txt beside the KEY.json of sample i."""
        at = int(np.searchsorted(self.captioned, i))
        if at == len(self.captioned) or self.captioned[at] != i:
            return None
        return Range(*map(int, self.captions[at]), int(self.caption_lead[at]))


_ARRAYS = tuple(f.name for f in fields(ShardIndex) if f.name != "problems")


def index_path(tar: Path) -> Path:
    """Where the index of `tar` is kept."""
    return tar.with_name(f".{tar.name}.evomoe-index")


def load_index(tar: Path) -> ShardIndex:
    """The index of `tar`, from beside it if that is current and true, else built (and written, where the
    folder lets us).

    Raises:
        ConfigError: the tar is missing, empty, compressed or no tar.
    """
    try:
        status = tar.stat()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"shard {tar} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"shard {tar} is no file; give the path of a tar, or of a folder that holds some")
    stamp = np.array([_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)
    path = index_path(tar)
    index = _read(path, stamp)
    if index is None or not _is_of(tar, index):
        index = build_index(tar)
        _write(path, stamp, index)
    return index


def build_index(tar: Path) -> ShardIndex:
    """Read all headers of `tar`. Samples cut off by a truncated end are left out and reported, and so is what
    is not data.
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
                f"shard {tar} is no uncompressed tar, or damaged ({found}); unpack it, samples are read in "
                "place"
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
    """The extension of a member by its `header`, the `found.lead` blocks before its bytes.

    None where that is no header of a file of this size and sample.
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
    """Whether the first, the middle and the last sample are where the index says. Another tar may have the
    same size and time.
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


def _read(path: Path, stamp: np.ndarray) -> ShardIndex | None:
    """None when there is none, or it is stale, damaged or cannot be of such a tar."""
    size = int(stamp[1])
    try:
        status = path.stat()
        # each sample takes a header of the tar at least, and its key and its members' ranges here
        if not stat.S_ISREG(status.st_mode) or status.st_size > 4 * size + _SLACK:
            return None
        saved = safetensors.numpy.load(path.read_bytes())
        if not np.array_equal(saved["stamp"], stamp) or saved["digest"].tobytes() != _digest(saved):
            return None
        index = ShardIndex(
            saved["keys"].reshape(-1).view(f"S{saved['keys'].shape[1]}"),
            *(saved[name] for name in _ARRAYS[1:]),
            problems=json.loads(saved["problems"].tobytes()),
        )
        return index if _holds_together(index, size) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
        return None


def _holds_together(index: ShardIndex, size: int) -> bool:
    """Shapes, types and order, and that all members lie within the tar's `size` bytes."""
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
    if n == 0 or index.keys.itemsize > MAX_KEY + 24 or not _are_problems(index.problems):
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


def _are_problems(problems: object) -> bool:
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


def _write(path: Path, stamp: np.ndarray, index: ShardIndex) -> None:
    """Write beside and rename, so that ranks doing the same at once cannot harm each other. A read-only
    folder is fine.
    """
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in _ARRAYS}
    arrays["keys"] = arrays["keys"].view(np.uint8).reshape(len(index), -1)
    arrays |= {"stamp": stamp, "problems": np.frombuffer(json.dumps(index.problems).encode(), dtype=np.uint8)}
    arrays["digest"] = np.frombuffer(_digest(arrays), dtype=np.uint8)
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(safetensors.numpy.save(arrays))
        os.replace(temporary, path)
    except OSError as error:
        logger.info("index %s cannot be written (%s); it is rebuilt in memory at every start", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
