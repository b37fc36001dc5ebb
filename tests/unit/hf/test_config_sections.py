"""config.json to our sections: transformers' defaults, both spellings of RoPE, named refusals."""

from __future__ import annotations

import pytest

from megatron_evomoe.config import ConfigError
from megatron_evomoe.config.presets import LANGUAGE_PRESETS, VISION_PRESETS
from megatron_evomoe.hf.from_hf.config_defaults import TEXT_DEFAULTS, VISION_DEFAULTS
from megatron_evomoe.hf.from_hf.config_sections import (
    language_section,
    llava_sections,
    vision_section,
)

# What the repositories on the hub state, except for defaults.
PUBLISHED = {
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "max_window_layers": 24,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "stablelm-2-1.6b": {
        "model_type": "stablelm",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000,
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": True,
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
    },
    "phi-2": {
        "model_type": "phi",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "partial_rotary_factor": 0.4,
        "vocab_size": 51200,
        "rope_theta": 10000.0,
        "hidden_act": "gelu_new",
        "qk_layernorm": False,
    },
    "openchat-7b": {
        "model_type": "mistral",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32002,
        "sliding_window": 4096,
    },
}
TOWERS = {
    "clip-l-336": {
        "model_type": "clip",
        "text_config": {"hidden_size": 768},
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "image_size": 336,
            "patch_size": 14,
        },
    },
    "siglip-l-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "image_size": 384,
        "patch_size": 16,
    },
}


def without_nothing(section):
    return {k: v for k, v in section.items() if v is not None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_give_their_presets(name):
    assert without_nothing(language_section(PUBLISHED[name])) == {
        **({"tie_word_embeddings": False} if "tie_word_embeddings" not in LANGUAGE_PRESETS[name] else {}),
        **LANGUAGE_PRESETS[name],
    }


@pytest.mark.parametrize("name", TOWERS)
def test_published_towers_give_their_presets(name):
    assert {**vision_section(TOWERS[name]), "feature_layer": -2} == VISION_PRESETS[name]


@pytest.mark.parametrize("kind", [*TEXT_DEFAULTS, *VISION_DEFAULTS])
def test_defaults_are_those_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(kind)
    for key, value in (TEXT_DEFAULTS.get(kind) or VISION_DEFAULTS[kind]).items():
        if key == "partial_rotary_factor" and not hasattr(theirs, key):
            assert theirs.rope_parameters[key] == value
        # None means as many key-value heads as there are attention heads.
        elif value is not None:
            assert getattr(theirs, key) == value, key


ROPES = [
    ({"rope_theta": 5e5}, {"rotary_base": 500000}),
    ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rotary_base": 500000}),
    ({"rope_scaling": None}, {"rotary_base": 10000}),
    (
        {"rope_scaling": {"type": "linear", "factor": 4}},
        {"rotary_base": 10000, "rope_scaling_type": "linear", "rope_scaling_factor": 4.0},
    ),
    (
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {"rotary_base": 500000, "rope_scaling_type": "llama3", "rope_scaling_factor": 32.0},
    ),
    ({"model_type": "phi", "partial_rotary_factor": 0.75}, {"rotary_base": 10000, "rotary_percent": 0.75}),
    (
        {"model_type": "stablelm", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rotary_base": 10000, "rotary_percent": 0.5},
    ),
    ({"partial_rotary_factor": 1.0, "rope_theta": None}, {"rotary_base": 10000}),
]


@pytest.mark.parametrize(("given", "expected"), ROPES)
def test_rope_in_both_spellings(given, expected):
    section = language_section({"model_type": "llama", **given})
    assert {k: v for k, v in section.items() if "rot" in k or "rope" in k} == expected


LLAMA = {"model_type": "llama"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED = [
    ({"model_type": "gemma2"}, "gemma2.*soft-capped.*llama, mistral"),
    ({"model_type": "mixtral"}, "mixtral.*mixture of experts already"),
    ({"model_type": "qwen2_moe"}, "qwen2_moe.*mixture of experts already"),
    ({"model_type": "qwen"}, "'qwen'.*its own repository"),
    ({}, "None cannot be imported as a language model"),
    ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'.*linear and llama3"),
    ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type = 'dynamic'"),
    (
        {**LLAMA, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 4096}},
        "original_max_position_embeddings = 4096.*8192",
    ),
    ({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "have the same RoPE"),
    ({**LLAMA, "rope_theta": 10000.5}, "rope_theta = 10000.5"),
    ({**LLAMA, "attention_bias": True}, r"attention_bias, mlp_bias = \(True, None\)"),
    ({**LLAMA, "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, "gptq.*unquantised"),
    ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window = True"),
    (
        {
            "model_type": "qwen3",
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "give none",
    ),
    ({"model_type": "stablelm", "use_parallel_residual": True}, "use_parallel_residual = True"),
    ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm = True"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_language_models_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=message):
        language_section(config)


QWEN = {"model_type": "qwen2", "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 32}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("given", "window"),
    [
        ({"max_window_layers": 4}, None),
        ({"max_window_layers": 28}, None),
        ({}, None),
        ({"layer_types": [FULL] * 4}, None),
        ({"max_window_layers": 0, "sliding_window": None}, None),
        ({"max_window_layers": 0}, 32),
        ({"layer_types": [SLIDING] * 4}, 32),
        ({"max_window_layers": 1}, "3 of 4 layers"),
        ({"max_window_layers": 3}, "1 of 4 layers"),
        ({"layer_types": [FULL, SLIDING] * 2}, "2 of 4 layers"),
        ({"layer_types": [SLIDING] * 3}, "each of 4 layers"),
        ({"layer_types": [SLIDING] * 4, "use_sliding_window": False}, "give none"),
        ({"layer_types": ["chunked_attention"] * 4}, "each of 4 layers"),
        ({"layer_types": {}}, "must be a list"),
        ({"layer_types": [[]] * 4}, "each of 4 layers"),
        ({"max_window_layers": "4"}, "whole number"),
    ],
)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_hold_for_all_layers_or_for_none(kind, given, window):
    config = {**QWEN, "model_type": kind, **given}
    if isinstance(window, str):
        with pytest.raises(ConfigError, match=window):
            language_section(config)
    else:
        assert language_section(config).get("window_size") == window
        assert [kind == SLIDING for kind in _of_transformers(config)] == [window is not None] * 4


def _of_transformers(config):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoConfig.for_model(**config).layer_types


@pytest.mark.parametrize("kind", TEXT_DEFAULTS)
@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", ["4096", 4096.0, True, 0, -1, None, [4096], {}, 2**31, 10**400])
def test_sizes_are_whole_numbers(kind, key, value):
    with pytest.raises(ConfigError, match=rf"{kind} with {key} = .*: it must be a whole number from 1 to"):
        language_section({"model_type": kind, key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rms_norm_eps", "1e-5", "a number from 0 to 1"),
        ("rms_norm_eps", float("nan"), "a number"),
        ("rms_norm_eps", None, "a number"),
        ("rope_theta", "10000", "a number from 1"),
        ("rope_theta", False, "a number from 1"),
        ("rope_theta", float("inf"), "a number from 1"),
        ("tie_word_embeddings", "false", "true or false"),
        ("attention_bias", 1, "true or false"),
        ("hidden_act", None, "only 'silu'"),
        ("hidden_act", ["silu"], "only 'silu'"),
        ("rope_scaling", "linear", "a mapping"),
        ("rope_scaling", {"type": "linear"}, "factor = None"),
        ("rope_scaling", {"type": "linear", "factor": "2"}, "factor = '2'"),
        ("rope_scaling", {"type": ["linear"]}, "rope_type"),
        ("rope_parameters", [1], "a mapping"),
        ("quantization_config", "int8", "a mapping"),
        ("quantization_config", {"bits": 4}, "unquantised"),
        ("num_attention_heads", 3, "hidden_size = 4096.*must be a multiple of num_attention_heads"),
        ("num_key_value_heads", 5, "must be a multiple"),
        ("head_dim", 0, "whole number"),
        ("head_dim", 3, "number must be even"),
        ("partial_rotary_factor", 0.5, "rotates whole heads"),
        ("num_hidden_layers", 10**6, "from 1 to 4096"),
    ],
)
def test_values_of_other_types_are_named(key, value, message):
    with pytest.raises(ConfigError, match=message):
        language_section({"model_type": "llama", key: value})


@pytest.mark.parametrize("value", [None, {}])
@pytest.mark.parametrize("key", ["quantization_config", "rope_scaling", "rope_parameters"])
def test_a_section_of_nothing_is_nothing(key, value):
    assert language_section({"model_type": "llama", key: value}) == language_section({"model_type": "llama"})


def test_both_spellings_of_rope_must_agree():
    linear = {"rope_type": "linear", "factor": 2.0}
    config = {"model_type": "llama", "rope_scaling": linear, "rope_parameters": linear}
    assert language_section(config)["rope_scaling_factor"] == 2.0
    with pytest.raises(ConfigError, match="it contradicts rope_parameters"):
        language_section({**config, "rope_parameters": {"rope_type": "default"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_freq_factor": None}, "low_freq_factor = None"),
        ({"high_freq_factor": 2.0}, "high_freq_factor = 2.0.*4 built in"),
        # transformers uses this value where the file does not give one.
        (
            {},
            "original_max_position_embeddings = 2048.*8192",
        ),
    ],
)
def test_a_llama3_rope_of_other_numbers_is_named(change, message):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **change}
    with pytest.raises(ConfigError, match=message):
        language_section({"model_type": "llama", "rope_scaling": rope})


CLIP = {"model_type": "clip_vision_model"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "siglip2_vision_model"}, "siglip2_vision_model.*resized"),
        ({"model_type": "dinov2"}, "dinov2.*vision tower"),
        ({**CLIP, "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (
            {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
            "image_size = 384.*patch_size",
        ),
    ],
)
def test_towers_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=message):
        vision_section(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vision_feature_layer": [-2, -5]}, "one layer"),
        ({"vision_feature_layer": "-2"}, "one layer"),
        ({"vision_feature_layer": True}, "one layer"),
        ({"text_config": "llama"}, "text_config.*a mapping"),
        ({"vision_config": [3]}, "vision_config.*a mapping"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes.*unquantised"),
        ({"vision_config": {"quantization_config": {"quant_method": "awq"}}}, "awq.*unquantised"),
        ({"vision_config": {"image_size": "336"}}, "image_size = '336'.*whole number"),
        ({"vision_config": {"num_channels": 1}}, "num_channels = 1"),
        (
            {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "anyres"},
            "tiles.*anyres",
        ),
        (
            {
                "model_type": "llava_llama",
                "mm_projector_type": "mlp2x_gelu",
                "mm_patch_merge_type": "spatial_unpad",
            },
            "tiles",
        ),
        (
            {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": True},
            "around each image",
        ),
        ({"vision_feature_select_strategy": "pool"}, "pool"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "SigLIP's first patch"),
        ({"model_type": "llava_llama"}, "mm_projector_type = 'linear'"),
        ({"model_type": "llava_llama", "mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
    ],
)
def test_llava_models_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=message):
        llava_sections({"model_type": "llava", **config})


def test_llava_15_as_published():
    """Everything that the hub's config.json leaves out is a default."""
    language, vision = llava_sections(
        {
            "model_type": "llava",
            "text_config": {
                "model_type": "llama",
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "vocab_size": 32064,
            },
            "vision_config": TOWERS["clip-l-336"]["vision_config"] | CLIP,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
        }
    )
    assert (language["num_layers"], language["hidden_size"], language["vocab_size"]) == (32, 4096, 32064)
    assert vision == {**VISION_PRESETS["clip-l-336"], "feature_select": "patch"}


def test_sections_of_null_are_those_of_transformers():
    """Sections that are null or empty get the values that transformers gives them.

    A null tower is CLIP-L/336 and an empty one is CLIP's default; a null or empty language model is Llama's
    default.
    """
    transformers = pytest.importorskip("transformers")
    for config in (
        {},
        {"text_config": None, "vision_config": None},
        {"text_config": {}, "vision_config": {}},
    ):
        language, vision = llava_sections({"model_type": "llava", **config})
        theirs = transformers.LlavaConfig(**config)
        assert language == language_section(theirs.text_config.to_dict())
        assert vision == {
            **vision_section(theirs.vision_config.to_dict()),
            "feature_layer": -2,
            "feature_select": "patch",
        }
    assert llava_sections({"model_type": "llava", "vision_feature_layer": [-2]}) == llava_sections(
        {"model_type": "llava"}
    )
