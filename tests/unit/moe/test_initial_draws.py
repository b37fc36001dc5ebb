"""Noise and fresh routers depend only on their place, and have the documented spread."""

from __future__ import annotations

import pytest
import torch

from megatron_evomoe.config import LanguageConfig, MoEConfig
from megatron_evomoe.moe import initial_draws
from megatron_evomoe.moe.router import ROUTERS, draw_router, router_tensors
from tests.tiny import tiny_config


def test_noise_depends_on_its_place_alone():
    places = ((1, 2, 3, 1), (2, 2, 3, 1), (1, 3, 3, 1), (1, 2, 4, 1), (1, 2, 3, 2))
    drawn = [initial_draws.expert_noise(*place, (2, 40, 50)) for place in places]
    assert torch.equal(drawn[0], initial_draws.expert_noise(1, 2, 3, 1, (2, 40, 50)))
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])
    assert abs(drawn[0].std() - 1) < 0.05 and drawn[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_std_of_parts_is_that_of_the_whole(dtype):
    """The bound is half a unit in the last place of fp32, which the final rounding needs."""
    weight = (torch.randn(60, 70, generator=torch.Generator().manual_seed(1)) * 0.03 + 0.01).to(dtype)
    total = sum(initial_draws.moments(part) for part in weight.split(17))
    wanted = weight.double().std(correction=0).item()
    assert abs(initial_draws.std_of(total) / wanted - 1) < 2**-23


@pytest.mark.parametrize("router", ROUTERS)
def test_routers_have_the_parameters_of_the_model(one_rank, router):
    from megatron_evomoe.model.llava import LlavaModel

    config = tiny_config("route", moe={"router": router})
    [layer] = [
        m for m in LlavaModel(config, stage_kind="route").modules() if type(m).__name__ == "EvoMoELayer"
    ]
    drawn = initial_draws.router_weights(config, 2)
    assert {k: v.shape for k, v in drawn.items()} == {k: v.shape for k, v in layer.router.named_parameters()}
    again, other = initial_draws.router_weights(config, 2), initial_draws.router_weights(config, 1)
    assert all(torch.equal(again[k], v) for k, v in drawn.items())
    assert any(not torch.equal(other[k], v) for k, v in drawn.items())


def test_drawing_leaves_the_generator_alone():
    torch.manual_seed(4)
    wanted = torch.rand(1)
    torch.manual_seed(4)
    initial_draws.router_weights(tiny_config("route"), 1)
    assert torch.equal(torch.rand(1), wanted)


def test_submodules_are_drawn_before_the_router_itself():
    """`text` and `vision` are drawn before φ; the order decides which numbers an import writes."""
    tensors = router_tensors(MoEConfig(router="dtr"), LanguageConfig(hidden_size=32))
    values = {tensor.name: torch.empty(tensor.shape) for tensor in tensors}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        draw_router(tensors, values)
        torch.manual_seed(1)
        first = torch.empty_like(values["text.weight1"]).normal_(std=32**-0.5)
    assert torch.equal(values["text.weight1"], first) and next(iter(values)) == "phi"
