"""Every stage trains on CUDA in bf16 as it does in fp32, and nothing frozen gets a gradient buffer."""

from __future__ import annotations

import pytest

from megatron_evomoe.parallel import backend, topology
from megatron_evomoe.parallel.broadcast import Step
from tests.gpu import needs
from tests.tiny import rows, step_of, tiny_config

pytestmark = [needs.cuda, pytest.mark.usefixtures("one_rank")]
KINDS = ("align", "warmup", "evolve", "route")


def on_device(step: Step) -> Step:
    for micro in step.microbatches:
        for name in ("tokens", "labels", "token_types", "images"):
            setattr(micro, name, getattr(micro, name).to(backend.device()))
    return step


def train(kind: str, *, bf16: bool, steps: int = 10):
    """Train one stage on one batch; returns what was built and the loss of each step."""
    from megatron_evomoe.train.built import build_stage
    from megatron_evomoe.train.step import take_step

    config = tiny_config(kind, train={"bf16": bf16, "transformer_impl": "local"})
    topology.seed_everything(1)
    built = build_stage(config.for_stage(kind), config.stages[0])
    for mlp in built.evolving:
        mlp.begin()
    batch = on_device(step_of(rows([1, 2]), rows([2, 0], seed=1)))
    losses = []
    for number in range(1, steps + 1):
        losses.append(take_step(built, batch, number).loss)
        for mlp in built.evolving:
            mlp.evolve(number, 1)
    return built, losses


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_learns_as_fp32_does(kind):
    (_, coarse), (_, fine) = train(kind, bf16=True), train(kind, bf16=False)
    assert coarse[0] == pytest.approx(fine[0], rel=0.01)
    assert coarse[-1] == pytest.approx(fine[-1], rel=0.05)
    assert kind == "route" or fine[-1] < fine[0]  # training the routers alone hardly lowers the loss


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_has_no_gradient(kind):
    built, _ = train(kind, bf16=True, steps=1)
    for name, parameter in built.modules[0].named_parameters():
        assert hasattr(parameter, "main_grad") == parameter.requires_grad, name
        assert parameter.device.type == backend.device().type, name
