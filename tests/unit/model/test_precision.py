"""FP8 and fused kernels, as far as they can be tested without a GPU.

Tested is which settings each configuration gets, and what is refused. Transformer Engine is not installed;
where megatron-core's configuration checks for it, the tests pretend that it is. Nothing is computed in FP8.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_evomoe.config import ConfigError, from_mapping
from megatron_evomoe.model import precision
from megatron_evomoe.model import transformer_config as tc
from megatron_evomoe.parallel import backend, topology
from tests.tiny import rows, tiny_config

HOPPER, BLACKWELL = (9, 0), (10, 0)
FP8 = {"fp8_format": "hybrid"}
FUSIONS = ("apply_rope_fusion", "moe_permute_fusion", "cross_entropy_loss_fusion")


def run_config(*, bf16=True, **sections):
    return from_mapping({"language": {"vocab_size": 100}, "train": {"bf16": bf16}, **sections})


@pytest.fixture
def claimed_engine(monkeypatch):
    """Make megatron-core's configuration believe that Transformer Engine is installed."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import transformer_config
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.setattr(transformer_config, "is_te_min_version", lambda *args, **kwargs: True)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    for name in (
        "fused_permute",
        "fused_permute_with_probs",
        "fused_sort_chunks_by_index",
        "fused_sort_chunks_by_index_with_probs",
        "fused_unpermute",
    ):
        monkeypatch.setattr(moe_utils, name, object(), raising=False)


@pytest.fixture
def claimed_gpu(monkeypatch, claimed_engine):
    """Pretend that there is a Hopper GPU with Transformer Engine."""
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    monkeypatch.setattr(backend, "capability", lambda: HOPPER)
    monkeypatch.setattr(tc, "_have_transformer_engine", lambda: True)


def test_fp8_is_the_decoders_alone(claimed_gpu):
    config = run_config(gpu=FP8)
    assert tc.language_transformer_config(config).fp8 == "hybrid"
    for part in (tc.vision_transformer_config(config), tc.projector_transformer_config(config)):
        assert part.fp8 is None and not (
            part.first_last_layers_bf16 or part.moe_router_padding_for_quantization
        )


def test_what_stays_out_of_fp8(claimed_gpu):
    core = tc.language_transformer_config(run_config(gpu=FP8))
    assert core.moe_router_dtype == "fp32" and core.attention_softmax_in_fp32
    assert not (core.fp8_dot_product_attention or core.fp8_multi_head_attention or core.fp8_param)


def test_flags_reach_the_core(claimed_gpu):
    core = tc.language_transformer_config(
        run_config(
            gpu={
                "fp8_format": "e4m3",
                "fp8_recipe": "tensorwise",
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": 2,
                "num_layers_at_end_in_bf16": 1,
                "moe_router_padding_for_fp8": True,
            }
        )
    )
    assert (core.fp8, core.fp8_recipe, core.first_last_layers_bf16) == ("e4m3", "tensorwise", True)
    assert (core.num_layers_at_start_in_bf16, core.num_layers_at_end_in_bf16) == (2, 1)
    assert core.moe_router_padding_for_quantization
    delayed = tc.language_transformer_config(
        run_config(gpu={**FP8, "fp8_margin": 1, "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"})
    )
    assert (delayed.fp8_margin, delayed.fp8_amax_history_len, delayed.fp8_amax_compute_algo) == (
        1,
        1024,
        "max",
    )


def test_the_cores_own_reading_of_first_and_last():
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    settings = precision.language_settings(
        run_config(
            gpu={
                **FP8,
                "fp8_recipe": "tensorwise",
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": 2,
            }
        ),
        use_te=True,
        capability=HOPPER,
    )
    core = type("Core", (), {"num_layers": 4, **settings})
    assert [is_first_last_bf16_layer(core, i) for i in range(4)] == [True, True, False, True]


def test_fusions_follow_transformer_engine(claimed_gpu):
    core = tc.language_transformer_config(run_config())
    assert all(getattr(core, name) for name in FUSIONS) and core.fp8 is None
    assert not tc.language_transformer_config(run_config(bf16=False)).cross_entropy_loss_fusion
    off = tc.language_transformer_config(run_config(gpu=dict.fromkeys(FUSIONS, False)))
    assert not any(getattr(off, name) for name in FUSIONS)
    for part in (tc.vision_transformer_config, tc.projector_transformer_config):
        assert not any(getattr(part(run_config()), name) for name in FUSIONS)


def test_local_layers_get_none_of_it():
    settings = precision.language_settings(run_config(), use_te=False, capability=HOPPER)
    assert settings == dict.fromkeys(FUSIONS, False)


@pytest.mark.parametrize(
    ("recipe", "capability", "says"),
    [
        ("delayed", (8, 0), "needs compute capability 8.9, this GPU has 8.0; leave fp8_format out"),
        ("blockwise", (8, 9), "choose delayed or tensorwise"),
        (
            "mxfp8",
            HOPPER,
            "needs compute capability 10.0, this GPU has 9.0; choose delayed or tensorwise or blockwise",
        ),
        ("mxfp8", (12, 0), "no fp8_recipe mxfp8 for compute capability 12.0"),
        ("delayed", None, "needs Transformer Engine on a GPU"),
    ],
)
def test_a_recipe_the_chip_lacks_is_refused(recipe, capability, says):
    with pytest.raises(ConfigError, match=says):
        precision.language_settings(
            run_config(gpu={**FP8, "fp8_recipe": recipe}), use_te=True, capability=capability
        )


@pytest.mark.parametrize(
    ("recipe", "capability"), [("delayed", (8, 9)), ("blockwise", HOPPER), ("mxfp8", BLACKWELL)]
)
def test_a_recipe_the_chip_has_is_taken(recipe, capability):
    settings = precision.language_settings(
        run_config(gpu={**FP8, "fp8_recipe": recipe}), use_te=True, capability=capability
    )
    assert settings["fp8_recipe"] == recipe


@pytest.mark.parametrize("gpu", [FP8, *({name: True} for name in FUSIONS)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA says")
def test_refused_without_a_gpu(gpu):
    with pytest.raises(ConfigError, match=f"{next(iter(gpu))} needs Transformer Engine"):
        tc.language_transformer_config(run_config(gpu=gpu))


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"bf16": False, "gpu": FP8}, "set train.bf16 too"),
        ({"gpu": {"moe_router_padding_for_fp8": True}}, "set fp8_format"),
        (
            {"gpu": {**FP8, "first_last_layers_bf16": True}},
            "first_last_layers_bf16 does not work with fp8_recipe delayed",
        ),
        (
            {
                "gpu": {
                    **FP8,
                    "fp8_recipe": "tensorwise",
                    "first_last_layers_bf16": True,
                    "num_layers_at_start_in_bf16": 3,
                }
            },
            "3 first and 1 last layers in bf16 leave none of 4",
        ),
        (
            {
                "gpu": {**FP8, "moe_router_padding_for_fp8": True},
                "moe": {"moe_token_dispatcher_type": "allgather"},
            },
            "alltoall or flex",
        ),
        (
            {
                "train": {
                    "bf16": True,
                    "recompute_granularity": "selective",
                    "recompute_modules": ["moe_act"],
                },
                "gpu": FP8,
            },
            "megatron-core cannot recompute moe_act with fp8_recipe delayed",
        ),
        (
            {"gpu": FP8, "language": {"ffn_hidden_size": 344}},
            "ffn_hidden_size / tensor_model_parallel_size is 344",
        ),
        (
            {"gpu": FP8, "parallel": {"tensor_model_parallel_size": 4}},
            "ffn_hidden_size / tensor_model_parallel_size is 88",
        ),
        ({"gpu": {**FP8, "fp8_amax_history_len": 0}}, "must be at least 1"),
        ({"bf16": False, "gpu": {"cross_entropy_loss_fusion": True}}, "set bf16, or leave it out"),
        ({"gpu": {"fp8_format": "e5m2"}}, "fp8_format"),
        ({"gpu": {"fp8_recipe": "custom"}}, "fp8_recipe"),
    ],
)
def test_combinations_that_cannot_be_are_refused(sections, says):
    with pytest.raises(ConfigError, match=says):
        run_config(**sections)


def test_a_recompute_that_would_leave_fp8_is_refused(claimed_gpu):
    recompute = {"bf16": True, "recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    parallel = {"vocab_size": 100, "parallel_residual": True}
    assert not tc.language_transformer_config(run_config(train=recompute, language=parallel)).fp8
    with pytest.raises(ConfigError, match="cannot recompute in FP8"):
        tc.language_transformer_config(run_config(train=recompute, language=parallel, gpu=FP8))


@pytest.mark.parametrize(
    ("gpu", "tp", "multiple"),
    [
        ({}, 1, 1),
        ({}, 2, 2),
        (FP8, 1, 16),
        (FP8, 2, 32),
        ({**FP8, "fp8_recipe": "mxfp8"}, 1, 32),
        ({**FP8, "fp8_recipe": "blockwise"}, 2, 256),
    ],
)
def test_sequences_are_padded_to_whole_rows(gpu, tp, multiple):
    config = run_config(gpu=gpu, parallel={"tensor_model_parallel_size": tp})
    assert precision.sequence_multiple(config) == multiple


def test_a_stage_may_choose_for_itself():
    config = run_config(stages=[{"name": "warmup", "fp8_format": "hybrid"}, {"name": "route"}])
    assert (config.for_stage("warmup").gpu.fp8_format, config.for_stage("route").gpu.fp8_format) == (
        "hybrid",
        None,
    )


def routed_model(**gpu):
    from megatron_evomoe.model.build import build_modules

    config = tiny_config("route")
    topology.seed_everything(1)
    model = build_modules(config, "route")[0].eval()
    for name, value in gpu.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.usefixtures("one_rank")
def test_routers_hold_no_layer_that_fp8_would_take():
    """A router has no linear layer, so FP8 does not change its products.

    FP8 acts on Transformer Engine's linear layers, in whose place these local ones stand.
    """
    model = routed_model()
    routers = [m for name, m in model.named_modules() if name.endswith(".router")]
    assert routers
    for router in routers:
        assert not any(
            isinstance(m, (ColumnParallelLinear, RowParallelLinear, torch.nn.Linear))
            for m in router.modules()
        )


def outputs_and_gradients(**gpu):
    """Output and gradients of the tiny model on two rows, and each expert's number of tokens."""
    model, batch, given = routed_model(**gpu).train(), rows([1, 0], seed=3), []
    for expert in model.language_model.decoder.layers[1].mlp.experts.local_experts:
        expert.register_forward_pre_hook(lambda module, args: given.append(len(args[0])))
    output = model(batch["tokens"], batch["token_types"], batch["images"])
    output.square().mean().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, given


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("by_router", [False, True])
def test_padding_of_experts_changes_no_result(by_router):
    """Without Transformer Engine `fp8` makes megatron-core pad for FP8, but compute in fp32."""
    plain, plain_gradients, plain_given = outputs_and_gradients()
    padded, gradients, given = outputs_and_gradients(
        fp8="hybrid", fp8_recipe="delayed", moe_router_padding_for_quantization=by_router
    )
    assert any(n % 16 for n in plain_given) and not any(n % 16 for n in given)
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)
    assert any(".router." in n for n in gradients) and gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.usefixtures("one_rank")
def test_questions_are_answered_without_fp8():
    from megatron_evomoe.train.decoding import inference

    model = routed_model(fp8="hybrid").train()
    with inference([model]):
        assert model.config.fp8 is model.language_model.decoder.config.fp8 is None and not model.training
    assert model.config.fp8 == "hybrid" and model.training and torch.is_grad_enabled()
