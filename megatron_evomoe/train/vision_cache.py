"""Runs a frozen vision tower over every training image once, before the first step, and keeps the features.

The replicas share the parts of the cache (`data.feature_cache`). Parts that an earlier stage or a killed
attempt has written are kept. The ranks of a replica's first pipeline stage compute together, as in training.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch.utils.data import DataLoader, Dataset

from megatron_evomoe.config import ConfigError, RunConfig
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.feature_cache import FeatureCache, Part
from megatron_evomoe.data.image import ImageProcessor, decode_image, processor_for
from megatron_evomoe.data.loader import fetching
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.model.llava import LlavaModel
from megatron_evomoe.parallel import backend, topology
from megatron_evomoe.train.session import Session
from megatron_evomoe.train.stop import StopRequests

if TYPE_CHECKING:
    from megatron_evomoe.train.stage_run import StageRun

BATCH = 32
_SAY_EVERY = 30.0  # seconds between two lines on the progress
_MASK = 2**64 - 1


def open_cache(run: StageRun) -> FeatureCache | None:
    """The cache from which this rank reads vision features; none if it reads none. Communicates over TP."""
    if not run.config.data.cache_vision_features or not run.session.topology.first_stage:
        return None
    tower = run.built.modules[0].vision_model
    assert tower is not None, "the first pipeline stage has the tower"
    digest = weights_digest(tower)
    if run.samples is None or run.samples.dataset is None:
        return None
    folder = Path(run.config.data.feature_cache_dir or run.session.run_dir / "vision_features")
    return FeatureCache(run.samples.dataset, run.config, folder, digest)


def complete(cache: FeatureCache | None, run: StageRun) -> str | None:
    """Compute the missing features, if `cache_vision_features` is set. Communicates.

    Returns:
        Why the run was asked to end before all features were computed, or none. The finished parts are kept.

    Raises:
        ConfigError: on every rank: the disk has too little free space.
    """
    if not run.config.data.cache_vision_features:
        return None
    run.session.heartbeat.enter("features")
    missing = _missing(cache, run.session)
    if not missing:
        return None
    return _Extraction(missing, cache, run.built.modules[0], run.session, run.config).run(run.stop)


def weights_digest(tower: MegatronModule) -> str:
    """A digest of the tower's weights, the same under any tensor parallelism. Communicates over TP."""
    tensor_parallel = topology.current().tensor
    mine: dict[str, int] = {}
    for tensor in tower.sharded_state_dict("").values():
        if not isinstance(tensor, ShardedTensor):
            continue  # Transformer Engine's extra state, empty without FP8
        is_whole = tensor.local_shape == tensor.global_shape[tensor.prepend_axis_num :]
        if tensor_parallel.rank == 0 or not is_whole:
            mine[tensor.key] = (mine.get(tensor.key, 0) + _digest(tensor)) & _MASK
    everyone: list[dict[str, int]] = [{}] * tensor_parallel.size
    dist.all_gather_object(everyone, mine, group=tensor_parallel.group)
    total = {key: sum(part.get(key, 0) for part in everyone) & _MASK for key in set().union(*everyone)}
    return hashlib.sha256(json.dumps(sorted(total.items())).encode()).hexdigest()


def _digest(tensor: ShardedTensor) -> int:
    """Sum over elements of (bits x a random number of the element's place in the whole tensor), mod 2^64."""
    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    data = tensor.data.detach().reshape(shape)
    place = torch.zeros(shape, dtype=torch.int64, device=data.device)
    for dim, (size, offset, whole) in enumerate(
        zip(shape, tensor.global_offset, tensor.global_shape, strict=True)
    ):
        index = torch.arange(offset, offset + size, device=data.device)
        place = place * whole + index.view(-1, *(1,) * (len(shape) - dim - 1))
    drawn = (place + 1) * 0x1E3779B97F4A7C15  # int64 arithmetic wraps around
    drawn = (drawn ^ (drawn >> 29)) * 0x3F58476D1CE4E5B9
    bits = data.contiguous().view({2: torch.int16, 4: torch.int32}[data.element_size()]).long()
    return int((bits * (drawn ^ (drawn >> 31) | 1)).sum()) & _MASK


def _missing(cache: FeatureCache | None, session: Session) -> list[Part]:
    """The parts that rank 0 finds missing. Communicates. Raises `ConfigError` if they do not fit the disk."""
    found: list[Any] = [None, None]
    if session.topology.rank == 0:
        assert cache is not None
        parts = list(cache.parts())
        missing = [part for part in parts if not cache.has(part)]
        images, total = (sum(part.count for part in some) for some in (missing, parts))
        cache.folder.mkdir(parents=True, exist_ok=True)
        found = [missing, _no_room(cache, images)]
        if images and found[1] is None:
            size = images * cache.bytes_per_image / 1e6
            session.logger.say(
                f"vision features: computing {images} of {total} images, {size:,.1f} MB, in {cache.folder}"
            )
        elif not images:
            session.logger.say(f"vision features: all {total} images are in {cache.folder}")
    dist.broadcast_object_list(found, src=0)
    missing, problem = found
    if problem is not None:
        raise ConfigError(problem)
    return missing


def _no_room(cache: FeatureCache, images: int) -> str | None:
    need, free = images * cache.bytes_per_image, shutil.disk_usage(cache.folder).free
    if need <= free:
        return None
    return (
        f"vision features of {images} images take {need / 1e9:.3g} GB, and {cache.folder} has "
        f"{free / 1e9:.3g} GB free; set feature_cache_dir to a larger disk, or leave "
        "cache_vision_features out"
    )


class _Extraction:
    """Runs the missing parts through the tower, in rounds of one part per replica.

    A request to stop is therefore met after at most one part.
    """

    def __init__(
        self,
        missing: list[Part],
        cache: FeatureCache | None,
        model: LlavaModel,
        session: Session,
        config: RunConfig,
    ) -> None:
        self.missing, self.cache, self.model, self.session = missing, cache, model, session
        self.side = config.vision.image_size
        place = session.topology
        self.replica, self.replicas = place.data.rank, place.data.size
        self.computes = place.first_stage and place.context.rank == 0
        self.tensor_parallel = place.tensor
        mine = missing[self.replica :: self.replicas]
        self.batches = (
            iter(_pixels(mine, cache, processor_for(config), config)) if cache is not None else None
        )

    def run(self, stop: StopRequests) -> str | None:
        """Why it ended early, or none. Communicates."""
        started = said = time.monotonic()
        done, total = 0, sum(part.count for part in self.missing)
        for i in range(0, len(self.missing), self.replicas):
            self.session.heartbeat.enter("features")
            parts = self.missing[i : i + self.replicas]
            if self.computes and self.replica < len(parts):
                self._compute(parts[self.replica])
            if reason := stop.agreed():
                return reason
            done += sum(part.count for part in parts)
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                self.session.logger.say(
                    f"vision features: {done} of {total} images, {done / (said - started):.0f} per second"
                )
        return None

    def _compute(self, part: Part) -> None:
        """Compute one part on the first pipeline stage's ranks of a replica.

        The rank that reads the images writes the features. Communicates over TP.
        """
        features: list[torch.Tensor] = []
        problems: dict[int, SampleError] = {}
        for first in range(0, part.count, BATCH):
            pixels, bad = self._next_batch(min(BATCH, part.count - first))
            problems |= {first + row: error for row, error in bad.items()}
            with torch.no_grad():
                found = self.model.vision_features(pixels)
            if self.cache is not None:
                features.append(found.cpu())
        if self.cache is not None:
            self.cache.write(part, torch.cat(features), problems)

    def _next_batch(self, count: int) -> tuple[torch.Tensor, dict[int, SampleError]]:
        """Images as uint8 [count, 3, S, S] on every TP rank.

        The reading rank also gets the error of each row that could not be read. Communicates over TP.
        """
        pixels = torch.empty(count, 3, self.side, self.side, dtype=torch.uint8, device=backend.device())
        problems: dict[int, SampleError] = {}
        if self.batches is not None:
            found, problems = next(self.batches)
            pixels.copy_(found)
        group = self.tensor_parallel.group
        if self.tensor_parallel.size > 1:
            dist.broadcast(pixels, dist.get_global_rank(group, 0), group=group)
        return pixels, problems


class _Images(Dataset):
    """Maps (shard, image number) to pixels, or to the error of an image that cannot be read."""

    def __init__(self, dataset: ShardDataset, processor: ImageProcessor, max_pixels: int) -> None:
        self.dataset, self.processor, self.max_pixels = dataset, processor, max_pixels

    def __getitems__(self, places: list[tuple[int, int]]) -> tuple[torch.Tensor, dict[int, SampleError]]:
        pixels = torch.zeros(len(places), 3, self.processor.size, self.processor.size, dtype=torch.uint8)
        problems = {}
        for row, (shard, image) in enumerate(places):
            try:
                pixels[row] = self.processor(decode_image(self.dataset.image(shard, image), self.max_pixels))
            except SampleError as error:
                problems[row] = error
        return pixels, problems


def _pixels(
    parts: list[Part], cache: FeatureCache, processor: ImageProcessor, config: RunConfig
) -> DataLoader:
    """Batches of each part in turn: (uint8 [n, 3, S, S], row -> error)."""
    chunks = [
        [(part.shard, image) for image in range(first, min(first + BATCH, part.first + part.count))]
        for part in parts
        for first in range(part.first, part.first + part.count, BATCH)
    ]
    return fetching(_Images(cache.dataset, processor, config.data.max_image_pixels), chunks, config.data)
