"""webdataset shards: finding the files, reading any of their samples, and writing them.

A shard is an uncompressed tar that contains, for each sample, KEY.jpg (or png, webp; KEY.0.jpg, KEY.1.jpg …
for several images) and KEY.json, the LLaVA record. webdataset and energon read the same files. This module
does not unpickle anything, run a command or follow a URL.
"""

from __future__ import annotations

import collections
import glob
import io
import itertools
import json
import logging
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.files import write_atomically
from megatron_evomoe.data.fingerprint import shard_digest
from megatron_evomoe.data.sample_record import (
    MAX_RECORD_BYTES,
    caption_record,
    has_turns,
    load_json,
    load_text,
    usable_record,
)
from megatron_evomoe.data.shard_index import (
    Range,
    ShardIndex,
    extension_of,
    index_path,
    load_index,
    renewed_index,
    stored_index,
    tar_stamp,
)
from megatron_evomoe.data.shard_members import DEFECTS, image_order, is_image
from megatron_evomoe.data.shard_set import ShardSet, open_set
from megatron_evomoe.data.tar import BLOCK

logger = logging.getLogger(__name__)

_MAX_SHARDS = 1_000_000
_OPEN_FILES = 64
_MAX_IMAGE_BYTES = 1 << 28  # more than the uncompressed pixels of the default max_image_pixels
_MAGIC = {b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp"}


@dataclass
class RawSample:
    """A sample as it is stored; only its JSON is decoded."""

    key: str
    shard: str
    record: dict[str, Any]
    """The LLaVA record: `conversations`, and other fields that were stored with it."""
    images: list[bytes] = field(default_factory=list)
    """The encoded images, in order."""


def expand_paths(paths: Sequence[str] | str) -> list[Path]:
    """The existing files that are meant by paths with brace ranges, glob patterns and directories.

    The files of a pattern, and the ``*.tar`` files of a directory, are sorted.

    Raises:
        ConfigError: there is no path, a path matches no file, or it is a pipe or a URL.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not paths:
        raise ConfigError(
            "no shards given; set data.train_data to paths, brace ranges, glob patterns or "
            "directories of tars"
        )
    found: list[Path] = []
    for pattern in map(str, paths):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", pattern):
            raise ConfigError(
                f"shard path {pattern!r} is a pipe or URL; only local files are read, so copy or mount it "
                "first"
            )
        found += [path for one in _braces(pattern) for path in _expand_one(one)]
    return found


def _braces(pattern: str) -> list[str]:
    # counted before expanding, because braceexpand builds whole lists and a mistyped range could fill the
    # memory
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    if math.prod(abs(int(b) - int(a)) + 1 for a, b in ranges) > _MAX_SHARDS:
        raise ConfigError(f"shard path {pattern!r} names more than {_MAX_SHARDS} files")
    try:
        return list(braceexpand.braceexpand(os.path.expanduser(pattern)))
    except braceexpand.UnbalancedBracesError as error:  # type: ignore[attr-defined]
        raise ConfigError(f"shard path {pattern!r}: {error}") from None


def _expand_one(path: str) -> list[Path]:
    if os.path.isdir(path):
        found = sorted(Path(path).glob("*.tar"))
        missing = f"directory {path} holds no .tar file"
    elif os.path.exists(path):
        found, missing = [Path(path)], ""
    else:
        found = sorted(map(Path, glob.glob(path, recursive=True)))
        missing = f"shard {path} does not exist"
    if not found:
        raise ConfigError(
            f"{missing}; check data.train_data and data.eval_data (working directory {os.getcwd()})"
        )
    return found


class ShardDataset:
    """All samples of some shards, by number.

    A table with one row per shard is mapped (`shard_set`). The index of a shard is mapped when one of its
    samples is read, and checked when that happens first in a process. At most 64 indexes and 64 shards are
    open in each process; a forked copy opens its own.

    Attributes:
        paths: the files of the shards.
        problems: what is odd inside them: slug to number of members or keys.
    """

    def __init__(
        self,
        paths: Sequence[str | Path] | str,
        *,
        cache: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Open the table of the shards, or make it and the index of each shard, and log what is odd inside.

        Processes that open the same shards at the same time share the work.

        Args:
            cache: the directory for the table and the indexes of shards in read-only directories. Without it
                these are made in memory at each start.
            progress: called with the finished and the total number of shards while indexes are made.

        Raises:
            ConfigError: a shard is missing, empty or unreadable.
        """
        found, kept = open_set(expand_paths(paths), cache, progress)  # type: ignore[arg-type]
        found.log_problems()
        self._use(found, kept, cache)

    @classmethod
    def of(cls, found: ShardSet, cache: Path | None = None) -> ShardDataset:
        """The samples of a set that another process has opened or made."""
        dataset = cls.__new__(cls)
        dataset._use(found, {}, cache)
        return dataset

    def _use(self, found: ShardSet, kept: dict[int, ShardIndex], cache: Path | None) -> None:
        self._set, self._kept, self._cache = found, kept, cache
        self.paths = found.paths
        self._starts = found.starts
        self._checked = bytearray(len(found))
        self._changed: dict[int, tuple[str, str]] = {}
        self._mapped: collections.OrderedDict[int, ShardIndex] = collections.OrderedDict()
        self._files: collections.OrderedDict[int, int] = collections.OrderedDict()
        self.problems: dict[str, int] = {}
        for problems in found.problems.values():
            for slug, names in problems.items():
                self.problems[slug] = self.problems.get(slug, 0) + len(names)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, i: int) -> str:
        """The key of sample i in its shard."""
        shard, local = self._locate(i)
        return bytes(self._index(shard).keys[local]).decode(errors="replace")

    def shard(self, i: int) -> Path:
        """The shard of sample i."""
        return self.paths[self._locate(i)[0]]

    def read(self, i: int) -> RawSample:
        """Sample i, read with one pread for each of its members.

        Raises:
            SampleError: what `sample_record.usable_record` raises, bad-json, bad-text, record-too-large,
                image-too-large, a slug of `shard_members.DEFECTS`, read-error (the file is shorter than it
                was, or cannot be read), stale-index (the index names another member).
        """
        return RawSample(self.key(i), str(self.shard(i)), self.record(i), self.images(i))

    def record(self, i: int) -> dict[str, Any]:
        """The LLaVA record of sample i. Raises as `read` does."""
        shard, local = self._locate(i)
        index = self._index(shard)
        if index.defects[local]:
            raise SampleError(
                DEFECTS[index.defects[local]],
                "one of its members cannot be shown to the model; the log names that member",
            )
        num_images, found = len(self.images_of(i)[1]), index.text_range(local)
        if not index.is_json[local]:
            return caption_record(load_text(self._text(shard, local, found, "txt")), num_images)
        record, beside = load_json(self._text(shard, local, found, "json")), index.caption_range(local)
        caption = (
            None
            if beside is None or has_turns(record)
            else load_text(self._text(shard, local, beside, "txt"))
        )
        return usable_record(record, num_images, caption)

    def images(self, i: int) -> list[bytes]:
        """The encoded images of sample i. Raises `SampleError` read-error, stale-index."""
        shard, images = self.images_of(i)
        found = [self._image(shard, image) for image in images]
        extensions = [extension for extension, _ in found]
        if extensions != sorted(extensions, key=image_order):
            raise self._stale(shard, self._index(shard).image_range(images[0]))
        return [data for _, data in found]

    def images_of(self, i: int) -> tuple[int, range]:
        """The number of the shard of sample i, and the numbers of its images in that shard."""
        shard, local = self._locate(i)
        first, end = self._index(shard).first[local : local + 2]
        return shard, range(int(first), int(end))

    def image(self, shard: int, image: int) -> bytes:
        """One encoded image of a shard. Raises `SampleError` read-error, stale-index."""
        return self._image(shard, image)[1]

    def _image(self, shard: int, image: int) -> tuple[str, bytes]:
        """The extension and the bytes of an image."""
        index = self._index(shard)
        owner, found = int(np.searchsorted(index.first, image, side="right")) - 1, index.image_range(image)
        if found.size > _MAX_IMAGE_BYTES:
            raise SampleError("image-too-large", f"{found.size} bytes; at most {_MAX_IMAGE_BYTES} are read")
        extension, data = self._member(shard, owner, found)
        if not is_image(extension):
            raise self._stale(shard, found)
        return extension, data

    def num_images(self, shard: int) -> int:
        """The number of images in a shard."""
        return int(self._set.images[shard])

    def contents(self) -> list[tuple[str, int, str]]:
        """File name, number of samples and digest (`fingerprint.shard_digest`) of each shard, in order."""
        samples = self._set.samples.tolist()
        return [(path.name, samples[i], self._set.digest(i)) for i, path in enumerate(self.paths)]

    def close(self) -> None:
        """Close the files that this process has open; reading opens them again."""
        self._mapped.clear()
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": collections.OrderedDict(), "_mapped": collections.OrderedDict()}

    def _index(self, shard: int) -> ShardIndex:
        """The index of a shard, mapped from its file, or made again if that is missing or damaged.

        Raises:
            SampleError: stale-index: the shard holds other samples than when its row was made.
        """
        if shard in self._kept:
            return self._kept[shard]
        if shard in self._mapped:
            self._mapped.move_to_end(shard)
            return self._mapped[shard]
        if shard in self._changed:
            raise SampleError(*self._changed[shard])
        path, stamp = self.paths[shard], tuple(self._set.stamps[shard, :2].tolist())
        index = stored_index(path, stamp, self._cache, is_known=bool(self._checked[shard]))
        if index is None or not self._is_row_of(shard, index):
            try:
                index = self._made_again(shard, path, stamp)
            except SampleError as error:
                self._changed[shard] = error.reason, error.message
                raise
        self._checked[shard] = 1
        if index.is_stored:
            if len(self._mapped) >= _OPEN_FILES:
                self._mapped.popitem(last=False)
            self._mapped[shard] = index
        else:
            self._kept[shard] = index
        return index

    def _made_again(self, shard: int, path: Path, stamp: tuple[int, int]) -> ShardIndex:
        """The index of a shard whose file is missing, damaged or of another tar."""
        try:
            if tar_stamp(path)[:2] != stamp:  # the tar was changed; its headers tell which samples are there
                index = stored_index(path, stamp, self._cache, compare=False)
            else:
                index = renewed_index(path, self._cache)
                index = index if shard_digest(index) == self._set.digest(shard) else None
        except ConfigError as error:
            raise SampleError("read-error", str(error)) from None
        if index is None or not self._is_row_of(shard, index):
            raise SampleError(
                "stale-index",
                f"{path} was changed after its samples were counted; start again, and if this comes again, "
                f"delete {self._set.path} and {index_path(path)}",
            )
        return index

    def _is_row_of(self, shard: int, index: ShardIndex) -> bool:
        """Whether an index has as many samples and images as the table says."""
        return (len(index), len(index.images)) == (self._set.samples[shard], self._set.images[shard])

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return shard, i - int(self._starts[shard])

    def _text(self, shard: int, local: int, found: Range, kind: str) -> bytes:
        if found.size > MAX_RECORD_BYTES:
            raise SampleError(
                "record-too-large", f"KEY.{kind} has {found.size} bytes; at most {MAX_RECORD_BYTES} are read"
            )
        extension, data = self._member(shard, local, found)
        if extension != kind:
            raise self._stale(shard, found)
        return data

    def _member(self, shard: int, local: int, found: Range) -> tuple[str, bytes]:
        """The extension and the bytes of a member of sample `local` of a shard.

        Its header is read along with the bytes and must be that of the member that the index names.
        """
        path, lead = self.paths[shard], found.lead * BLOCK
        try:
            data = os.pread(self._open(shard), lead + found.size, found.offset - lead)
        except OSError as error:
            raise SampleError("read-error", f"{path}: {error.strerror or error}") from None
        if len(data) != lead + found.size:
            raise SampleError(
                "read-error", f"{path} ends within the sample; it was cut after its index was built"
            )
        extension = extension_of(data[:lead], found, bytes(self._index(shard).keys[local]))
        if extension is None:
            raise self._stale(shard, found)
        return extension, data[lead:]

    def _stale(self, shard: int, found: Range) -> SampleError:
        path = self.paths[shard]
        return SampleError(
            "stale-index",
            f"{path} was changed and its index was not: another member is at byte {found.offset}; "
            f"delete {index_path(path)}",
        )

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]


def image_extension(data: bytes) -> str:
    """The file extension for the content of an image, because files can have a wrong one."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "jpg")


def tar_bytes(samples: Iterable[tuple[str, Mapping[str, Any], Sequence[bytes]]]) -> bytes:
    """The bytes of a shard of (key, record, images); the same samples give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key, record, images in samples:
            names = [f"{i}." if len(images) > 1 else "" for i in range(len(images))]
            members = [
                (f"{key}.{name}{image_extension(image)}", image)
                for name, image in zip(names, images, strict=True)
            ]
            members.append(
                (f"{key}.json", json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode())
            )
            for name, data in members:
                info = tarfile.TarInfo(name)  # owner, mode and time stay the constants of a new TarInfo
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_shards(
    samples: Iterable[tuple[Mapping[str, Any], Sequence[bytes]]],
    out_dir: str | Path,
    samples_per_shard: int = 1000,
) -> list[Path]:
    """Write (record, encoded images) pairs as ``shard-000000.tar`` … with their indexes.

    The key of a sample is its position.

    Raises:
        ConfigError: `out_dir` already contains tars, or there are no samples.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise ConfigError(f"{folder} already holds shards; remove them or choose another directory")
    written: list[Path] = []
    stream = enumerate(samples)
    while chunk := list(itertools.islice(stream, samples_per_shard)):
        path = folder / f"shard-{len(written):06d}.tar"
        write_atomically(path, tar_bytes((f"{i:09d}", record, images) for i, (record, images) in chunk))
        load_index(path)
        written.append(path)
    if not written:
        raise ConfigError(f"no samples to write to {folder}")
    return written
