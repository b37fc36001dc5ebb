"""What identifies a vision tower, and the disk space that its features need."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_evomoe.data.feature_cache import Part
from megatron_evomoe.model.vision import build_vision_model
from megatron_evomoe.parallel import topology
from megatron_evomoe.train import vision_cache
from tests.tiny import tiny_config


@pytest.fixture
def tower(one_rank):
    torch.manual_seed(0)
    return build_vision_model(tiny_config())


def test_digest_is_of_every_weight(tower):
    before = vision_cache.weights_digest(tower)
    assert vision_cache.weights_digest(tower) == before
    for name, parameter in tower.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            last = parameter.view(-1)[-1:]
            last.copy_(torch.nextafter(last, torch.full_like(last, torch.inf)))
            assert vision_cache.weights_digest(tower) != before, name
            parameter.copy_(kept)
    assert vision_cache.weights_digest(tower) == before


def test_digest_is_of_every_place(tower):
    """The digest changes when equal numbers change places, in a tensor or between layers."""
    before = vision_cache.weights_digest(tower)
    weight = tower.conv1.weight
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    assert vision_cache.weights_digest(tower) != before
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    assert vision_cache.weights_digest(tower) == before
    assert vision_cache.weights_digest(tower.to(torch.bfloat16)) != before


def test_no_room(tmp_path, monkeypatch):
    cache = SimpleNamespace(folder=tmp_path, bytes_per_image=1_000_000)
    monkeypatch.setattr(vision_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=2_500_000))
    assert vision_cache._no_room(cache, 2) is None
    assert "3 images take 0.003 GB" in vision_cache._no_room(
        cache, 3
    ) and "feature_cache_dir" in vision_cache._no_room(cache, 3)


def test_a_request_to_stop_is_met_between_two_parts(one_rank, monkeypatch):
    monkeypatch.setattr(vision_cache._Extraction, "_compute", lambda self, part: computed.append(part.first))
    computed, answers = [], iter([None, "SIGTERM"])
    session = SimpleNamespace(
        topology=topology.current(),
        heartbeat=SimpleNamespace(enter=lambda phase: None),
    )
    parts = [Part(shard=0, first=first, count=256, path="") for first in (0, 256, 512)]
    extraction = vision_cache._Extraction(parts, None, None, session, tiny_config())
    assert extraction.run(SimpleNamespace(agreed=lambda: next(answers))) == "SIGTERM"
    assert computed == [0, 256]
    assert extraction.run(SimpleNamespace(agreed=lambda: None)) is None and len(computed) == 5
