"""A Hugging Face ``config.json`` in our words, or a refusal that names what megatron-core cannot compute.

A config.json leaves out what equals its class's default, so those defaults are part of the format; they are
transformers', and `tests/unit/hf/test_config_in.py` compares them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_evomoe.config import ConfigError
from megatron_evomoe.hf.from_hf import unsupported
from megatron_evomoe.hf.from_hf.config_values import Given, refuse

_ROPE_DEFAULT = 10000.0
_LLAMA_LIKE = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        **_LLAMA_LIKE,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        **_LLAMA_LIKE,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        **_LLAMA_LIKE,
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        **_LLAMA_LIKE,
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
    "stablelm": {
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "partial_rotary_factor": 0.25,
    },
    "phi": {
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5,
    },
}
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
LLAVA_TYPES = (
    "llava",
    "llava_llama",
    "llava_mistral",
    "llava_qwen2",
    "llava_qwen",
    "llava_phi",
    "llava_stablelm",
)
"""`llava` is transformers'; the others are what LLaVA's own code and its forks wrote."""

_WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
"""Defaults of Qwen2 and Qwen3, where the windows of the layers from `max_window_layers` on are switched by
the first of these.
"""
_LLAVAS_TOWER = {
    **VISION_DEFAULTS["clip_vision_model"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "model_type": "clip_vision_model",
}
"""The tower that transformers' LLaVA has where its configuration has none."""
_MOST_LAYERS = 4096


def language_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `language` section for the configuration of a decoder.

    Raises:
        ConfigError: an architecture or setting that megatron-core cannot express, or a value of another type;
            the message names it and its value.
    """
    kind = _known_kind(config, TEXT_DEFAULTS, "language model")
    c = Given(kind, config, {**TEXT_DEFAULTS[kind], **(_WINDOWED if kind.startswith("qwen") else {})})
    _refuse_text(kind, c, config)
    layers, width, heads = (
        c.size("num_hidden_layers", _MOST_LAYERS),
        c.size("hidden_size"),
        c.size("num_attention_heads"),
    )
    groups, head = c.optional_size("num_key_value_heads") or heads, c.optional_size("head_dim")
    if head is None and width % heads:
        c.refuse(
            "hidden_size", f"it is no multiple of num_attention_heads ({heads}), and head_dim is not given"
        )
    if heads % groups:
        c.refuse("num_key_value_heads", f"num_attention_heads ({heads}) is no multiple of it")
    head = head or width // heads
    section = {
        "num_layers": layers,
        "hidden_size": width,
        "ffn_hidden_size": c.size("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": None if groups == heads else groups,
        "kv_channels": None if head * heads == width else head,
        "vocab_size": c.size("vocab_size"),
        "max_position_embeddings": c.size("max_position_embeddings"),
        "tie_word_embeddings": c.flag("tie_word_embeddings"),
        "norm_epsilon": c.number("layer_norm_eps" if kind in ("stablelm", "phi") else "rms_norm_eps", 0, 1),
        **_rope(kind, c, head),
    }
    if kind == "mistral":
        section["window_size"] = c.optional_size("sliding_window")
    elif kind == "qwen2":
        section |= {"add_qkv_bias": True, **_window(c, layers)}
    elif kind == "qwen3":
        section |= {"qk_layernorm": True, **_window(c, layers)}
    elif kind == "stablelm":
        section |= {"normalization": "LayerNorm", "add_qkv_bias": c.flag("use_qkv_bias")}
    elif kind == "phi":
        section |= {
            "normalization": "LayerNorm",
            "activation": "gelu_tanh",
            "gated_linear_unit": False,
            "add_bias_linear": True,
            "parallel_residual": True,
            "lm_head_bias": True,
        }
    elif c.flag("attention_bias"):
        section["add_bias_linear"] = True
    return section


def vision_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `vision` section for the configuration of a tower, or of the CLIP or SigLIP model it is half of.

    Raises:
        ConfigError: as `language_section`.
    """
    if config.get("model_type") in ("clip", "siglip") and "vision_config" in config:
        half = Given(config["model_type"], config, {}).section("vision_config")
        config = {"model_type": f"{config['model_type']}_vision_model", **half}
    kind = _known_kind(config, VISION_DEFAULTS, "vision tower")
    c = Given(kind, config, {**VISION_DEFAULTS[kind], "num_channels": 3})
    _refuse_quantised(c)
    c.expect("hidden_act", VISION_DEFAULTS[kind]["hidden_act"])
    c.expect("num_channels", 3)
    side, patch, width, heads = (
        c.size(x) for x in ("image_size", "patch_size", "hidden_size", "num_attention_heads")
    )
    if side % patch:
        c.refuse(
            "image_size",
            f"megatron-core takes multiples of patch_size ({patch}) only; a published tower cuts the rest "
            "off",
        )
    if width % heads:
        c.refuse("hidden_size", f"it is no multiple of num_attention_heads ({heads})")
    return {
        "model_type": kind.split("_")[0],
        "image_size": side,
        "patch_size": patch,
        "hidden_size": width,
        "num_layers": c.size("num_hidden_layers", _MOST_LAYERS),
        "num_attention_heads": heads,
        "ffn_hidden_size": c.size("intermediate_size"),
        "norm_epsilon": c.number("layer_norm_eps", 0, 1),
    }


def llava_sections(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`language`, `vision`) for the configuration of a LLaVA model. The vision section of LLaVA's own format
    holds no more than what is read from the tower, whose sizes are in the tower's own directory.

    Raises:
        ConfigError: as `language_section`; or a projector other than mlp2x_gelu, features of several layers.
    """
    if config["model_type"] == "llava":
        return _transformers_llava(config)
    language = {**config, "model_type": config["model_type"].removeprefix("llava_")}
    if language["model_type"] == "qwen":
        language["model_type"] = "qwen2"
    c = Given(
        "llava",
        config,
        {"mm_projector_type": "linear", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"},
    )
    _refuse_marks("llava", config)
    c.expect("mm_projector_type", "mlp2x_gelu")
    c.expect("mm_use_im_start_end", False, None, why="tokens of its own stand around each image")
    return language_section(language), {
        "feature_layer": _feature_layer(c, "mm_vision_select_layer"),
        "feature_select": c.expect("mm_vision_select_feature", "patch", "cls_patch"),
    }


def _transformers_llava(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    c = Given(
        "llava",
        config,
        {
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
    )
    _refuse_quantised(c)
    text = {"model_type": "llama", **c.section("text_config")}
    tied = [given.flag("tie_word_embeddings") for given in (c, Given("llava's text_config", text, {}))]
    text["tie_word_embeddings"] = any(tied)
    tower = (
        {"model_type": "clip_vision_model", **c.section("vision_config")}
        if "vision_config" in c
        else _LLAVAS_TOWER
    )
    c.expect("projector_hidden_act", "gelu")
    c.expect("multimodal_projector_bias", True)
    layer, select = (
        _feature_layer(c, "vision_feature_layer"),
        c.expect("vision_feature_select_strategy", "default", "full"),
    )
    vision = vision_section(tower)
    if select == "default" and vision["model_type"] == "siglip":
        c.refuse(
            "vision_feature_select_strategy", "it would drop SigLIP's first patch, for want of a class token"
        )
    return language_section(text), {
        **vision,
        "feature_layer": layer,
        "feature_select": "patch" if select == "default" else "cls_patch",
    }


def _feature_layer(c: Given, key: str) -> int:
    """The one layer whose output is the feature."""
    layer = c.raw(key)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if type(layer) is not int:
        c.refuse(key, "features of one layer are read here, named by a whole number")
    return layer


def _refuse_text(kind: str, c: Given, config: Mapping[str, Any]) -> None:
    """Settings of known architectures that the core cannot compute."""
    _refuse_quantised(c)
    _refuse_marks(kind, config)
    c.expect("hidden_act", *(("gelu_new", "gelu_pytorch_tanh") if kind == "phi" else ("silu", "swish")))
    if kind in ("llama", "stablelm", "phi") and (
        c.flag("use_sliding_window") or "sliding_attention" in _layer_types(c)
    ):
        c.refuse("use_sliding_window", "this architecture has no windows")
    if c.flag("qk_layernorm"):
        c.refuse(
            "qk_layernorm",
            "its norms of queries and keys have weights for each head, or a bias, which the core's have not",
        )
    if kind == "llama" and c.flag("attention_bias") != c.flag("mlp_bias"):
        refuse(
            kind,
            "attention_bias, mlp_bias",
            (c.raw("attention_bias"), c.raw("mlp_bias")),
            "megatron-core has biases on all four linear layers or on none (or on QKV alone, which this is "
            "not)",
        )
    if kind != "llama":
        c.expect(
            "attention_bias", False, None, why="a bias on the attention's output alone cannot be expressed"
        )


def _refuse_quantised(c: Given) -> None:
    for key in ("quantization_config", "compression_config"):
        if found := c.section(key):
            refuse(c.kind, key, found.get("quant_method", "?"), "give the unquantised weights")


def _refuse_marks(kind: str, config: Mapping[str, Any]) -> None:
    if found := unsupported.marks(config):
        raise ConfigError(f"this {kind} cannot be imported: {'; '.join(found)}")


def _layer_types(c: Given) -> list[Any]:
    found = c.raw("layer_types")
    if found is not None and not isinstance(found, list):
        c.refuse("layer_types", "it must be a list with a name for each layer")
    return found or []


def _window(c: Given, layers: int) -> dict[str, int]:
    """The window of a Qwen, which must hold for all layers or for none."""
    window = c.optional_size("sliding_window") if c.flag("use_sliding_window") else None
    types = _layer_types(c)
    if not types and window is None:
        return {}
    if not types:
        first = 0 if c.raw("max_window_layers") == 0 else c.size("max_window_layers")
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if len(types) != layers or any(kind not in ("sliding_attention", "full_attention") for kind in types):
        c.refuse(
            "layer_types", f"it must say full_attention or sliding_attention for each of {layers} layers"
        )
    sliding = types.count("sliding_attention")
    if sliding and window is None:
        c.refuse("layer_types", "layers slide, and use_sliding_window and sliding_window give them no window")
    if 0 < sliding < layers:
        c.refuse(
            "use_sliding_window",
            f"the window would hold for {sliding} of {layers} layers, and megatron-core has one for all",
        )
    return {"window_size": window} if sliding else {}


def _rope(kind: str, c: Given, head: int) -> dict[str, Any]:
    """RoPE's fields, from `rope_parameters` (5.x) or `rope_theta`, `rope_scaling`,
    `partial_rotary_factor`.
    """
    given, old = c.section("rope_parameters"), c.section("rope_scaling")
    if given and old and given != old:
        refuse(kind, "rope_scaling", old, f"rope_parameters says something else: {given}")
    given = given or old
    if any(isinstance(v, dict) for v in given.values()):
        refuse(kind, "rope_parameters", given, "all layers must share one RoPE")
    share = {key: c.raw(key) for key in ("rope_theta", "partial_rotary_factor") if key in c}
    r = Given(kind, {k: v for k, v in given.items() if v is not None}, {"rope_theta": _ROPE_DEFAULT, **share})
    base = r.number("rope_theta", 1, 1e15)
    if base != int(base):
        r.refuse("rope_theta", "the base must be a whole number")
    section: dict[str, Any] = {"rotary_base": int(base)}
    if "partial_rotary_factor" in r and (part := r.number("partial_rotary_factor", 0, 1)) != 1.0:
        if kind not in ("stablelm", "phi"):
            r.refuse("partial_rotary_factor", "heads of this architecture are turned as a whole")
        section["rotary_percent"] = part
    turned = int(head * section.get("rotary_percent", 1.0))
    if turned < 2 or turned % 2:
        refuse(kind, "RoPE's share of each head", turned, "it must be an even number of channels")
    return section | _scaling(kind, r, c)


def _scaling(kind: str, r: Given, c: Given) -> dict[str, Any]:
    """How RoPE is stretched."""
    scaling = r.raw("rope_type", r.raw("type", "default"))
    reason = unsupported.rope_reason({"rope_type": scaling, "mrope_section": r.raw("mrope_section")})
    if reason or scaling not in ("default", "linear", "llama3"):
        refuse(
            kind,
            "rope_type",
            scaling,
            f"{reason + '; ' if reason else ''}megatron-core has linear and llama3 scaling",
        )
    if scaling == "default":
        return {}
    if scaling == "llama3":
        known = {"low_freq_factor": 1, "high_freq_factor": 4}
        for key, value in known.items():
            if r.number(key, 0, 1e6) != value:
                r.refuse(key, f"megatron-core has {value} built in")
        trained = "original_max_position_embeddings"
        if (
            length := next(
                (x.size(trained) for x in (c, r) if trained in x), c.size("max_position_embeddings")
            )
        ) != 8192:
            refuse(kind, trained, length, "megatron-core has 8192 built in")
    return {"rope_scaling_type": scaling, "rope_scaling_factor": r.number("factor", 1, 1e6)}


def _known_kind(config: Mapping[str, Any], known: Mapping[str, Any], what: str) -> str:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        refuse_type(config, known, what)
    return kind


def refuse_type(config: Mapping[str, Any], known: Mapping[str, Any], what: str) -> NoReturn:
    """Raises `ConfigError`: why a family cannot be imported as a `what`, as far as that is known, and which
    can.
    """
    found = unsupported.against(config)
    raise ConfigError(
        f"model_type {reprlib.repr(config.get('model_type'))} cannot be imported as a {what}"
        f"{': ' + '; '.join(found) if found else ''}; these can: {', '.join(known)}"
    )
