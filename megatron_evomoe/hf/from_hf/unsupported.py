"""Reasons why a model cannot be imported.

Some are known by the model's family (`FAMILIES`), others by fields of its ``config.json`` that stand for
something that megatron-core's model does not compute, whatever the family is called (`_MARKS`).
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

_LEARNED = "it has learned positions instead of RoPE"
_ALIBI = "its positions are biases of the attention (ALiBi) instead of RoPE"
_PAIRS = "its RoPE rotates neighbouring channels, not halves of a head"
_POST_NORM = "its norms come after attention and FFN (post-norm)"
_TILES = "it cuts images into tiles of several resolutions"
_STATES = "it has layers other than attention and FFN"
_MIXTURE = "it is a mixture of experts already; give a dense model"
_Q_FORMER = "it has a Q-Former between vision tower and language model"
_GEMMA = "its embedding is multiplied by the square root of its width, and its norms multiply by 1 + weight"

FAMILIES: dict[str, str] = {
    "gpt_neox": "attention and FFN add to the stream in parallel, each after a norm of its own; QKV is "
    "stored head by head",
    "gptj": f"attention and FFN add to the stream in parallel; {_PAIRS}",
    "codegen": f"parallel residual; {_PAIRS}",
    "falcon": "attention and FFN add to the stream in parallel, and QKV is stored fused",
    "bloom": _ALIBI,
    "mpt": _ALIBI,
    "gpt2": _LEARNED,
    "gpt_neo": _LEARNED,
    "opt": _LEARNED,
    "gpt_bigcode": _LEARNED,
    "biogpt": _LEARNED,
    "olmo": "its norms have no weights (non-parametric LayerNorm)",
    "olmo2": f"{_POST_NORM}, and its norms of queries and keys span all heads",
    "olmo3": f"{_POST_NORM}, its norms of queries and keys span all heads, and its windows hold for some "
    "layers only",
    "exaone4": f"{_POST_NORM}, and some layers have no RoPE",
    "gemma": f"{_GEMMA}; its gate is a tanh GELU",
    "gemma2": f"{_GEMMA}; norms come before and after attention and FFN, logits are soft-capped, every "
    "second layer has a window",
    "gemma3_text": f"{_GEMMA}; norms come before and after attention and FFN; layers alternate windows and "
    "RoPE bases",
    "gemma3": f"{_GEMMA}; layers alternate windows and RoPE bases; its images are pooled to 256 tokens",
    "phi3": "its QKV and its gate and up are stored fused (and the long variants use longrope)",
    "granite": "its embedding, residual branches, attention and logits are multiplied by constants",
    "smollm3": "some of its layers have no RoPE (NoPE)",
    "cohere": f"parallel residual, logits scaled by a constant; {_PAIRS}",
    "cohere2": f"parallel residual, logits scaled by a constant, layers without RoPE; {_PAIRS}",
    "glm": _PAIRS,
    "glm4": f"norms come before and after attention and FFN; {_PAIRS}",
    "helium": _PAIRS,
    "nemotron": "its norms multiply by 1 + weight, and its activation is a squared ReLU",
    "starcoder2": "its FFN has no gate and follows a LayerNorm of its own; such layers have no entry in the "
    "tensor map",
    "qwen": "it needs code from its own repository; use Qwen2 or later",
    "stablelm_epoch": "it needs code from its own repository; use a model of type stablelm",
    "internlm2": "it needs code from its own repository, and QKV is stored fused",
    "baichuan": "it needs code from its own repository, and QKV is stored fused",
    "minicpm": "its embedding, residual branches and logits are multiplied by constants",
    "mamba": _STATES,
    "mamba2": _STATES,
    "falcon_mamba": _STATES,
    "rwkv": _STATES,
    "recurrent_gemma": _STATES,
    "mixtral": _MIXTURE,
    "dbrx": _MIXTURE,
    "jamba": _MIXTURE,
    "olmoe": _MIXTURE,
    "phimoe": _MIXTURE,
    "llama4_text": _MIXTURE,
    "gpt_oss": _MIXTURE,
    "deepseek_v2": f"latent attention; {_MIXTURE}",
    "deepseek_v3": f"latent attention; {_MIXTURE}",
    # whole multimodal models
    "llava_next": _TILES,
    "llava_onevision": _TILES,
    "llava_next_video": f"{_TILES}, and pools the frames of videos",
    "video_llava": "it has a tower for videos",
    "vipllava": "it projects the features of several layers",
    "qwen2_vl": "its RoPE has three axes (M-RoPE), and its tower merges the patches of images of any size",
    "qwen2_5_vl": "its RoPE has three axes (M-RoPE), and its tower merges the patches of images of any size",
    "qwen3_vl": "its RoPE has three axes (M-RoPE), and its tower feeds several layers (deepstack)",
    "paligemma": f"attention is bidirectional over the prompt; {_GEMMA}",
    "mllama": f"cross-attention to images; {_TILES}",
    "idefics2": f"{_TILES} and resamples them",
    "idefics3": f"{_TILES} and shuffles their pixels",
    "smolvlm": f"{_TILES} and shuffles their pixels",
    "internvl": f"{_TILES} and shuffles their pixels",
    "mistral3": "its tower (Pixtral) has a two-dimensional RoPE",
    "pixtral": "it has a two-dimensional RoPE",
    "blip-2": _Q_FORMER,
    "instructblip": _Q_FORMER,
    # towers alone
    "dinov2": "each residual branch is scaled (layer scale), and its positions are interpolated to each "
    "image",
    "dinov2_with_registers": "each residual branch is scaled (layer scale), and it has register tokens",
    "dinov3_vit": "it has RoPE, scales each residual branch and has register tokens",
    "vit": "it has a class token without CLIP's norm before the layers, and an exact GELU",
    "deit": "it has a distillation token",
    "beit": "its positions are biases of the attention",
    "swin": "its attention is windowed",
    "siglip2_vision_model": "its positions are resized to each image",
    "siglip2": "its positions are resized to each image",
    "aimv2_vision_model": "it has RMS norms and gated FFNs",
    "convnext": "it is made of convolutions",
}


def _above(limit: float) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and v > limit


def _not(neutral: float) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and v != neutral


_is_set = bool
_MARKS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), _above(1), _MIXTURE),
    (("kv_lora_rank",), _is_set, "its attention is latent (MLA)"),
    (("use_parallel_residual", "parallel_attn"), _is_set, "attention and FFN add to the stream in parallel"),
    (("alibi", "use_alibi"), _is_set, _ALIBI),
    (("rope_interleaved", "rope_interleave"), _is_set, _PAIRS),
    (
        ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb"),
        _not(1),
        "it multiplies embedding, residual branches or logits by a constant",
    ),
    (("attention_multiplier",), _is_set, "attention is scaled by a constant of its own"),
    (("query_pre_attn_scalar",), _is_set, "attention is scaled by a constant of its own"),
    (("final_logit_softcapping", "attn_logit_softcapping"), _is_set, "logits are soft-capped"),
    (("clip_qkv",), _is_set, "queries, keys and values are clipped"),
    (("no_rope_layers",), lambda v: isinstance(v, list) and not all(v), "some layers have no RoPE"),
    (("image_grid_pinpoints",), _is_set, _TILES),
    (("image_aspect_ratio",), lambda v: isinstance(v, str) and "anyres" in v, _TILES),
    (("mm_patch_merge_type",), lambda v: isinstance(v, str) and v != "flat", _TILES),
    (("spatial_merge_size",), _above(1), "the tower merges patches"),
    (("deepstack_visual_indexes",), _is_set, "the tower feeds several layers"),
    (("cross_attention_layers",), _is_set, "layers attend to the image (cross-attention)"),
    (("is_encoder_decoder",), _is_set, "it is an encoder and a decoder"),
    (("layerscale_value",), _is_set, "each residual branch is scaled (layer scale)"),
)
_ROPES = {
    "yarn": "its RoPE is scaled by yarn, which blends frequencies by wavelength and scales the attention",
    "dynamic": "its RoPE is scaled dynamically: the base grows with the length of each sequence",
    "longrope": "its RoPE is scaled by longrope, which has a factor for each frequency, chosen by the "
    "sequence's length",
    "mrope": "its RoPE has three axes (M-RoPE)",
}
_ROPES |= {"su": _ROPES["longrope"]}


def marks(config: Mapping[str, Any]) -> list[str]:
    """The reasons that fields of a configuration give, each with field and value."""
    found = []
    for keys, says, reason in _MARKS:
        found += [
            f"{reason} ({key} = {reprlib.repr(config[key])})"
            for key in keys
            if key in config and says(config[key])
        ]
    return found


def rope_reason(rope: Mapping[str, Any]) -> str | None:
    """The reason why the RoPE of a configuration is not supported; None if it is, or if none is known."""
    kind = rope.get("rope_type", rope.get("type"))
    return (
        _ROPES["mrope"] if rope.get("mrope_section") else _ROPES.get(kind) if isinstance(kind, str) else None
    )


def against(config: Mapping[str, Any]) -> list[str]:
    """All known reasons why a configuration cannot be imported, by its family and by its fields."""
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    found = [family] if family else []
    if not family and isinstance(kind, str) and "moe" in kind:
        found.append(_MIXTURE)
    for part in (config, *(config.get(key) for key in ("text_config", "llm_config", "vision_config"))):
        if isinstance(part, dict):
            ropes = [
                part[key] for key in ("rope_scaling", "rope_parameters") if isinstance(part.get(key), dict)
            ]
            found += [
                mark for mark in (*marks(part), *filter(None, map(rope_reason, ropes))) if mark not in found
            ]
    return found
