"""config.json to our sections: transformers' defaults, both spellings of RoPE, and refusals by name."""

from __future__ import annotations

import pytest

from megatron_evomoe.config import ConfigError
from megatron_evomoe.hf.config_in import TEXT_DEFAULTS, VISION_DEFAULTS, language_section, llava_sections, vision_section
from megatron_evomoe.presets import LANGUAGE_PRESETS, VISION_PRESETS

# what the repositories on the hub say, as far as it is not a default
PUBLISHED = {
    "qwen2-0.5b": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
                   "num_hidden_layers": 24, "num_key_value_heads": 2, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
                   "rope_theta": 1000000.0, "sliding_window": 131072, "max_window_layers": 24, "use_sliding_window": False,
                   "tie_word_embeddings": True, "vocab_size": 151936},
    "stablelm-2-1.6b": {"model_type": "stablelm", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
                        "num_attention_heads": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "rope_theta": 10000,
                        "layer_norm_eps": 1e-5, "use_qkv_bias": True, "vocab_size": 100352, "max_position_embeddings": 4096},
    "phi-2": {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
              "num_attention_heads": 32, "partial_rotary_factor": 0.4, "vocab_size": 51200, "rope_theta": 10000.0,
              "hidden_act": "gelu_new", "qk_layernorm": False},
    "openchat-7b": {"model_type": "mistral", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "vocab_size": 32002,
                    "sliding_window": 4096},
}
TOWERS = {
    "clip-l-336": {"model_type": "clip", "text_config": {"hidden_size": 768}, "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "image_size": 336,
        "patch_size": 14}},
    "siglip-l-384": {"model_type": "siglip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                     "num_hidden_layers": 24, "image_size": 384, "patch_size": 16},
}


def without_nothing(section):
    return {k: v for k, v in section.items() if v is not None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_give_their_presets(name):
    assert without_nothing(language_section(PUBLISHED[name])) == {
        **({"tie_word_embeddings": False} if "tie_word_embeddings" not in LANGUAGE_PRESETS[name] else {}), **LANGUAGE_PRESETS[name]}


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
        elif value is not None:  # none: as many as there are heads
            assert getattr(theirs, key) == value, key


ROPES = [
    ({"rope_theta": 5e5}, {"rotary_base": 500000}),
    ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rotary_base": 500000}),
    ({"rope_scaling": None}, {"rotary_base": 10000}),
    ({"rope_scaling": {"type": "linear", "factor": 4}},
     {"rotary_base": 10000, "rope_scaling_type": "linear", "rope_scaling_factor": 4.0}),
    ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                          "original_max_position_embeddings": 8192}},
     {"rotary_base": 500000, "rope_scaling_type": "llama3", "rope_scaling_factor": 32.0}),
    ({"partial_rotary_factor": 0.5}, {"rotary_base": 10000, "rotary_percent": 0.5}),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {"rotary_base": 10000, "rotary_percent": 0.5}),
]


@pytest.mark.parametrize(("given", "expected"), ROPES)
def test_rope_in_both_spellings(given, expected):
    section = language_section({"model_type": "llama", **given})
    assert {k: v for k, v in section.items() if "rot" in k or "rope" in k} == expected


LLAMA = {"model_type": "llama"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED = [
    ({"model_type": "gemma2"}, "gemma2.*soft-capped.*llama, mistral"),
    ({"model_type": "mixtral"}, "mixtral.*mixture already"),
    ({"model_type": "qwen2_moe"}, "qwen2_moe.*mixture already"),
    ({"model_type": "qwen"}, "'qwen'.*remote"),
    ({}, "None cannot be imported as a language model"),
    ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'.*linear and llama3"),
    ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type = 'dynamic'"),
    ({**LLAMA, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 4096}},
     "original_max_position_embeddings = 4096.*8192"),
    ({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "share one RoPE"),
    ({**LLAMA, "rope_theta": 10000.5}, "rope_theta = 10000.5"),
    ({**LLAMA, "attention_bias": True}, r"attention_bias, mlp_bias = \(True, None\)"),
    ({**LLAMA, "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, "gptq.*unquantised"),
    ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window = True"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
    ({"model_type": "stablelm", "use_parallel_residual": True}, "use_parallel_residual = True"),
    ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm = True"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_language_models_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=message):
        language_section(config)


CLIP = {"model_type": "clip_vision_model"}


@pytest.mark.parametrize(("config", "message"), [
    ({"model_type": "siglip2_vision_model"}, "siglip2_vision_model.*resized"),
    ({"model_type": "dinov2"}, "dinov2.*vision tower"),
    ({**CLIP, "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}, "image_size = 384.*patch_size"),
])
def test_towers_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=message):
        vision_section(config)


@pytest.mark.parametrize(("config", "message"), [
    ({"vision_feature_layer": [-2, -5]}, "one layer"),
    ({"vision_feature_select_strategy": "pool"}, "pool"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
    ({"vision_config": {"model_type": "siglip_vision_model"}}, "SigLIP's first patch"),
    ({"model_type": "llava_llama"}, "mm_projector_type = 'linear'"),
    ({"model_type": "llava_llama", "mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
])
def test_llava_models_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=message):
        llava_sections({"model_type": "llava", **config})


def test_llava_15_as_published():
    """Everything the hub's config.json leaves out is a default."""
    language, vision = llava_sections({
        "model_type": "llava", "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                                               "vocab_size": 32064},
        "vision_config": TOWERS["clip-l-336"]["vision_config"] | CLIP, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"})
    assert (language["num_layers"], language["hidden_size"], language["vocab_size"]) == (32, 4096, 32064)
    assert vision == {**VISION_PRESETS["clip-l-336"], "feature_select": "patch"}
