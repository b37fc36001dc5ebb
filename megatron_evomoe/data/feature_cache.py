"""A frozen tower's features as files, in place of pixels: where they lie, and reading them.

Each shard's images are numbered in stored order and cut into parts of `PART_IMAGES`; a part is one
safetensors file with `features` [n, t, C] in the model's dtype. Parts lie in a folder named after the tower
and whatever else a feature depends on, below that in one named after the shard, so nothing stale is ever
found. `train/vision_cache.py` writes them.
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
from megatron_evomoe.data.shards import ShardDataset, write_atomically

PART_IMAGES = 256
_VERSION = 2  # changes whenever a file gives other pixels than before; 2: transparency is white
_OPEN_FILES = 64


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images [first, first + count) of a shard of the data set, and the file that holds their features."""

    shard: int
    first: int
    count: int
    path: str


def image_form(config: RunConfig) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of one image in a training batch: pixels [3, S, S] in uint8, or features [t, C] in the
    model's.
    """
    vision = config.vision
    if config.data.cache_vision_features:
        return (
            vision.tokens_per_image,
            vision.hidden_size,
        ), torch.bfloat16 if config.train.bf16 else torch.float32
    return (3, vision.image_size, vision.image_size), torch.uint8


class FeatureCache:
    """The features of a data set's images by one tower. Cheap to fork; files are mapped when read (at most 64
    a process).
    """

    def __init__(self, dataset: ShardDataset, config: RunConfig, folder: Path, tower: str) -> None:
        """tower: identifies its weights (`train.vision_cache.weights_digest`); `folder` must be shared by all
        nodes.
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
        """What an image takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def parts(self) -> Iterator[Part]:
        """All parts, in the data set's order."""
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
        """Whether a part's file is there, whole and of the expected shape."""
        if not os.path.exists(part.path):
            return False
        try:
            with safe_open(
                part.path, framework="pt"
            ) as file:  # refuses a file that is shorter than its header says
                return tuple(file.get_slice("features").get_shape()) == (part.count, *self.shape)
        except SafetensorError:
            return False

    def write(self, part: Part, features: torch.Tensor, problems: dict[int, SampleError]) -> None:
        """Write a part in one step: its file is absent, old or whole, also after a kill.

        Args:
            features: [count, t, C]; rows of unusable images hold anything.
            problems: row -> why its image is unusable.
        """
        path = Path(part.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        reasons = {str(row): [problem.reason, problem.message] for row, problem in problems.items()}
        tensors = {"features": features.to("cpu", self.dtype).contiguous()}
        write_atomically(path, safetensors.torch.save(tensors, {"problems": json.dumps(reasons)}))

    def read(self, i: int, count: int) -> list[torch.Tensor]:
        """Features [t, C] of the first `count` images of sample i.

        Raises:
            SampleError: what decoding one of these images raised.
            DataError: their part is missing or damaged.
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
                f"vision features {path} cannot be read ({error}); the folder must be shared by all nodes. "
                "Delete the "
                "file if it is damaged: it is computed again when training starts"
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
    """Name of everything but the shard that a feature depends on."""
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
    """Tells shards of one name apart, and a shard from what was at its place before; as in a shard's
    index.
    """
    stat = shard.stat()
    return hashlib.sha256(f"{shard.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
