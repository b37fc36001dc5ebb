"""webdataset shards: which files are meant, writing them, and reading any sample of them.

A shard is an uncompressed tar of KEY.jpg (png, webp; KEY.0.jpg, KEY.1.jpg … for several) and KEY.json, the
LLaVA record. webdataset and energon read the same files. Nothing here unpickles, runs a command or follows a
URL.
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.fingerprint import shard_digest
from megatron_evomoe.data.record import (
    MAX_RECORD_BYTES,
    caption_record,
    has_turns,
    load_json,
    load_text,
    usable_record,
)
from megatron_evomoe.data.shard_index import Range, extension_of, index_path, load_index
from megatron_evomoe.data.shard_members import DEFECTS, image_order, is_image
from megatron_evomoe.data.tar import BLOCK

logger = logging.getLogger(__name__)

_MAX_SHARDS = 1_000_000
_OPEN_FILES = 64
_MAX_IMAGE_BYTES = 1 << 28  # more than an uncompressed picture of max_image_pixels takes
_MAGIC = {b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp"}


@dataclass
class RawSample:
    """A sample as stored: nothing decoded but the JSON."""

    key: str
    shard: str
    record: dict[str, Any]
    """The LLaVA record: `conversations`, and whatever else was stored with it."""
    images: list[bytes] = field(default_factory=list)


def expand_paths(paths: Sequence[str] | str) -> list[Path]:
    """Brace ranges, globs and folders (their ``*.tar``) to existing files, in the order given, sorted within
    each.

    Raises:
        ConfigError: nothing given, nothing found, a file that is not there, or a pipe or URL.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not paths:
        raise ConfigError(
            "no shards given; set data.train_data to paths, brace ranges, globs or folders of tars"
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
    # counted before expanding: braceexpand builds whole lists, and a slip in a range would take all memory
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    if math.prod(abs(int(b) - int(a)) + 1 for a, b in ranges) > _MAX_SHARDS:
        raise ConfigError(f"shard path {pattern!r} names more than {_MAX_SHARDS} files")
    try:
        return list(braceexpand.braceexpand(os.path.expanduser(pattern)))
    except braceexpand.UnbalancedBracesError as error:
        raise ConfigError(f"shard path {pattern!r}: {error}") from None


def _expand_one(path: str) -> list[Path]:
    if os.path.isdir(path):
        found = sorted(Path(path).glob("*.tar"))
        missing = f"folder {path} holds no .tar file"
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
    """All samples of some shards, by number. Cheap to fork: a few arrays, files opened when read (at most 64
    per process).
    """

    def __init__(self, paths: Sequence[str | Path] | str) -> None:
        """Raises `ConfigError` for a missing, empty or unreadable shard; what is odd inside one is in
        `problems`, and logged.
        """
        self.paths = expand_paths(paths)  # type: ignore[arg-type]
        indexes = [load_index(path) for path in self.paths]
        self._indexes = indexes
        self._starts = np.cumsum([0, *(len(index) for index in indexes)])
        self._files: collections.OrderedDict[int, int] = collections.OrderedDict()
        self.problems: dict[str, int] = {}
        for path, index in zip(self.paths, indexes, strict=True):
            for slug, names in index.problems.items():
                self.problems[slug] = self.problems.get(slug, 0) + len(names)
                logger.warning("shard %s: %s: %d (%s)", path, slug, len(names), ", ".join(names[:3]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, i: int) -> str:
        """Key of sample i within its shard."""
        shard, local = self._locate(i)
        return bytes(self._indexes[shard].keys[local]).decode(errors="replace")

    def shard(self, i: int) -> Path:
        """The tar that holds sample i."""
        return self.paths[self._locate(i)[0]]

    def read(self, i: int) -> RawSample:
        """Sample i in one pread per member.

        Raises:
            SampleError: what `record.usable_record` raises, bad-json, bad-text, record-too-large,
                image-too-large, a slug of `shard_members.DEFECTS`, read-error (the file changed or cannot be
                read), stale-index (another member is there).
        """
        return RawSample(self.key(i), str(self.shard(i)), self.record(i), self.images(i))

    def record(self, i: int) -> dict[str, Any]:
        """The LLaVA record of sample i. Raises as `read` does."""
        shard, local = self._locate(i)
        index = self._indexes[shard]
        if index.defects[local]:
            raise SampleError(
                DEFECTS[index.defects[local]],
                "one of its members cannot be shown to the model; the log names it",
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
            raise self._stale(shard, self._indexes[shard].image_range(images[0]))
        return [data for _, data in found]

    def images_of(self, i: int) -> tuple[int, range]:
        """The shard of sample i, and its images' numbers there."""
        shard, local = self._locate(i)
        first, end = self._indexes[shard].first[local : local + 2]
        return shard, range(int(first), int(end))

    def image(self, shard: int, image: int) -> bytes:
        """One encoded image of a shard, by number. Raises `SampleError` read-error, stale-index."""
        return self._image(shard, image)[1]

    def _image(self, shard: int, image: int) -> tuple[str, bytes]:
        """Extension and bytes."""
        index = self._indexes[shard]
        owner, found = int(np.searchsorted(index.first, image, side="right")) - 1, index.image_range(image)
        if found.size > _MAX_IMAGE_BYTES:
            raise SampleError("image-too-large", f"{found.size} bytes; at most {_MAX_IMAGE_BYTES} are read")
        extension, data = self._member(shard, owner, found)
        if not is_image(extension):
            raise self._stale(shard, found)
        return extension, data

    def num_images(self, shard: int) -> int:
        """How many images a shard has."""
        return len(self._indexes[shard].images)

    def contents(self) -> list[tuple[str, int, str]]:
        """Each shard's file name, number of samples and digest (`fingerprint.shard_digest`), in order."""
        return [
            (path.name, len(index), shard_digest(index))
            for path, index in zip(self.paths, self._indexes, strict=True)
        ]

    def close(self) -> None:
        """Close this process's files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": collections.OrderedDict()}

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
        """Extension and bytes of a member of sample `local` of a shard; its header, read along with them,
        must be that member's.
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
        extension = extension_of(data[:lead], found, bytes(self._indexes[shard].keys[local]))
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
    """File extension by content, so that a PNG named .jpg is stored as what it is."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "jpg")


def tar_bytes(samples: Iterable[tuple[str, Mapping[str, Any], Sequence[bytes]]]) -> bytes:
    """A shard of (key, record, images) in memory; the same samples give the same bytes."""
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
                info = tarfile.TarInfo(name)  # owner, mode and time are the constants TarInfo starts with
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_atomically(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write, sync, rename: `path` is absent, old or whole, also after a kill; with `sync` after a power cut
    too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shards(
    samples: Iterable[tuple[Mapping[str, Any], Sequence[bytes]]],
    out_dir: str | Path,
    samples_per_shard: int = 1000,
) -> list[Path]:
    """Write (record, encoded images) pairs as ``shard-000000.tar`` …, with indexes; keys are minted from the
    position.

    Raises:
        ConfigError: `out_dir` already holds tars (a shorter run would leave old ones among the new), or there
            are no samples.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise ConfigError(f"{folder} already holds shards; remove them or choose another folder")
    written, stream = [], enumerate(samples)
    while chunk := list(itertools.islice(stream, samples_per_shard)):
        path = folder / f"shard-{len(written):06d}.tar"
        write_atomically(path, tar_bytes((f"{i:09d}", record, images) for i, (record, images) in chunk))
        load_index(path)
        written.append(path)
    if not written:
        raise ConfigError(f"no samples to write to {folder}")
    return written
