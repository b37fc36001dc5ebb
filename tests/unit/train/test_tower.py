"""The tower computes once a step what it would compute microbatch by microbatch."""

from __future__ import annotations

import pytest
import torch

from megatron_evomoe.parallel import topology
from megatron_evomoe.train.built import build_stage
from megatron_evomoe.train.step import take_step
from megatron_evomoe.train.tower import StepTower
from tests.tiny import rows, step_of, tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")

STEPS = {
    "several images": [[1, 2], [0, 0], [2, 1]],
    "a single image": [[0, 1]],
    "no image": [[0, 0], [0, 0]],
}
PARTS = {
    "frozen": ["projector", "language"],
    "trained": ["vision", "projector", "language"],
    "trained alone": ["vision"],
}


def trained(parts, images, batch_size):
    """Loss and gradients by name of a step, and how many images each call of the tower was given."""
    config = tiny_config("warmup", train={"trainable": parts, "vision_batch_size": batch_size})
    topology.seed_everything(config.train.seed)
    built = build_stage(config.for_stage("warmup"), config.stages[0])
    calls = []
    built.modules[0].vision_model.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    step = step_of(*(rows(counts, seed=i) for i, counts in enumerate(images)))
    loss = take_step(built, step, 1).loss
    found = {n: p.main_grad.clone() for n, p in built.modules[0].named_parameters() if p.requires_grad}
    return loss, found, calls


@pytest.mark.parametrize("batch_size", [1, 2, None])
@pytest.mark.parametrize("images", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_loss_and_gradients_are_those_of_a_tower_in_each_microbatch(parts, images, batch_size, monkeypatch):
    loss, got, calls = trained(parts, images, batch_size)
    with monkeypatch.context() as patch:
        patch.setattr(StepTower, "features", lambda self, images, counts: list(images))
        wanted_loss, wanted, _ = trained(parts, images, None)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert got.keys() == wanted.keys() and any("vision_model" in name for name in got) == ("vision" in parts)
    for name, gradient in wanted.items():
        # sums of the same products in another order: up to 2e-6 of the largest entry was seen
        bound = 1e-5 * float(gradient.abs().max()) + 1e-9
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=bound, msg=name)
    total, at_a_time = sum(map(sum, images)), batch_size or (8 if "vision" in parts else 32)
    forward = -(-total // at_a_time)
    assert sum(calls[:forward]) == total and max(calls, default=0) <= at_a_time


def test_cached_features_pass_by_the_tower():
    config = tiny_config("warmup")
    built = build_stage(config.for_stage("warmup"), config.stages[0])
    features = [torch.randn(1, 4, 16), torch.randn(0, 4, 16)]
    assert all(a is b for a, b in zip(built.tower.features(features, [1]), features, strict=True))
