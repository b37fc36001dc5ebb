"""The tensor map covers every tensor of our models exactly once.

Converting there and back changes no bit.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import ConfigError
from megatron_evomoe.config.recipe import MODULES
from megatron_evomoe.hf.tensor_map import NameMap
from megatron_evomoe.moe.router import ROUTERS
from tests.tiny import tiny_config

LANGUAGE = {
    "tied": {"num_query_groups": 1},
    "untied, padded": {"tie_word_embeddings": False, "vocab_size": 61},
    "qwen2": {"add_qkv_bias": True, "num_query_groups": 1},
    "qwen3": {"qk_layernorm": True, "kv_channels": 12},
    "stablelm": {"normalization": "LayerNorm", "tie_word_embeddings": False},
    "biases everywhere": {"add_bias_linear": True},
    "phi": {
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "parallel_residual": True,
        "gated_linear_unit": False,
        "lm_head_bias": True,
        "tie_word_embeddings": False,
        "activation": "gelu_tanh",
    },
}


def random_hf(names: NameMap) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=g) for name, shape in names.hf_shapes().items()}


def check_bijection(names: NameMap) -> None:
    """Each HF tensor is in one entry, each core tensor in one per expert; a round trip is exact."""
    hf = random_hf(names)
    assert max(Counter(name for e in names.entries for name in e.hf).values()) == 1
    assert max(Counter((e.core, e.expert) for e in names.entries).values()) == 1
    back = {}
    for entry in names.entries:
        core = torch.cat(entry.to_core(hf))
        assert tuple(core.shape) == entry.shape
        back |= entry.to_hf(core)
    assert back.keys() == hf.keys() and all(torch.equal(back[k], hf[k]) for k in hf)


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("kind", ["warmup", "route"])
def test_core_tensors_are_those_of_the_model(one_rank, name, kind):
    """Names and shapes are compared with those that megatron-core would save for the model."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from megatron_evomoe.checkpoint import store
    from megatron_evomoe.model.llava import LlavaModel

    for router, tower in zip(ROUTERS, itertools.cycle(("clip", "siglip")), strict=False):
        config = tiny_config(
            kind, language=LANGUAGE[name], moe={"router": router}, vision={"model_type": tower}
        )
        found = {}
        for entry in (
            LlavaModel(config, stage_kind=kind).sharded_state_dict(metadata=store.metadata()).values()
        ):
            if isinstance(entry, ShardedTensorFactory):
                entry = entry.build()[0]
            if isinstance(entry, ShardedTensor):
                found[entry.key] = entry.global_shape
        names = NameMap(config, kind)
        names.check_core(found, "the model")
        assert names.core_shapes() == {k: tuple(s) for k, s in found.items() if names.is_weight(k)}
        check_bijection(names)


def test_gqa_rows_are_where_the_core_expects_them():
    """With two groups of two queries, weight and bias have rows q0 q1 k0 v0 q2 q3 k1 v1."""
    config = tiny_config(language={"num_attention_heads": 4, "num_query_groups": 2, "add_qkv_bias": True})
    entry = next(
        e for e in NameMap(config, "warmup", ["language_model"]).entries if e.core.endswith("linear_qkv.bias")
    )
    q, k, v = (torch.arange(n) + start for n, start in ((32, 0), (16, 100), (16, 200)))
    fused = torch.cat(entry.to_core(dict(zip(entry.hf, (q, k, v), strict=True))))
    assert fused[::8].tolist() == [0, 8, 100, 200, 16, 24, 108, 208]


def test_padding_of_the_vocabulary_does_not_leak():
    """61 rows are padded to 64 with zeros on import; an export cuts any padding."""
    names = NameMap(tiny_config(language={"vocab_size": 61}), "warmup")
    entry = next(e for e in names.entries if e.core.endswith("word_embeddings.weight"))
    ((name, shape),) = entry.hf.items()
    weight = torch.randn(shape)
    padded = torch.cat(entry.to_core({name: weight}))
    assert shape == (61, 32) and padded.shape == (64, 32) and not padded[61:].any()
    for rows in (61, 64, 80):
        stored = torch.cat([weight, torch.ones(rows - 61, 32)])
        assert torch.equal(entry.to_hf(stored)[name], weight)
        names.check_core({**names.core_shapes(), entry.core: (rows, 32)}, "here")
    with pytest.raises(CheckpointError, match="word_embeddings"):
        names.check_core({**names.core_shapes(), entry.core: (60, 32)}, "here")


def test_leftovers_are_named():
    names = NameMap(tiny_config("route"), "route")
    for check, shapes in ((names.check_core, names.core_shapes()), (names.check_hf, names.hf_shapes())):
        check(shapes, "here")
        key = next(k for k in shapes if "expert" in k)
        with pytest.raises(CheckpointError, match=rf"here.*{key} is missing"):
            check({k: s for k, s in shapes.items() if k != key}, "here")
        with pytest.raises(CheckpointError, match=r"stranger\.weight is there"):
            check({**shapes, "stranger.weight": (3,)}, "here")
        with pytest.raises(CheckpointError, match=rf"{key} has shape \(7,\)"):
            check({**shapes, key: (7,)}, "here")


def test_training_state_is_no_weight():
    names = NameMap(tiny_config("evolve"), "evolve")
    aside = {
        "optimizer.state.exp_avg.language_model.x": (1,),
        "rng.torch": (1, 9),
        "language_model.decoder.layers.1.mlp.experts.experts.linear_fc1.weight": (4, 96, 32),
        "language_model.decoder.layers.1.mlp.evolution.linear_fc1.weight": (3, 96, 32),
        "vision_model.decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1": (),
    }
    names.check_core({**names.core_shapes(), **aside}, "here")


def test_parts_add_up():
    config = tiny_config("route")
    whole = NameMap(config, "route").hf_shapes()
    parts = [NameMap(config, "route", [part]).hf_shapes() for part in MODULES]
    assert {k: s for part in parts for k, s in part.items()} == whole
    assert all(not a.keys() & b.keys() for a, b in itertools.combinations(parts, 2))


def test_a_vocabulary_size_is_needed():
    with pytest.raises(ConfigError, match="vocab_size"):
        NameMap(tiny_config(language={"vocab_size": None}), "warmup")
