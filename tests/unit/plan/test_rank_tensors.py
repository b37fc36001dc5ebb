"""The plan counts the tensors that the model has.

Names and sizes are compared with models built without memory, and with hand-worked splits.
"""

from __future__ import annotations

import pytest

from megatron_evomoe.config import from_mapping
from megatron_evomoe.config.presets import PRESETS
from megatron_evomoe.model.llava import LlavaModel
from megatron_evomoe.model.transformer_config import shapes_only
from megatron_evomoe.moe.router import ROUTERS
from megatron_evomoe.plan import rank_tensors

TINY = {"vocab_size": 100, "num_layers": 4}


def planned(config, kind, pp_rank=0, chunk=0):
    return {t.name: t.numel for t in rank_tensors.chunk_tensors(config, kind, pp_rank, chunk)}


@pytest.mark.parametrize("kind", ["warmup", "evolve", "route"])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_presets_name_by_name(preset, kind, one_rank):
    config = from_mapping({"preset": preset, "train": {"transformer_impl": "local"}})
    with shapes_only():
        model = LlavaModel(config, stage_kind=kind)
    real = [(n, p.numel()) for n, p in model.named_parameters()]
    assert list(planned(config, kind).items()) == real


@pytest.mark.parametrize(
    "language",
    [
        {"qk_layernorm": True, "num_query_groups": 2, "kv_channels": 48},
        {
            "normalization": "LayerNorm",
            "add_bias_linear": True,
            "tie_word_embeddings": False,
            "lm_head_bias": True,
        },
        {"add_qkv_bias": True, "gated_linear_unit": False, "activation": "gelu", "parallel_residual": True},
    ],
)
@pytest.mark.parametrize("router", ROUTERS)
def test_options_name_by_name(language, router, one_rank):
    config = from_mapping(
        {"language": {**TINY, **language}, "moe": {"router": router}, "vision": {"model_type": "siglip"}}
    )
    with shapes_only():
        model = LlavaModel(config, stage_kind="route")
    assert planned(config, "route") == {n: p.numel() for n, p in model.named_parameters()}


def test_qwen_is_split_as_published():
    """Qwen-1.8B's 1,836,828,672 parameters are split over TP 2 x PP 2.

    TP halves every weight matrix and the attention bias; norms and routers stay whole. EP 2 gives each rank
    two of the four experts.
    """
    config = from_mapping(
        {
            "preset": "qwen-1.8b",
            "parallel": {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "expert_model_parallel_size": 2,
            },
        }
    )
    C, F, V = 2048, 5504, 151936
    attention = (3 * C * C + 3 * C + C * C) // 2
    norms = 2 * C
    router = 2 * (16 * C + 16 + 17 * 3 * 16 * C) + 4 * C
    dense_layer, moe_layer = attention + norms + 3 * C * F // 2, attention + norms + router + 2 * 3 * C * F
    stage = 6 * dense_layer + 6 * moe_layer
    second = planned(config, "route", pp_rank=1)
    assert sum(second.values()) == stage + C + V * C // 2
    first = planned(config, "route", pp_rank=0)
    assert sum(n for name, n in first.items() if name.startswith("language")) == stage + V * C // 2
    warmup = sum(sum(planned(config, "warmup", pp_rank=rank).values()) for rank in (0, 1))
    replicated = 24 * norms + C
    vision = sum(n for name, n in planned(config, "warmup").items() if not name.startswith("language"))
    assert 2 * (warmup - vision - replicated) + replicated == 1_836_828_672


def test_expert_tensor_parallelism_splits_experts_alone():
    def route(etp):
        parallel = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": etp}
        config = from_mapping({"preset": "qwen-1.8b", "parallel": parallel})
        return planned(config, "route")

    one, two = route(1), route(2)
    experts = [name for name in one if ".experts." in name]
    assert len(experts) == 12 * 4 * 2 and all(one[name] == 2 * two[name] for name in experts)
    assert all(one[name] == two[name] for name in one.keys() - set(experts))


def test_tied_embedding_exists_twice_under_pipelining():
    config = from_mapping({"preset": "qwen2-0.5b", "parallel": {"pipeline_model_parallel_size": 2}})
    first, last = (rank_tensors.chunk_tensors(config, "warmup", rank) for rank in (0, 1))
    assert [t.numel for t in first + last if t.own_bucket] == [151936 * 896] * 2
    together = rank_tensors.chunk_tensors(from_mapping({"preset": "qwen2-0.5b"}), "warmup", 0)
    assert not any(t.own_bucket or "output_layer" in t.name for t in together)


def test_interleaved_chunks_go_round_robin():
    config = from_mapping(
        {
            "language": {**TINY, "num_layers": 8},
            "parallel": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2},
        }
    )
    assert [list(rank_tensors.chunk_layers(config, rank, chunk)) for chunk in (0, 1) for rank in (0, 1)] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    assert "vision_model.class_token" not in planned(config, "route", 0, 1)
    assert "language_model.output_layer.weight" in planned(config, "route", 1, 1)


@pytest.mark.parametrize(
    ("kind", "trains"),
    [
        ("align", {"projector"}),
        ("warmup", {"projector", "language"}),
        ("evolve", {"first_expert"}),
        ("route", {"router"}),
    ],
)
def test_what_trains_is_the_stage_s(kind, trains):
    tensors = rank_tensors.chunk_tensors(from_mapping({"language": TINY}), kind, 0)
    assert {t.part for t in tensors if t.trains} == trains
    assert {t.layer for t in tensors if t.part in ("first_expert", "router")} <= {1, 3}
