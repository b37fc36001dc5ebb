"""Named model shapes: values for the `language` and `vision` sections of a configuration.

A preset is a language model with the paper's vision tower, CLIP-L/336; ``NAME+TOWER`` is the same with
another tower of `VISION_PRESETS` (``qwen-1.8b+siglip-l-384``). Values of the configuration's own `language`
and `vision` sections override the preset's. ``vocab_size`` is that of the published model and includes the
padding of its embedding. The source of each preset is the ``config.json`` of the named repository on Hugging
Face.
"""

from __future__ import annotations

from typing import Any

LANGUAGE_PRESETS: dict[str, dict[str, Any]] = {
    # Qwen/Qwen2-0.5B
    "qwen2-0.5b": {
        "num_layers": 24,
        "hidden_size": 896,
        "ffn_hidden_size": 4864,
        "num_attention_heads": 14,
        "num_query_groups": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 131072,
        "norm_epsilon": 1e-6,
        "add_qkv_bias": True,
        "rotary_base": 1000000,
        "tie_word_embeddings": True,
    },
    # stabilityai/stablelm-2-1_6b
    "stablelm-2-1.6b": {
        "num_layers": 24,
        "hidden_size": 2048,
        "ffn_hidden_size": 5632,
        "num_attention_heads": 32,
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
        "normalization": "LayerNorm",
        "norm_epsilon": 1e-5,
        "add_qkv_bias": True,
        "rotary_base": 10000,
        "rotary_percent": 0.25,
        "tie_word_embeddings": False,
    },
    # Qwen/Qwen-1_8B; its intermediate_size 11008 counts gate and value together
    "qwen-1.8b": {
        "num_layers": 24,
        "hidden_size": 2048,
        "ffn_hidden_size": 5504,
        "num_attention_heads": 16,
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
        "norm_epsilon": 1e-6,
        "add_qkv_bias": True,
        "rotary_base": 10000,
        "tie_word_embeddings": False,
    },
    # microsoft/phi-2
    "phi-2": {
        "num_layers": 32,
        "hidden_size": 2560,
        "ffn_hidden_size": 10240,
        "num_attention_heads": 32,
        "vocab_size": 51200,
        "max_position_embeddings": 2048,
        "normalization": "LayerNorm",
        "norm_epsilon": 1e-5,
        "activation": "gelu_tanh",
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "parallel_residual": True,
        "lm_head_bias": True,
        "rotary_base": 10000,
        "rotary_percent": 0.4,
        "tie_word_embeddings": False,
    },
    # openchat/openchat_3.5: Mistral-7B-v0.1 and two more tokens
    "openchat-7b": {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "vocab_size": 32002,
        "max_position_embeddings": 8192,
        "norm_epsilon": 1e-5,
        "rotary_base": 10000,
        "window_size": 4096,
        "tie_word_embeddings": False,
    },
}

VISION_PRESETS: dict[str, dict[str, Any]] = {
    # openai/clip-vit-large-patch14-336
    "clip-l-336": {
        "model_type": "clip",
        "image_size": 336,
        "patch_size": 14,
        "hidden_size": 1024,
        "num_layers": 24,
        "num_attention_heads": 16,
        "ffn_hidden_size": 4096,
        "norm_epsilon": 1e-5,
        "feature_layer": -2,
    },
    # google/siglip-large-patch16-384
    "siglip-l-384": {
        "model_type": "siglip",
        "image_size": 384,
        "patch_size": 16,
        "hidden_size": 1024,
        "num_layers": 24,
        "num_attention_heads": 16,
        "ffn_hidden_size": 4096,
        "norm_epsilon": 1e-6,
        "feature_layer": -2,
    },
    # google/siglip-so400m-patch14-224; the 384-pixel one cuts 6 pixels off (384 = 27 * 14 + 6), which the
    # core refuses
    "siglip-so400m-224": {
        "model_type": "siglip",
        "image_size": 224,
        "patch_size": 14,
        "hidden_size": 1152,
        "num_layers": 27,
        "num_attention_heads": 16,
        "ffn_hidden_size": 4304,
        "norm_epsilon": 1e-6,
        "feature_layer": -2,
    },
}

DEFAULT_VISION = "clip-l-336"

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # the dataclasses' own sizes; weights as large as such small widths need
    "tiny": {"language": {"init_method_std": 0.06}, "vision": {"init_method_std": 0.1}},
    **{
        name: {"language": language, "vision": VISION_PRESETS[DEFAULT_VISION]}
        for name, language in LANGUAGE_PRESETS.items()
    },
    **{
        f"{name}+{tower}": {"language": language, "vision": vision}
        for name, language in LANGUAGE_PRESETS.items()
        for tower, vision in VISION_PRESETS.items()
        if tower != DEFAULT_VISION
    },
}
