"""Translates a Hugging Face ``config.json`` to sections of this package's configuration.

What megatron-core cannot compute is refused, with the field and its value.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_evomoe.config import ConfigError
from megatron_evomoe.hf.from_hf import unsupported
from megatron_evomoe.hf.from_hf.config_defaults import (
    LLAVA_TOWER,
    TEXT_DEFAULTS,
    VISION_DEFAULTS,
    WINDOW_DEFAULTS,
)
from megatron_evomoe.hf.from_hf.config_values import ConfigValues, refuse

_ROPE_DEFAULT = 10000.0
LLAVA_TYPES = (
    "llava",
    "llava_llama",
    "llava_mistral",
    "llava_qwen2",
    "llava_qwen",
    "llava_phi",
    "llava_stablelm",
)
"""model_type of LLaVA models: `llava` in transformers, the others in LLaVA's own code and its forks."""
_MOST_LAYERS = 4096


def language_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `language` section for the configuration of a decoder.

    Raises:
        ConfigError: megatron-core cannot compute the architecture or a setting, or a value has a wrong type.
    """
    kind = _known_kind(config, TEXT_DEFAULTS, "language model")
    c = ConfigValues(
        kind, config, {**TEXT_DEFAULTS[kind], **(WINDOW_DEFAULTS if kind.startswith("qwen") else {})}
    )
    _refuse_text(kind, c, config)
    layers, width, heads = (
        c.size("num_hidden_layers", _MOST_LAYERS),
        c.size("hidden_size"),
        c.size("num_attention_heads"),
    )
    groups, head = c.optional_size("num_key_value_heads") or heads, c.optional_size("head_dim")
    if head is None and width % heads:
        c.refuse(
            "hidden_size", f"it must be a multiple of num_attention_heads ({heads}) if head_dim is not given"
        )
    if heads % groups:
        c.refuse("num_key_value_heads", f"num_attention_heads ({heads}) must be a multiple of it")
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
    """The `vision` section for the configuration of a vision tower, or of a whole CLIP or SigLIP model.

    Raises:
        ConfigError: as `language_section`.
    """
    if config.get("model_type") in ("clip", "siglip") and "vision_config" in config:
        half = ConfigValues(config["model_type"], config, {}).section("vision_config")
        config = {"model_type": f"{config['model_type']}_vision_model", **half}
    kind = _known_kind(config, VISION_DEFAULTS, "vision tower")
    c = ConfigValues(kind, config, {**VISION_DEFAULTS[kind], "num_channels": 3})
    _refuse_quantised(c)
    c.expect("hidden_act", VISION_DEFAULTS[kind]["hidden_act"])
    c.expect("num_channels", 3)
    side, patch, width, heads = (
        c.size(x) for x in ("image_size", "patch_size", "hidden_size", "num_attention_heads")
    )
    if side % patch:
        c.refuse(
            "image_size",
            f"megatron-core needs a multiple of patch_size ({patch}); transformers ignores the rest",
        )
    if width % heads:
        c.refuse("hidden_size", f"it must be a multiple of num_attention_heads ({heads})")
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
    """The `language` and the `vision` section for the configuration of a LLaVA model.

    In the format of LLaVA's own code the tower has a directory of its own. The vision section then only says
    which features are used, not the sizes of the tower.

    Raises:
        ConfigError: as `language_section`; or the projector is not mlp2x_gelu, or features come from several
            layers.
    """
    if config["model_type"] == "llava":
        return _transformers_llava(config)
    language = {**config, "model_type": config["model_type"].removeprefix("llava_")}
    if language["model_type"] == "qwen":
        language["model_type"] = "qwen2"
    c = ConfigValues(
        "llava",
        config,
        {"mm_projector_type": "linear", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"},
    )
    _refuse_marks("llava", config)
    c.expect("mm_projector_type", "mlp2x_gelu")
    c.expect("mm_use_im_start_end", False, None, why="it puts start and end tokens around each image")
    return language_section(language), {
        "feature_layer": _feature_layer(c, "mm_vision_select_layer"),
        "feature_select": c.expect("mm_vision_select_feature", "patch", "cls_patch"),
    }


def _transformers_llava(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    c = ConfigValues(
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
    tied = [given.flag("tie_word_embeddings") for given in (c, ConfigValues("llava's text_config", text, {}))]
    text["tie_word_embeddings"] = any(tied)
    tower = (
        {"model_type": "clip_vision_model", **c.section("vision_config")}
        if "vision_config" in c
        else LLAVA_TOWER
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
            "vision_feature_select_strategy",
            "it would drop SigLIP's first patch, as SigLIP has no class token",
        )
    return language_section(text), {
        **vision,
        "feature_layer": layer,
        "feature_select": "patch" if select == "default" else "cls_patch",
    }


def _feature_layer(c: ConfigValues, key: str) -> int:
    """The layer whose output is the feature."""
    layer = c.raw(key)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if type(layer) is not int:
        c.refuse(key, "it must be a whole number, because features of one layer are supported")
    return layer


def _refuse_text(kind: str, c: ConfigValues, config: Mapping[str, Any]) -> None:
    """Refuse settings of known architectures that megatron-core cannot compute."""
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
            "its norms of queries and keys have weights for each head, or biases, which megatron-core's lack",
        )
    if kind == "llama" and c.flag("attention_bias") != c.flag("mlp_bias"):
        refuse(
            kind,
            "attention_bias, mlp_bias",
            (c.raw("attention_bias"), c.raw("mlp_bias")),
            "megatron-core has biases on all linear layers of a layer, on QKV alone, or on none",
        )
    if kind != "llama":
        c.expect(
            "attention_bias", False, None, why="megatron-core has no bias on the output of attention alone"
        )


def _refuse_quantised(c: ConfigValues) -> None:
    for key in ("quantization_config", "compression_config"):
        if found := c.section(key):
            refuse(c.kind, key, found.get("quant_method", "?"), "give the unquantised weights")


def _refuse_marks(kind: str, config: Mapping[str, Any]) -> None:
    if found := unsupported.marks(config):
        raise ConfigError(f"this {kind} cannot be imported: {'; '.join(found)}")


def _layer_types(c: ConfigValues) -> list[Any]:
    found = c.raw("layer_types")
    if found is not None and not isinstance(found, list):
        c.refuse("layer_types", "it must be a list with a name for each layer")
    return found or []


def _window(c: ConfigValues, layers: int) -> dict[str, int]:
    """The attention window of a Qwen model, which all layers must have, or none."""
    window = c.optional_size("sliding_window") if c.flag("use_sliding_window") else None
    types = _layer_types(c)
    if not types and window is None:
        return {}
    if not types:
        first = 0 if c.raw("max_window_layers") == 0 else c.size("max_window_layers")
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if len(types) != layers or any(kind not in ("sliding_attention", "full_attention") for kind in types):
        c.refuse("layer_types", f"it must be full_attention or sliding_attention for each of {layers} layers")
    sliding = types.count("sliding_attention")
    if sliding and window is None:
        c.refuse(
            "layer_types", "some layers have a window, but use_sliding_window and sliding_window give none"
        )
    if 0 < sliding < layers:
        c.refuse(
            "use_sliding_window",
            f"{sliding} of {layers} layers would have the window, but megatron-core has one for all layers",
        )
    return {"window_size": window} if sliding and window is not None else {}


def _rope(kind: str, c: ConfigValues, head: int) -> dict[str, Any]:
    """The fields of RoPE.

    transformers 5 writes them in `rope_parameters`; before, they were `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`.

    Args:
        head: size of a head.
    """
    given, old = c.section("rope_parameters"), c.section("rope_scaling")
    if given and old and given != old:
        refuse(kind, "rope_scaling", old, f"it contradicts rope_parameters = {given}")
    given = given or old
    if any(isinstance(v, dict) for v in given.values()):
        refuse(kind, "rope_parameters", given, "all layers must have the same RoPE")
    share = {key: c.raw(key) for key in ("rope_theta", "partial_rotary_factor") if key in c}
    r = ConfigValues(
        kind, {k: v for k, v in given.items() if v is not None}, {"rope_theta": _ROPE_DEFAULT, **share}
    )
    base = r.number("rope_theta", 1, 1e15)
    if base != int(base):
        r.refuse("rope_theta", "the base must be a whole number")
    section: dict[str, Any] = {"rotary_base": int(base)}
    if "partial_rotary_factor" in r and (part := r.number("partial_rotary_factor", 0, 1)) != 1.0:
        if kind not in ("stablelm", "phi"):
            r.refuse("partial_rotary_factor", "this architecture rotates whole heads")
        section["rotary_percent"] = part
    turned = int(head * section.get("rotary_percent", 1.0))
    if turned < 2 or turned % 2:
        refuse(kind, "rotated channels of each head", turned, "the number must be even and at least 2")
    return section | _scaling(kind, r, c)


def _scaling(kind: str, r: ConfigValues, c: ConfigValues) -> dict[str, Any]:
    """The fields of RoPE scaling."""
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
    """Raise a `ConfigError` for a model_type that cannot be imported as a `what`.

    It gives the reason, as far as that is known, and the model types that can be imported.
    """
    found = unsupported.against(config)
    raise ConfigError(
        f"model_type {reprlib.repr(config.get('model_type'))} cannot be imported as a {what}"
        f"{': ' + '; '.join(found) if found else ''}; these can: {', '.join(known)}"
    )
