"""FP8's bytes by hand, from what Transformer Engine's code keeps.

Nothing here has been compared with a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.core.fp8_utils import is_first_last_bf16_layer

from megatron_evomoe.config import from_mapping
from megatron_evomoe.plan import activations, fp8, search
from megatron_evomoe.plan.gradient_flow import LayerFlow, chunk_flow
from megatron_evomoe.plan.step_time import Machine

C, F, LAYERS, T, EXPERTS = 128, 384, 4, 256, 4
ATTENTION = {"qkv": 3 * C * C, "proj": C * C}
FC1, FC2 = 2 * F * C, F * C
DENSE = sum(ATTENTION.values()) + FC1 + FC2
EVERYTHING_TRAINS = LayerFlow(
    mixture=False, input_grad=True, trains_attention=True, trains_ffn=True, trains_router=False, fp8=True
)


def config_of(recipe: str | None = "delayed", **sections):
    gpu = {"fp8_format": "hybrid", "fp8_recipe": recipe} if recipe else {}
    return from_mapping(
        {
            "language": {
                "num_layers": LAYERS,
                "hidden_size": C,
                "ffn_hidden_size": F,
                "num_attention_heads": 4,
                "vocab_size": 64,
                **sections.pop("language", {}),
            },
            "data": {"seq_length": T},
            "moe": {"num_experts": EXPERTS},
            "train": {"bf16": True, **sections.pop("train", {})},
            "gpu": {**gpu, **sections.pop("gpu", {})},
            **sections,
        }
    )


def test_a_trained_weight_is_copied_both_ways_round():
    assert fp8.weight_bytes(config_of(), "warmup", 0) == LAYERS * 2 * DENSE
    assert fp8.weight_bytes(config_of(None), "warmup", 0) == 0


@pytest.mark.parametrize(
    ("recipe", "elements"), [("delayed", 0), ("tensorwise", 0), ("blockwise", 128 * 128 / 4), ("mxfp8", 32)]
)
def test_scales_of_weights(recipe, elements):
    """A scale is an fp32 per 128 x 128 block or a byte per 32 elements, in each of two copies."""
    scales = 2 * LAYERS * DENSE / elements if elements else 0
    assert fp8.weight_bytes(config_of(recipe), "warmup", 0) == 2 * LAYERS * DENSE + scales


def test_only_what_passes_a_gradient_on_is_transposed():
    """Weights of `route` that pass no gradient on have no transposed copy.

    Layers 0 and 2 are dense, 1 and 3 are mixtures, and nothing below the first router passes a gradient.
    There most weights have one copy. Layers with a fused norm have two, because their code asks only whether
    gradients are enabled. The experts' second matrices have two, because their input carries the router's
    probability.
    """
    experts = EXPERTS * (FC1 + FC2)
    below = 2 * (ATTENTION["qkv"] + FC1) + ATTENTION["proj"] + FC2
    first = 2 * ATTENTION["qkv"] + ATTENTION["proj"] + EXPERTS * (FC1 + 2 * FC2)
    above = 2 * DENSE + 2 * (sum(ATTENTION.values()) + experts)
    assert fp8.weight_bytes(config_of(), "route", 0) == below + first + above
    recomputing = config_of(train={"recompute_granularity": "selective", "recompute_modules": ["moe"]})
    assert fp8.weight_bytes(recomputing, "route", 0) == below + first + EXPERTS * FC1 + above
    assert fp8.weight_bytes(config_of(train={"recompute_granularity": "full"}), "route", 0) == 2 * (
        2 * DENSE + 2 * (sum(ATTENTION.values()) + experts)
    )


def test_a_shared_norm_is_fused_into_nothing():
    """Phi-2's layers have no fused norm: in `route`, one copy each below the first router."""
    config = config_of(language={"parallel_residual": True})
    assert fp8.weight_bytes(config, "evolve", 0) == DENSE + (DENSE + FC2) + 2 * 2 * DENSE


def test_a_rank_copies_its_own_weights():
    halves = [
        fp8.weight_bytes(config_of(parallel={"pipeline_model_parallel_size": 2}), "warmup", rank)
        for rank in (0, 1)
    ]
    assert halves == [LAYERS * DENSE] * 2
    assert (
        fp8.weight_bytes(config_of(parallel={"tensor_model_parallel_size": 2}), "warmup", 0) == LAYERS * DENSE
    )
    whole = fp8.weight_bytes(config_of(train={"recompute_granularity": "full"}), "route", 0)
    split = config_of(parallel={"expert_model_parallel_size": 4}, train={"recompute_granularity": "full"})
    assert whole - fp8.weight_bytes(split, "route", 0) == 2 * 2 * 3 * (FC1 + FC2)


@pytest.mark.parametrize(("start", "end"), [(1, 1), (0, 2), (2, 1)])
def test_first_and_last_layers_as_the_core_picks_them(start, end):
    gpu = {
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }
    config = config_of("tensorwise", gpu=gpu)
    core = SimpleNamespace(num_layers=LAYERS, **gpu)
    planned = [flow.fp8 for flow in chunk_flow(config, "warmup", 0, 0)]
    assert planned == [not is_first_last_bf16_layer(core, layer) for layer in range(LAYERS)]
    assert fp8.weight_bytes(config, "warmup", 0) == (LAYERS - start - end) * 2 * DENSE
    second = config_of("tensorwise", gpu=gpu, parallel={"pipeline_model_parallel_size": 2})
    assert [flow.fp8 for flow in chunk_flow(second, "warmup", 1, 0)] == planned[2:]


@pytest.mark.parametrize(
    ("recipe", "scales"), [("delayed", 0), ("tensorwise", 0), ("blockwise", 4 / 128), ("mxfp8", 1 / 32)]
)
def test_linear_layers_keep_fp8_inputs(recipe, scales):
    """The inputs of qkv and fc1 (C wide) and of fc2 (F) take one byte instead of two, plus scales.

    Flash attention keeps the output projection's input in bf16 anyway; `delayed` has an FP8 copy beside it,
    the other recipes have none.
    """
    saved = _layer(config_of(None), EVERYTHING_TRAINS, False) - _layer(
        config_of(recipe), EVERYTHING_TRAINS, True
    )
    copy = T * C if recipe == "delayed" else 0
    assert saved == T * (2 * C + F) * (1 - scales) - copy


def test_a_norm_shared_in_bf16_is_copied_twice_in_fp8():
    """Phi-2's shared norm output is one bf16 tensor of two bytes, or two FP8 copies of one byte."""
    language = {"parallel_residual": True}
    saved = _layer(config_of(None, language=language), EVERYTHING_TRAINS, False) - _layer(
        config_of("tensorwise", language=language), EVERYTHING_TRAINS, True
    )
    assert saved == T * F


def test_experts_keep_fp8_inputs():
    flow = LayerFlow(
        mixture=True, input_grad=True, trains_attention=False, trains_ffn=True, trains_router=True, fp8=True
    )
    assert _layer(config_of(None), flow, False) - _layer(config_of(), flow, True) == T * (C + F)


def test_frozen_layers_keep_no_input_to_shrink():
    flow = LayerFlow(
        mixture=False,
        input_grad=True,
        trains_attention=False,
        trains_ffn=False,
        trains_router=False,
        fp8=True,
    )
    assert _layer(config_of(), flow, True) == _layer(config_of(None), flow, False)


def _layer(config, flow: LayerFlow, in_fp8: bool) -> int:
    flow = LayerFlow(**{**vars(flow), "fp8": in_fp8})
    return activations.layer(config, activations.sizes_of(config), flow)


def planned(held: dict | None = None, **sections):
    config = from_mapping(
        {
            "preset": "qwen-1.8b",
            "train": {"bf16": True, "global_batch_size": 64},
            "stages": [{"name": "warmup"}],
            **sections,
        }
    )
    return search.plan_stage(config, config.stages[0], Machine(nnodes=1), held)


def test_a_plan_counts_the_copies(monkeypatch):
    """A plan needs neither Transformer Engine nor a GPU.

    On this machine a run refuses FP8 and Triton, but a plan does not.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    held = {"tp": 1, "pp": 1, "layers_per_chunk": None, "recompute": "none"}
    bf16, in_fp8 = (
        planned(held, gpu=gpu, moe={"dtr_kernel": "triton"}).fits[0] for gpu in ({}, {"fp8_format": "hybrid"})
    )
    decoder = 24 * (4 * 2048 * 2048 + 3 * 2048 * 5504)
    assert (bf16.fp8_bytes, in_fp8.fp8_bytes) == (0, 2 * decoder)
    assert in_fp8.total_bytes == in_fp8.states.total_bytes + in_fp8.activation_bytes + 2 * decoder
    assert in_fp8.states == bf16.states and in_fp8.activation_bytes < bf16.activation_bytes


def test_fp8_s_own_rules_refuse_layouts():
    """Layouts are refused where FP8's row counts do not divide the sequence or the weights.

    5504 over TP 4 is 1376, which is a multiple of 16 and is accepted; the blockwise recipe requires multiples
    of its 128 rows only of each TP rank's part of the sequence.
    """
    gpu = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}
    plan = planned(gpu=gpu, data={"seq_length": 1280})
    assert {e.layout.tp for e in plan.fits} == {1, 2}
    assert any("seq_length 1280 must be a multiple of 512" in r.example for r in plan.refused)
    plan = planned(gpu={"fp8_format": "hybrid"}, language={"ffn_hidden_size": 5536})
    assert {e.layout.tp for e in plan.fits} == {1, 2}
    assert any("ffn_hidden_size / tensor_model_parallel_size is 1384" in r.example for r in plan.refused)
