"""Tiny random transformers models of every architecture that can be imported, saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB, IMAGE_TOKEN, HIDDEN, SIDE, PATCHES = 139, 138, 64, 16, 4

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# name: (class of the language model's configuration, its arguments)
LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "llama3": ("LlamaConfig", {"num_key_value_heads": 2, "rope_theta": 500000.0, "rope_scaling": _LLAMA3}),
    "llama-linear": ("LlamaConfig", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2, "rope_theta": 1e6}),
    "qwen2-tied": ("Qwen2Config", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
    "qwen3-no-window": (
        "Qwen3Config",
        {"num_key_value_heads": 2, "head_dim": 24, "use_sliding_window": True, "sliding_window": 6},
    ),
    "llama-one-layer": ("LlamaConfig", {"num_hidden_layers": 1}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 24}),
    "stablelm": ("StableLmConfig", {"num_key_value_heads": 4, "use_qkv_bias": True}),
    "stablelm-unbiased": ("StableLmConfig", {"num_key_value_heads": 2, "use_qkv_bias": False}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
}

# name: (language model, vision tower, arguments of LlavaConfig)
LLAVA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": ("llama", "clip", {}),
    "llava-mistral-class-token": ("mistral", "clip", {"vision_feature_select_strategy": "full"}),
    "llava-qwen2-siglip": (
        "qwen2-tied",
        "siglip",
        {"vision_feature_select_strategy": "full", "tie_word_embeddings": True},
    ),
    "llava-phi-last-layer": (
        "phi",
        "siglip",
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
}


def randomised(module: torch.nn.Module, seed: int = 7) -> torch.nn.Module:
    """Scale matrices up, so that softmaxes are not flat, and move norms and biases away from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:  # a large bias of the output layer would make all answers the same
                scale = 0.02 if name == "lm_head.bias" else 0.3
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
    return module.eval()


def language_config(name: str) -> Any:
    """transformers' configuration of a language model."""
    import transformers

    kind, arguments = LANGUAGE[name]
    return getattr(transformers, kind)(**{**TEXT, **arguments})


def tower_config(kind: str) -> Any:
    """transformers' configuration of a vision tower."""
    import transformers

    return getattr(transformers, {"clip": "CLIPVisionConfig", "siglip": "SiglipVisionConfig"}[kind])(**TOWER)


def language_model(name: str) -> Any:
    """A random decoder with its output layer."""
    import transformers

    return randomised(
        transformers.AutoModelForCausalLM.from_config(language_config(name), attn_implementation="eager")
    )


def tower(kind: str) -> Any:
    """A random vision tower alone."""
    import transformers

    model = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}[kind]
    return randomised(getattr(transformers, model)(tower_config(kind)))


def llava(name: str) -> Any:
    """A random LLaVA model: vision tower, projector and language model."""
    import transformers

    text, kind, arguments = LLAVA[name]
    config = transformers.LlavaConfig(
        text_config=language_config(text),
        vision_config=tower_config(kind),
        image_token_index=IMAGE_TOKEN,
        attn_implementation="eager",
        **arguments,
    )
    return randomised(transformers.LlavaForConditionalGeneration(config))


def save(model: Any, folder: Path) -> Path:
    """Save a model with transformers' own function."""
    model.save_pretrained(folder)
    return folder
