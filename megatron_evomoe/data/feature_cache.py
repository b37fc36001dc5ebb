"""Files of the features that a frozen vision tower computed, which training reads in place of images.

The images of a shard are numbered in stored order and divided into parts of `PART_IMAGES`. A part is one
safetensors file with `features` [n, t, C] in the dtype of the model. The name of its directory identifies the
tower, everything else that a feature depends on, and the shard, so stale features are never read.
`train/vision_cache.py` writes the files.

Shapes: n images, t positions of each, C the width of the tower.
"""

from __future__ import annotations

import collections
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from megatron_evomoe.config import RunConfig
from megatron_evomoe.data.errors import DataError, SampleError
from megatron_evomoe.data.files import write_atomically
from megatron_evomoe.data.shards import ShardDataset

PART_IMAGES = 256
_VERSION = 2  # changes when the same file gives other pixels than before; since 2, transparency is white
_OPEN_FILES = 64


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images [first, first + count) of one shard of the data set, and the file of their features."""

    shard: int
    first: int
    count: int
    path: str


def image_form(config: RunConfig) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of one image in a training batch.

    An image is uint8 pixels [3, S, S], or with `cache_vision_features` features [t, C] in the dtype of the
    model.
    """
    vision = config.vision
    if config.data.cache_vision_features:
        return (
            vision.tokens_per_image,
            vision.hidden_size,
        ), torch.bfloat16 if config.train.bf16 else torch.float32
    return (3, vision.image_size, vision.image_size), torch.uint8


class FeatureCache:
    """The features of the images of a data set by one tower.

    Files are mapped when they are read, at most 64 in each process; a copy in another process maps its own.
    """

    def __init__(self, dataset: ShardDataset, config: RunConfig, folder: Path, tower: str) -> None:
        """See the class.

        Args:
            folder: the directory of all features; all nodes must share it.
            tower: identifies the weights of the tower (`train.vision_cache.weights_digest`).
        """
        self.dataset = dataset
        self.shape, self.dtype = image_form(config)
        self.folder = folder / _identity(config, tower)
        self._shard_folders = [self.folder / f"{path.stem}-{_stamp(path)}" for path in dataset.paths]
        self._open: collections.OrderedDict[Path, tuple[safe_open, dict[str, list[str]]]] = (
            collections.OrderedDict()
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": collections.OrderedDict()}

    @property
    def bytes_per_image(self) -> int:
        """Bytes of the features of one image."""
        return math.prod(self.shape) * self.dtype.itemsize

    def parts(self) -> Iterator[Part]:
        """All parts, in the order of the data set."""
        for shard, folder in enumerate(self._shard_folders):
            total = self.dataset.num_images(shard)
            for first in range(0, total, PART_IMAGES):
                yield Part(
                    shard=shard,
                    first=first,
                    count=min(PART_IMAGES, total - first),
                    path=str(self._path(folder, first)),
                )

    def has(self, part: Part) -> bool:
        """Whether the file of a part exists, is complete and has the expected shape."""
        if not os.path.exists(part.path):
            return False
        try:
            # refuses a file that is shorter than its header says
            with safe_open(part.path, framework="pt") as file:
                return tuple(file.get_slice("features").get_shape()) == (part.count, *self.shape)
        except SafetensorError:
            return False

    def write(self, part: Part, features: torch.Tensor, problems: dict[int, SampleError]) -> None:
        """Write the file of a part atomically.

        Args:
            features: [count, t, C]; the rows of unusable images may hold any numbers.
            problems: the row of each unusable image, and why it is unusable.
        """
        path = Path(part.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        reasons = {str(row): [problem.reason, problem.message] for row, problem in problems.items()}
        tensors = {"features": features.to("cpu", self.dtype).contiguous()}
        write_atomically(path, safetensors.torch.save(tensors, {"problems": json.dumps(reasons)}))

    def read(self, i: int, count: int) -> list[torch.Tensor]:
        """Features [t, C] of the first `count` images of sample i.

        Raises:
            SampleError: one of the images is unusable; the error is that of decoding it.
            DataError: the file of a part is missing or damaged.
        """
        shard, images = self.dataset.images_of(i)
        return [self._read_one(shard, image) for image in images[:count]]

    def _read_one(self, shard: int, image: int) -> torch.Tensor:
        row = image % PART_IMAGES
        path = self._path(self._shard_folders[shard], image - row)
        try:
            file, problems = self._mapped(path)
            if str(row) in problems:
                raise SampleError(*problems[str(row)])
            return file.get_slice("features")[row]
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"vision features {path} cannot be read ({error}); all nodes must share the directory. "
                "If the file is damaged, delete it: it is computed again when training starts"
            ) from None

    def _mapped(self, path: Path) -> tuple[safe_open, dict[str, list[str]]]:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            file = safe_open(path, framework="pt")
            self._open[path] = file, json.loads(file.metadata()["problems"])
        return self._open[path]

    @staticmethod
    def _path(folder: Path, first: int) -> Path:
        return folder / f"{first // PART_IMAGES:05d}.safetensors"


def _identity(config: RunConfig, tower: str) -> str:
    """16 hexadecimal digits that identify everything that a feature depends on, except the image itself."""
    _, dtype = image_form(config)
    what = {
        "version": _VERSION,
        "tower": tower,
        "vision": asdict(config.vision),
        "dtype": str(dtype),
        "part": PART_IMAGES,
        "image_aspect_ratio": config.data.image_aspect_ratio,
        "max_image_pixels": config.data.max_image_pixels,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _stamp(shard: Path) -> str:
    """12 hexadecimal digits that identify a shard file by its name, size and time, as its index does."""
    stat = shard.stat()
    return hashlib.sha256(f"{shard.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
