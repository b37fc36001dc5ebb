"""Cached features belong to the right image; stale, torn or damaged entries are not used."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from megatron_evomoe.config import from_mapping
from megatron_evomoe.data import feature_cache
from megatron_evomoe.data.errors import DataError, SampleError
from megatron_evomoe.data.feature_cache import FeatureCache, image_form
from megatron_evomoe.data.shards import ShardDataset, write_shards
from tests.unit.data.helpers import samples

T, C = 16, 64  # positions and width of the default tower


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three shards of 7 images each: 21 samples with 0, 1 and 2 images in turn."""
    write_shards(iter(samples(21)), tmp_path / "shards", samples_per_shard=7)
    return tmp_path / "shards"


@pytest.fixture
def cache(shards, tmp_path, monkeypatch) -> FeatureCache:
    monkeypatch.setattr(feature_cache, "PART_IMAGES", 4)
    return make(shards, tmp_path)


def make(shards: Path, folder: Path, tower: str = "abc", **sections) -> FeatureCache:
    data = {"train_data": [str(shards)], "cache_vision_features": True, **sections.pop("data", {})}
    return FeatureCache(
        ShardDataset([str(shards)]), from_mapping({"data": data, **sections}), folder / "cache", tower
    )


def feature(shard: int, image: int) -> torch.Tensor:
    return torch.full((T, C), 100.0 * shard + image)


def fill(cache: FeatureCache) -> None:
    for part in cache.parts():
        cache.write(
            part, torch.stack([feature(part.shard, part.first + row) for row in range(part.count)]), {}
        )


def test_every_sample_finds_its_own_images(cache):
    assert [(p.shard, p.first, p.count) for p in cache.parts()] == [
        (shard, first, min(4, cache.dataset.num_images(shard) - first))
        for shard in range(3)
        for first in range(0, cache.dataset.num_images(shard), 4)
    ]
    assert not any(map(cache.has, cache.parts()))
    fill(cache)
    assert all(map(cache.has, cache.parts()))
    seen = []
    for i in range(21):
        found = cache.read(i, i % 3)
        shard, images = cache.dataset.images_of(i)
        assert len(found) == i % 3 and all(
            torch.equal(f, feature(shard, j)) for f, j in zip(found, images, strict=True)
        )
        seen += [(shard, j) for j in images]
    assert len(set(seen)) == len(seen) == sum(cache.dataset.num_images(s) for s in range(3)) == 21
    assert len(cache.read(2, 1)) == 1  # a sample that was truncated before its second image


def test_images_that_could_not_be_decoded_say_so_again(cache):
    part, bad = next(cache.parts()), 1
    cache.write(part, torch.zeros(part.count, T, C), {bad: SampleError("corrupt-image", "cut short")})
    owner = next(i for i in range(21) if bad in cache.dataset.images_of(i)[1])
    with pytest.raises(SampleError, match="corrupt-image: cut short"):
        cache.read(owner, len(cache.dataset.images_of(owner)[1]))


def test_missing_and_damaged_parts(cache):
    fill(cache)
    gone, cut, other = list(cache.parts())[:3]
    os.unlink(gone.path)
    os.truncate(cut.path, os.path.getsize(cut.path) - 1)
    cache.write(other, torch.zeros(other.count + 1, T, C), {})
    assert [cache.has(p) for p in cache.parts()][:4] == [False, False, False, True]
    with pytest.raises(DataError, match=r"00000.safetensors cannot be read .* computed again"):
        cache.read(1, 1)


def test_a_killed_write_leaves_nothing_that_counts(cache, monkeypatch):
    part = next(cache.parts())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.write(part, torch.zeros(part.count, T, C), {})
    assert not cache.has(part) and not list(Path(part.path).parent.iterdir())


def test_what_features_depend_on_names_their_folder(cache, shards, tmp_path):
    same = make(shards, tmp_path)
    assert same.folder == cache.folder
    others = [
        make(shards, tmp_path, tower="abd"),
        make(shards, tmp_path, vision={"feature_layer": -1}),
        make(shards, tmp_path, train={"bf16": True}),
        make(shards, tmp_path, data={"image_aspect_ratio": "square"}),
        make(shards, tmp_path, data={"max_image_pixels": 10}),
    ]
    assert len({c.folder for c in [cache, *others]}) == 6
    before = next(cache.parts()).path
    os.utime(cache.dataset.paths[0])
    assert next(make(shards, tmp_path).parts()).path != before


def test_workers_open_their_own_files(cache):
    fill(cache)
    cache.read(1, 1)
    twin = pickle.loads(pickle.dumps(cache))
    assert not twin._open and torch.equal(twin.read(1, 1)[0], cache.read(1, 1)[0])


def test_form_of_an_image(cache):
    assert image_form(from_mapping({})) == ((3, 32, 32), torch.uint8)
    assert image_form(from_mapping({"data": {"cache_vision_features": True}, "train": {"bf16": True}})) == (
        (T, C),
        torch.bfloat16,
    )
    assert cache.bytes_per_image == T * C * 4
