"""Experts made from a dense FFN, copied or with noise, in one process.

test_evolution_layouts.py tests other layouts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_evomoe.config import ConfigError
from tests.unit.moe import evolution_models as models

pytestmark = pytest.mark.usefixtures("one_rank")
PREFIX = "decoder.layers.1.mlp."


def load_from_dense(layer: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    from megatron_evomoe.moe.expert_init import dense_expert_sharded_state_dict

    loaded = dist_checkpointing.load(dense_expert_sharded_state_dict(layer, PREFIX), str(folder))
    missing = layer.load_state_dict({k.removeprefix(PREFIX): v for k, v in loaded.items()}, strict=False)
    assert not missing.unexpected_keys and all(k.startswith("router.") for k in missing.missing_keys)


@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True)])
@pytest.mark.parametrize("experts", [2, 4])
def test_every_expert_is_the_dense_ffn(tmp_path: Path, experts: int, gated: bool, bias: bool) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    config = models.transformer_config(gated=gated, bias=bias, experts=experts)
    dense, layer = models.dense_mlp(config), models.moe_layer(config)
    dist_checkpointing.save(
        dense.sharded_state_dict(PREFIX, (), ensure_metadata_has_dp_cp_group(None)), str(tmp_path)
    )
    load_from_dense(layer, tmp_path)
    for expert in layer.experts.local_experts:
        for name, p in dense.named_parameters():
            assert torch.equal(expert.get_parameter(name), p)
    weights = [e.linear_fc1.weight for e in layer.experts.local_experts]
    weights[0].data.zero_()
    assert weights[1].abs().sum() > 0  # copies, not views of one tensor


@pytest.mark.parametrize("singleton", [False, True])
def test_whole_model_mapping_leaves_the_rest_alone(singleton: bool) -> None:
    from megatron_evomoe.moe.expert_init import read_experts_from_dense

    layer = models.moe_layer(models.transformer_config())
    state = layer.sharded_state_dict(PREFIX, metadata={"singleton_local_shards": singleton})
    mapped = read_experts_from_dense(state)
    assert mapped.keys() == state.keys()
    router = [k for k in state if "router" in k]
    assert router and all(mapped[k] is state[k] for k in router)
    keys = {mapped[k].key for k in state if k.endswith("weight") and k not in router}
    assert keys == {f"{PREFIX}linear_fc{i}.weight" for i in (1, 2)}


def test_legacy_grouped_experts_are_refused() -> None:
    from types import SimpleNamespace

    from megatron_evomoe.moe.expert_init import dense_expert_sharded_state_dict

    with pytest.raises(ConfigError, match="moe_grouped_gemm: false"):
        dense_expert_sharded_state_dict(SimpleNamespace(experts=torch.nn.Linear(2, 2)))


def test_noise_is_seeded_scaled_and_different_everywhere() -> None:
    from megatron_evomoe.moe.expert_init import add_noise

    def noisy(seed: int, layer_number: int, std: float) -> list[torch.Tensor]:
        layer = models.moe_layer(models.transformer_config(gated=True, bias=True))
        with torch.no_grad():
            for name, p in layer.experts.named_parameters():
                p.copy_(models.full_update(name.split(".", 2)[2], 0, tuple(p.shape)))
        before = {n: p.detach().clone() for n, p in layer.experts.named_parameters()}
        add_noise(layer.experts, seed, layer_number, std)
        noise = {n: p.detach() - before[n] for n, p in layer.experts.named_parameters()}
        assert not any(t.any() for n, t in noise.items() if n.endswith("bias"))
        for n, t in noise.items():
            # With 384 or 768 values the sample's deviation is within 4/√(2·384) = 14 % of its expectation.
            if n.endswith("weight"):
                assert abs(t.std() / (std * before[n].std()) - 1) < 0.15
        return [t.flatten()[:384] for n, t in noise.items() if n.endswith("weight")]

    base = noisy(1, 2, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(base, noisy(1, 2, 0.01), strict=True))
    assert all(
        not torch.equal(a, b)
        for other in (noisy(2, 2, 0.01), noisy(1, 3, 0.01))
        for a, b in zip(base, other, strict=True)
    )
    correlations = torch.corrcoef(torch.stack(base)) - torch.eye(len(base))
    assert correlations.abs().max() < 5 / 384**0.5  # five standard errors, for 28 pairs


def test_zero_noise_changes_nothing() -> None:
    from megatron_evomoe.moe.expert_init import add_noise

    layer = models.moe_layer(models.transformer_config())
    before = [p.detach().clone() for p in layer.experts.parameters()]
    add_noise(layer.experts, 1, 1, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.experts.parameters(), strict=True))
