"""Model families that cannot be imported: each refusal names what is not supported.

The configurations are those of transformers itself.
"""

from __future__ import annotations

import pytest

from megatron_evomoe.config import ConfigError
from megatron_evomoe.hf.from_hf.config_defaults import TEXT_DEFAULTS, VISION_DEFAULTS
from megatron_evomoe.hf.from_hf.config_sections import (
    language_section,
    vision_section,
)
from megatron_evomoe.hf.from_hf.importing import Request, import_model
from megatron_evomoe.hf.from_hf.unsupported import against, marks
from tests.unit.hf.sources import TEXT, write

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")

DECODERS = {
    "gpt_neox": "in parallel, each after a norm",
    "olmo": "no weights",
    "olmo2": "post-norm",
    "gemma": "root of its width.*1 \\+ weight",
    "gemma2": "soft-capped",
    "gemma3_text": "alternate windows",
    "phi3": "stored fused",
    "granite": "constant",
    "smollm3": "NoPE",
    "cohere": "neighbouring channels",
    "glm": "neighbouring channels",
    "falcon": "in parallel",
    "bloom": "ALiBi",
    "gpt2": "learned positions",
    "opt": "learned positions",
    "starcoder2": "no gate",
    "nemotron": "squared ReLU",
    "mixtral": "mixture of experts already",
    "qwen2_moe": "mixture of experts already",
    "qwen3_moe": "mixture of experts already",
    "deepseek_v3": "latent.*mixture",
    "mamba": "attention and FFN",
}
TOWERS = {
    "dinov2": "layer scale",
    "dinov2_with_registers": "register",
    "vit": "class token",
    "siglip2_vision_model": "resized",
    "beit": "biases",
    "swin": "windowed",
}
WHOLE = {
    "llava_next": "tiles",
    "llava_onevision": "tiles",
    "llava_next_video": "tiles",
    "video_llava": "videos",
    "vipllava": "several layers",
    "qwen2_vl": "M-RoPE",
    "qwen2_5_vl": "M-RoPE",
    "paligemma": "bidirectional",
    "mllama": "cross",
    "idefics3": "tiles",
    "gemma3": "windows",
    "instructblip": "Q-Former",
}


def described(kind: str) -> dict:
    return transformers.AutoConfig.for_model(kind).to_dict()


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_are_refused_with_the_reason(kind):
    with pytest.raises(
        ConfigError,
        match=f"'{kind}' cannot be imported as a language model: .*{DECODERS[kind]}.*these can: llama",
    ):
        language_section(described(kind))


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_are_refused_with_the_reason(kind):
    with pytest.raises(
        ConfigError, match=f"'{kind}' cannot be imported as a vision tower: .*{TOWERS[kind]}.*these can: clip"
    ):
        vision_section(described(kind))


@pytest.mark.parametrize("kind", [*WHOLE, "gpt_neox", "dinov2"])
def test_whole_models_are_refused_with_the_reason(tmp_path, kind):
    reason = {**WHOLE, **DECODERS, **TOWERS}[kind]
    write(tmp_path / "hf", described(kind), {})
    with pytest.raises(
        ConfigError, match=f"hf: model_type '{kind}' cannot be imported as a LLaVA model: .*{reason}"
    ):
        import_model(Request(model=str(tmp_path / "hf"), output=str(tmp_path / "out")))


@pytest.mark.parametrize("kind", [*TEXT_DEFAULTS, *VISION_DEFAULTS])
def test_nothing_is_said_against_what_is_taken(kind):
    assert against(described(kind)) == []


MARKS = [
    ({"num_local_experts": 8}, "mixture of experts already.*num_local_experts = 8"),
    ({"embedding_multiplier": 12.0}, "constant.*= 12.0"),
    ({"logits_scaling": 8}, "constant.*logits_scaling = 8"),
    ({"attention_multiplier": 0.01}, "scaled by a constant of its own"),
    ({"final_logit_softcapping": 30.0}, "soft-capped"),
    ({"clip_qkv": 8.0}, "clipped"),
    ({"no_rope_layers": [1, 0]}, "no RoPE"),
    ({"parallel_attn": True}, "in parallel"),
    ({"use_parallel_residual": True}, "in parallel"),
    ({"alibi": True}, "ALiBi"),
    ({"rope_interleaved": True}, "neighbouring channels"),
    ({"kv_lora_rank": 512}, "latent"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "longrope, which has a factor"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "M-RoPE"),
    ({"is_encoder_decoder": True}, "decoder"),
]


@pytest.mark.parametrize(("mark", "message"), MARKS)
def test_marks_count_whatever_the_family(mark, message):
    for kind in ("unheard_of", "llama"):
        with pytest.raises(ConfigError, match=message):
            language_section({**TEXT, "model_type": kind, **mark})
    with pytest.raises(ConfigError, match=message):
        vision_section({"model_type": "unheard_of", "text_config": mark})


@pytest.mark.parametrize("value", [None, True, "x", [], [[]], {}, {"a": {}}, -1, 0, 1, 1e300, float("nan")])
def test_marks_of_any_json_are_survived(value):
    keys = {key for config, _ in MARKS for key in config} | {
        "mm_patch_merge_type",
        "image_aspect_ratio",
        "spatial_merge_size",
    }
    for key in keys:
        assert isinstance(marks({key: value}), list)
        assert isinstance(against({"model_type": value, "text_config": value, key: value}), list)
