"""Our fields become megatron-core's configuration; unsupported combinations are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_evomoe.config import ConfigError, from_mapping
from megatron_evomoe.model import transformer_config as tc

BASE = {"vocab_size": 100}


def language(**sections):
    sections.setdefault("language", BASE)
    return tc.language_transformer_config(from_mapping(sections))


def test_defaults():
    config = language()
    assert config.params_dtype == config.pipeline_dtype == torch.float32 and not config.bf16
    assert config.use_cpu_initialization and config.perform_initialization
    assert not config.sequence_parallel and not config.calculate_per_token_loss
    assert config.hidden_dropout == config.attention_dropout == 0
    assert config.activation_func is F.silu and config.gated_linear_unit
    assert not (
        config.bias_activation_fusion or config.masked_softmax_fusion or config.gradient_accumulation_fusion
    )
    assert config.kv_channels == 32 and config.num_query_groups == 4


def test_mixture_fields():
    config = language(
        moe={
            "num_experts": 8,
            "moe_router_topk": 2,
            "moe_layer_freq": [0, 1, 1, 0],
            "moe_aux_loss_coeff": 0.02,
            "moe_z_loss_coeff": 0.1,
            "moe_expert_capacity_factor": 1.5,
        }
    )
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_layer_freq) == (8, 2, [0, 1, 1, 0])
    assert (config.moe_aux_loss_coeff, config.moe_z_loss_coeff, config.moe_expert_capacity_factor) == (
        0.02,
        0.1,
        1.5,
    )
    assert config.moe_router_pre_softmax and config.moe_router_dtype == "fp32"
    assert config.moe_ffn_hidden_size == config.ffn_hidden_size == 352


def test_parallel_and_precision():
    config = language(
        parallel={
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "expert_model_parallel_size": 2,
        },
        train={"bf16": True},
    )
    assert config.sequence_parallel and config.virtual_pipeline_model_parallel_size == 2
    assert (config.expert_model_parallel_size, config.expert_tensor_parallel_size) == (2, 1)
    assert config.params_dtype == config.pipeline_dtype == torch.bfloat16 and config.bf16
    assert not language(
        parallel={"tensor_model_parallel_size": 2, "sequence_parallel": False}
    ).sequence_parallel


def test_recompute():
    full = language(train={"recompute_granularity": "full", "recompute_num_layers": 2})
    assert (full.recompute_method, full.recompute_num_layers) == ("uniform", 2)
    selective = language(
        train={"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}
    )
    assert (selective.recompute_method, selective.recompute_modules) == (None, ["core_attn", "moe"])


def test_window_leaves_out_the_querys_own_position():
    assert language(language={**BASE, "window_size": 4096}).window_size == (4095, 0)


def test_vision_and_projector_keep_to_one_pipeline_stage():
    config = from_mapping(
        {
            "language": BASE,
            "parallel": {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "expert_model_parallel_size": 2,
            },
        }
    )
    vision, projector = tc.vision_transformer_config(config), tc.projector_transformer_config(config)
    for part in (vision, projector):
        assert part.tensor_model_parallel_size == 2 and part.pipeline_model_parallel_size == 1
        assert (
            part.expert_model_parallel_size == 1
            and not part.sequence_parallel
            and part.num_moe_experts is None
        )
    assert vision.num_layers == 2 and vision.activation_func is tc.quick_gelu
    assert projector.activation_func is F.gelu and not projector.bias_activation_fusion


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"transformer_impl": "transformer_engine"}}, "no CUDA device"),
        ({"moe": {"moe_grouped_gemm": True}}, "moe_grouped_gemm needs Transformer Engine"),
        ({"parallel": {"context_parallel_size": 2}}, "context_parallel_size needs Transformer Engine"),
        ({"parallel": {"sequence_parallel": True}}, "tensor_model_parallel_size > 1"),
        (
            {"parallel": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3}},
            "3 must split the 2 layers of each of 2 pipeline stages",
        ),
        (
            {"parallel": {"num_layers_per_virtual_pipeline_stage": 2}},
            "2 must split the 4 layers of each of 1 pipeline stages",
        ),
        (
            {"language": {**BASE, "num_query_groups": 2}, "parallel": {"tensor_model_parallel_size": 4}},
            "num_query_groups",
        ),
        (
            {"language": {**BASE, "add_bias_linear": True}, "parallel": {"expert_tensor_parallel_size": 2}},
            "ETP",
        ),
        (
            {
                "language": {**BASE, "num_attention_heads": 6, "hidden_size": 96},
                "parallel": {"tensor_model_parallel_size": 4},
            },
            "6",
        ),
        (
            {"train": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}},
            "need Transformer Engine",
        ),
        (
            {
                "language": {**BASE, "add_bias_linear": True},
                "train": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
            },
            "take mlp out",
        ),
        ({"train": {"recompute_granularity": "selective", "recompute_modules": ["attn"]}}, "attn"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA says")
def test_refused(sections, says):
    with pytest.raises(ConfigError, match=says):
        language(**sections)


def test_shapes_only_allocates_nothing_and_ends():
    with tc.shapes_only():
        assert torch.empty(10**15).device.type == torch.zeros(3, device="cpu").device.type == "meta"
        assert not language().perform_initialization
    assert torch.empty(1).device.type == "cpu" and language().perform_initialization
