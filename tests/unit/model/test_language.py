"""The decoder: which layer gets which FFN under which names, and Phi-2's layer."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_evomoe.config import ConfigError, from_mapping
from megatron_evomoe.model.inventory import padded_vocab_size
from megatron_evomoe.model.language import (
    ParallelResidualLayer,
    build_language_model,
    language_block_spec,
)
from megatron_evomoe.model.transformer_config import language_transformer_config

pytestmark = pytest.mark.usefixtures("one_rank")

PHI = {
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "parallel_residual": True,
    "lm_head_bias": True,
    "activation": "gelu_tanh",
    "gated_linear_unit": False,
    "rotary_percent": 0.5,
    "tie_word_embeddings": False,
}
SMALL = {"vocab_size": 100, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2}


def config_of(language=None, **sections):
    return from_mapping({"language": {**SMALL, **(language or {})}, **sections})


def logits(model, seed=0):
    tokens = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(seed))
    return model(tokens, torch.arange(12).expand(2, -1), None)


@pytest.mark.parametrize(
    ("size", "divisor", "tp", "padded"),
    [(100, 8, 1, 104), (104, 8, 1, 104), (100, 8, 2, 112), (32002, 128, 4, 32256), (1, 1, 1, 1)],
)
def test_padded_vocab_size(size, divisor, tp, padded):
    config = config_of(
        {"vocab_size": size, "make_vocab_size_divisible_by": divisor},
        parallel={"tensor_model_parallel_size": tp},
    )
    assert padded_vocab_size(config) == padded


def test_vocab_size_must_be_known():
    with pytest.raises(ConfigError, match=r"vocab_size.*data\.tokenizer"):
        padded_vocab_size(config_of({"vocab_size": None}))


@pytest.mark.parametrize("language", [{}, PHI])
def test_names_agree_between_kinds_but_for_the_ffn(language):
    """Outside the designated FFNs, names agree between stage kinds, in memory and in checkpoints."""

    def names(kind):
        model = build_language_model(config_of(language), stage_kind=kind)
        keys = {v.key for v in model.sharded_state_dict().values()}
        inside = {f"decoder.layers.{i}.mlp." for i in (1, 3)}
        return tuple(
            {n for n in found if not any(n.startswith(p) for p in inside)}
            for found in (dict(model.named_parameters()), keys)
        )

    dense = names("dense")
    assert dense == names("align") == names("warmup") == names("evolve") == names("route")
    has_norm = not language
    assert ("decoder.layers.1.pre_mlp_layernorm.weight" in dense[1]) == has_norm
    # Layers that are not designated are saved under the names of Transformer Engine's fused layers.
    assert ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in dense[1]) == has_norm
    assert ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in dense[1]) == has_norm


def test_ffn_by_kind():
    from megatron.core.transformer.mlp import MLP

    from megatron_evomoe.moe.evolving_mlp import EvolvingMLP
    from megatron_evomoe.moe.layer import EvoMoELayer

    for kind, cls in {
        "align": MLP,
        "warmup": MLP,
        "dense": MLP,
        "evolve": EvolvingMLP,
        "route": EvoMoELayer,
    }.items():
        layers = build_language_model(config_of(), stage_kind=kind).decoder.layers
        assert [type(layer.mlp) for layer in layers] == [MLP, cls, MLP, cls]
        if kind in ("evolve", "route"):
            assert [layers[i].mlp.layer_number for i in (1, 3)] == [2, 4]


@pytest.mark.parametrize(
    ("per_chunk", "expected"),
    [
        (None, {(0, None): [0, 1, 1], (1, None): [0, 0, 1]}),
        (1, {(0, 0): [0], (1, 0): [1], (0, 1): [1], (1, 1): [0], (0, 2): [0], (1, 2): [1]}),
    ],
)
def test_pipeline_slices(per_chunk, expected, monkeypatch):
    config = config_of(
        {"num_layers": 6},
        moe={"moe_layer_freq": [0, 1, 1, 0, 0, 1]},
        parallel={"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": per_chunk},
    )
    transformer_config = language_transformer_config(config)
    for (rank, chunk), pattern in expected.items():
        monkeypatch.setattr(parallel_state, "_MPU_PIPELINE_MODEL_PARALLEL_RANK", rank)
        specs = language_block_spec(config, transformer_config, "route", chunk).layer_specs
        assert [
            int("padding" in str(s.submodules.mlp) or "EvoMoELayer" in str(s.submodules.mlp)) for s in specs
        ] == pattern


def test_attention_is_causal():
    model = build_language_model(config_of(), stage_kind="dense").eval()
    tokens = torch.randint(0, 99, (1, 12))
    changed = tokens.clone()
    changed[0, 7] += 1
    positions = torch.arange(12)[None]
    with torch.no_grad():
        same = (model(tokens, positions, None) == model(changed, positions, None)).all(-1)[0]
    assert same.tolist() == [True] * 7 + [False] * 5


def test_lm_head_bias_is_added_saved_and_trained():
    model = build_language_model(config_of(PHI), stage_kind="dense")
    before = logits(model).detach()
    bias = model.output_layer.bias
    assert bias.shape == (104,) and bias.tensor_model_parallel and not bias.any()
    with torch.no_grad():
        bias.copy_(torch.arange(104.0))
    after = logits(model)
    torch.testing.assert_close(after - before, torch.arange(104.0).expand_as(after), atol=1e-4, rtol=0)
    after.sum().backward()
    assert torch.equal(bias.grad, torch.full((104,), 24.0))
    assert model.sharded_state_dict()["output_layer.bias"].allow_shape_mismatch


def test_parallel_residual_is_one_norm_and_one_sum():
    layer = build_language_model(config_of(PHI), stage_kind="dense").decoder.layers[0]
    assert isinstance(layer, ParallelResidualLayer) and isinstance(layer, TransformerLayer)
    x = torch.randn(5, 2, 32)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        got, _ = layer(hidden_states=x, attention_mask=None)
        normed = layer.input_layernorm(x)
        attended, attention_bias = layer.self_attention(normed, attention_mask=None)
        fed, ffn_bias = layer.mlp(normed)
    torch.testing.assert_close(got, x + attended + attention_bias + fed + ffn_bias)


@pytest.mark.parametrize("kind", ["dense", "route"])
@pytest.mark.parametrize(
    "train",
    [
        {"recompute_granularity": "full"},
        {"recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    ],
)
def test_parallel_residual_recomputes(kind, train):
    gradients = []
    for section in ({}, train):
        torch.manual_seed(0)
        model = build_language_model(config_of(PHI, train=section), stage_kind=kind)
        logits(model).pow(2).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    plain, recomputed = gradients
    assert all(g is not None for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


def test_biased_experts_equal_the_dense_ffn_they_copy():
    """A mixture of equal experts computes what its dense FFN does, for Phi-2's biased layers.

    With `straight_through` and equal experts, biases included, routing changes nothing.
    """
    dense = build_language_model(config_of(PHI), stage_kind="dense")
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    mixed = build_language_model(config_of(PHI, moe={"router_gate": "straight_through"}), stage_kind="route")
    weights = dense.state_dict()
    for name in mixed.state_dict():
        if ".local_experts." in name:
            layer, part = name.split(".mlp.experts.local_experts.")
            weights[name] = weights[f"{layer}.mlp.{part.split('.', 1)[1]}"]
    result = mixed.load_state_dict(weights, strict=False)
    assert all(".router." in k or "_extra_state" in k for k in result.missing_keys)
    torch.testing.assert_close(logits(mixed), logits(dense), atol=1e-5, rtol=1e-5)
    logits(mixed).pow(2).sum().backward()
    bias = mixed.decoder.layers[1].mlp.experts.local_experts
    assert sum(e.linear_fc2.bias.grad.abs().sum() for e in bias) > 0
