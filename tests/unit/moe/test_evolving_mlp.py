"""The evolving FFN in one process: forward, evolution, checkpoints, and conversion to a mixture."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_evomoe.config import ConfigError
from megatron_evomoe.moe.evolution_rules import RULES, draw_beta
from tests.unit.moe import evolution_models as models

pytestmark = pytest.mark.usefixtures("one_rank")
PREFIX = "decoder.layers.1.mlp."
VARIANTS = [(torch.float32, True, False), (torch.bfloat16, True, False), (torch.bfloat16, False, True)]
"""(dtype, gated, bias): both ways the state is stored, both forms of FFN."""


def save(module: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    folder.mkdir(exist_ok=True)
    dist_checkpointing.save(module.sharded_state_dict(PREFIX), str(folder))


def load(module: Any, folder: Path, keys: str = "") -> Any:
    """Load as the training loop does: ask the module for its state, read it, and load it.

    `keys` restricts the load to dictionary keys with that prefix.
    """
    from megatron.core import dist_checkpointing

    wanted = {k: v for k, v in module.sharded_state_dict(PREFIX).items() if k.startswith(PREFIX + keys)}
    loaded = dist_checkpointing.load(wanted, str(folder))
    return module.load_state_dict({k.removeprefix(PREFIX): v for k, v in loaded.items()}, strict=not keys)


def experts_of(module: Any) -> dict[int, dict[str, torch.Tensor]]:
    return {
        0: {n: p.detach().clone() for n, p in module.named_parameters()},
        **{n: {k: t.clone() for k, t in ts.items()} for n, ts in module.local_experts()},
    }


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for n in a:
        assert a[n].keys() == b[n].keys()
        for name in a[n]:
            assert torch.equal(a[n][name], b[n][name]), (n, name)


@pytest.mark.parametrize(("dtype", "gated", "bias"), VARIANTS)
def test_forward_and_gradients_are_the_dense_models(dtype: torch.dtype, gated: bool, bias: bool) -> None:
    config = models.transformer_config(dtype=dtype, gated=gated, bias=bias)
    dense, evolving = models.dense_mlp(config), models.evolving_mlp(config, models.moe_config())
    models.train(evolving, range(3))
    dense.load_state_dict(evolving.state_dict())  # strict: evolution adds nothing to the state dict
    grads = []
    for module in (dense, evolving):
        x = (
            torch.randn(5, 2, models.HIDDEN, generator=torch.Generator().manual_seed(3))
            .to(dtype)
            .requires_grad_()
        )
        out, out_bias = module(x)
        (out.float().square().sum() + (0 if out_bias is None else out_bias.float().sum())).backward()
        grads.append([out, x.grad, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("experts", [2, 4, 8])
def test_every_expert_follows_its_rule(rule: str, experts: int) -> None:
    """The rule applied by hand to the whole trajectory gives the same bits."""
    module = models.evolving_mlp(models.transformer_config(), models.moe_config(rule, experts), layer=5)
    models.train(module, range(4))
    for name, shape in models.whole_shapes().items():
        path = list(itertools.accumulate(models.full_update(name, t, shape) for t in range(4)))
        for n, tensors in module.local_experts():
            expected = path[0].clone()
            for t in range(1, 4):
                beta = draw_beta(models.SEED, t, 5, n, *module.moe.evolution_ranges[n - 1])
                RULES[rule].function(expected, path[t], path[t - 1], models.full_update(name, t, shape), beta)
            assert torch.equal(tensors[name], expected)
    assert [n for n, _ in module.local_experts()] == list(range(1, experts))


def test_a_transformer_layer_builds_and_numbers_it() -> None:
    """megatron-core builds the layer; 0.16 and 0.19 pass different arguments to an unknown FFN."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module

    from megatron_evomoe.moe.evolving_mlp import evolving_mlp_spec

    spec = get_gpt_layer_local_spec()
    spec.submodules.mlp = evolving_mlp_spec(spec.submodules.mlp, models.moe_config())
    layer = build_module(spec, config=models.transformer_config(), layer_number=3)
    assert layer.mlp.layer_number == 3 and not layer.is_moe_layer
    out, _ = layer(torch.randn(4, 1, models.HIDDEN), attention_mask=torch.ones(1, 1, 4, 4).tril() < 0.5)
    assert out.shape == (4, 1, models.HIDDEN)


def test_begin_copies_expert_one() -> None:
    module = models.evolving_mlp(models.transformer_config(dtype=torch.bfloat16), models.moe_config())
    module.begin()
    for _, tensors in module.local_experts():
        for name, p in module.named_parameters():
            assert torch.equal(tensors[name], p.float()) and not tensors[name].requires_grad


def test_half_precision_casts_spare_the_state() -> None:
    """megatron-core's Float16Module calls ``.bfloat16()`` on the whole model."""
    module = models.evolving_mlp(models.transformer_config(), models.moe_config())
    module.begin()
    module.bfloat16()
    assert {t.dtype for _, ts in module.local_experts() for t in ts.values()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "gated", "bias"), VARIANTS)
@pytest.mark.parametrize("rule", ["delta", "ema"])
def test_resume_is_exact(tmp_path: Path, rule: str, dtype: torch.dtype, gated: bool, bias: bool) -> None:
    config, moe = models.transformer_config(dtype=dtype, gated=gated, bias=bias), models.moe_config(rule)
    unbroken = models.evolving_mlp(config, moe)
    models.train(unbroken, range(4))
    save(unbroken, tmp_path)
    resumed = models.evolving_mlp(config, moe)
    assert not load(resumed, tmp_path).unexpected_keys and resumed.begun
    assert_same(experts_of(unbroken), experts_of(resumed))
    for module in (unbroken, resumed):
        models.train(module, range(4, 7))
    assert_same(experts_of(unbroken), experts_of(resumed))
    assert not torch.equal(
        experts_of(resumed)[1]["linear_fc1.weight"], experts_of(resumed)[2]["linear_fc1.weight"]
    )


def test_fp32_is_not_stored_twice() -> None:
    for dtype, expected in ((torch.float32, False), (torch.bfloat16, True)):
        module = models.evolving_mlp(models.transformer_config(dtype=dtype), models.moe_config())
        keys = {entry.key for entry in module.sharded_state_dict(PREFIX).values()}
        assert any("evolution" in key for key in keys) is expected


@pytest.mark.parametrize(("dtype", "gated", "bias"), VARIANTS)
@pytest.mark.parametrize("experts", [2, 4])
def test_mixture_loads_expert_n_under_index_n(
    tmp_path: Path, experts: int, dtype: torch.dtype, gated: bool, bias: bool
) -> None:
    from megatron.core import dist_checkpointing

    config = models.transformer_config(dtype=dtype, gated=gated, bias=bias, experts=experts)
    evolving = models.evolving_mlp(config, models.moe_config(experts=experts))
    models.train(evolving, range(4))
    save(evolving, tmp_path)
    layer = models.moe_layer(config)
    state = {k: v for k, v in layer.sharded_state_dict(PREFIX).items() if ".experts." in k}
    loaded = dist_checkpointing.load(state, str(tmp_path))
    layer.load_state_dict({k.removeprefix(PREFIX): v for k, v in loaded.items()}, strict=False)
    for n, tensors in experts_of(evolving).items():
        for name, tensor in tensors.items():
            assert torch.equal(layer.experts.local_experts[n].get_parameter(name), tensor.to(dtype)), (
                n,
                name,
            )


def test_checkpoint_begins_where_a_dense_one_does_not(tmp_path: Path) -> None:
    config, moe = models.transformer_config(), models.moe_config()
    source = models.evolving_mlp(config, moe)
    models.train(source, range(2))
    save(source, tmp_path)
    module = models.evolving_mlp(config, moe)
    module.begin()
    # The checkpoint holds new weights for θ_1 and none for the other experts, so evolution must begin again.
    load(module, tmp_path, keys="linear_fc")
    with pytest.raises(ConfigError, match=r"before begin\(\)"):
        module.evolve(1, models.SEED)
    module.begin()
    module.evolve(1, models.SEED)
    assert_same({0: experts_of(module)[0]}, {0: experts_of(source)[0]})


@pytest.mark.parametrize("kind", ["fully_reshardable", "dp_reshardable"])
def test_distributed_optimizer_finds_its_shards(tmp_path: Path, kind: str) -> None:
    """The distributed optimizer finds the dense entry of each parameter, not an expert's copy.

    It looks parameters up by identity among the sharded tensors.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    def build() -> tuple[Any, Any]:
        config = models.transformer_config(dtype=torch.bfloat16)
        module = models.evolving_mlp(config, models.moe_config())
        ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            module,
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1e-2, bf16=True, use_distributed_optimizer=True, clip_grad=1.0
            ),
            [ddp],
        )
        return ddp, optimizer

    def steps(ddp: Any, optimizer: Any, which: range) -> None:
        for step in which:
            ddp.zero_grad_buffer()
            out, _ = ddp(
                torch.randn(6, 1, models.HIDDEN, generator=torch.Generator().manual_seed(step)).bfloat16()
            )
            out.float().square().sum().backward()
            ddp.finish_grad_sync()
            optimizer.step()
            ddp.module.evolve(step, models.SEED)

    def state(ddp: Any, optimizer: Any, is_loading: bool) -> dict:
        model = ddp.module.sharded_state_dict(PREFIX)
        return {
            "model": model,
            "optimizer": optimizer.sharded_state_dict(
                model,
                is_loading=is_loading,
                metadata={"distrib_optim_sharding_type": kind, "chained_optim_avoid_prefix": True},
            ),
        }

    ddp, optimizer = build()
    ddp.module.begin()
    steps(ddp, optimizer, range(1, 4))
    saved = state(ddp, optimizer, is_loading=False)
    dist_checkpointing.save(saved, str(tmp_path))
    other, other_optimizer = build()
    other.module.begin()
    # megatron-core creates Adam's state at the first step, and a load needs it.
    steps(other, other_optimizer, range(9, 10))
    loaded = dist_checkpointing.load(state(other, other_optimizer, is_loading=True), str(tmp_path))
    other.module.load_state_dict({k.removeprefix(PREFIX): v for k, v in loaded["model"].items()})
    other_optimizer.load_state_dict(loaded["optimizer"])
    # checkpoint/store.py explains why each step counter is cloned.
    for part in getattr(other_optimizer, "chained_optimizers", [other_optimizer]):
        for entry in part.optimizer.state.values():
            entry["step"] = entry["step"].clone()
    steps(ddp, optimizer, range(4, 7))
    steps(other, other_optimizer, range(4, 7))
    assert_same(experts_of(ddp.module), experts_of(other.module))


def test_what_is_missing_is_named() -> None:
    config = models.transformer_config()
    module = models.evolving_mlp(config, models.moe_config())
    with pytest.raises(ConfigError, match=r"before begin\(\)"):
        module.evolve(1, 1)
    module.begin()
    with pytest.raises(ConfigError, match="evolves 3 experts"):
        module.evolve(1, 1, ranges=[(0.1, 0.2)])
    with pytest.raises(ConfigError, match="main_grad"):
        module.evolve(1, 1, rule="printed")
    with pytest.raises(ConfigError, match="does not keep"):
        ema = models.evolving_mlp(config, models.moe_config("ema"))
        ema.begin()
        ema.evolve(1, 1, rule="delta")
    module.layer_number = None
    with pytest.raises(ConfigError, match="layer_number"):
        module.evolve(1, 1)
    with pytest.raises(ConfigError, match="evolves 7 experts"):
        models.evolving_mlp(config, models.moe_config(experts=8, ranges=[(0.1, 0.2)] * 3))


def test_a_norm_fused_into_the_ffn_is_refused() -> None:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from megatron_evomoe.moe.evolving_mlp import EvolvingMLP

    class Fused(ColumnParallelLinear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(models.HIDDEN))

    spec = models.dense_spec()
    submodules = copy.copy(spec.submodules if hasattr(spec, "submodules") else spec.keywords["submodules"])
    submodules.linear_fc1 = Fused
    with pytest.raises(ConfigError, match=r"linear_fc1\.layer_norm_weight"):
        EvolvingMLP(models.transformer_config(), submodules, models.moe_config())
