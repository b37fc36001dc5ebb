"""A Hugging Face ``config.json`` in our words, or a refusal that names what megatron-core cannot compute.

A config.json leaves out what equals its class's default, so those defaults are part of the format; they are transformers',
and `tests/unit/hf/test_config_in.py` compares them.
"""

from __future__ import annotations

from typing import Any, NoReturn

from megatron_evomoe.config import ConfigError

_ROPE_DEFAULT = 10000.0
_LLAMA_LIKE = {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA_LIKE, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "max_position_embeddings": 2048},
    "mistral": {**_LLAMA_LIKE, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {**_LLAMA_LIKE, "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {**_LLAMA_LIKE, "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    "stablelm": {"vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "layer_norm_eps": 1e-5,
                 "tie_word_embeddings": False, "hidden_act": "silu", "partial_rotary_factor": 0.25},
    "phi": {"vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 32, "num_key_value_heads": None, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
}
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                          "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                            "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
LLAVA_TYPES = ("llava", "llava_llama", "llava_mistral", "llava_qwen2", "llava_qwen", "llava_phi", "llava_stablelm")
"""`llava` is transformers'; the others are what LLaVA's own code and its forks wrote."""

_KNOWN_REFUSALS = {
    "gemma": "its embedding is scaled and its norms add 1", "gemma2": "its logits are soft-capped",
    "gemma3_text": "its layers alternate attention windows and RoPE bases", "qwen": "its code is remote; Qwen2 or later is taken",
    "phi3": "its QKV is stored in another layout and its RoPE is longrope", "gpt2": "it has learned positions",
    "llava_next": "it cuts images into tiles", "llava_onevision": "it cuts images into tiles",
    "siglip2_vision_model": "its positions are resized to each image", "stablelm_epoch": "its code is remote; use stablelm",
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu"}


def language_section(config: dict[str, Any]) -> dict[str, Any]:
    """The `language` section for the configuration of a decoder.

    Raises:
        ConfigError: an architecture or setting that megatron-core cannot express; the message names it and its value.
    """
    kind = config.get("model_type")
    if kind not in TEXT_DEFAULTS:
        _refuse_type(kind, TEXT_DEFAULTS, "language model")
    c = {**TEXT_DEFAULTS[kind], **config}
    _refuse_text(kind, c)
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"] or c["num_attention_heads"]
    head = c.get("head_dim") or c["hidden_size"] // heads
    section = {
        "num_layers": c["num_hidden_layers"], "hidden_size": c["hidden_size"], "ffn_hidden_size": c["intermediate_size"],
        "num_attention_heads": heads, "num_query_groups": None if groups == heads else groups,
        "kv_channels": None if head * heads == c["hidden_size"] else head, "vocab_size": c["vocab_size"],
        "max_position_embeddings": c["max_position_embeddings"], "tie_word_embeddings": bool(c["tie_word_embeddings"]),
        "norm_epsilon": c["layer_norm_eps"] if kind in ("stablelm", "phi") else c["rms_norm_eps"],
        **_rope(kind, c),
    }
    if kind == "mistral":
        section["window_size"] = c["sliding_window"]
    elif kind == "qwen2":
        section["add_qkv_bias"] = True
    elif kind == "qwen3":
        section["qk_layernorm"] = True
    elif kind == "stablelm":
        section |= {"normalization": "LayerNorm", "add_qkv_bias": bool(c.get("use_qkv_bias", False))}
    elif kind == "phi":
        section |= {"normalization": "LayerNorm", "activation": "gelu_tanh", "gated_linear_unit": False, "add_bias_linear": True,
                    "parallel_residual": True, "lm_head_bias": True}
    elif c.get("attention_bias") and c.get("mlp_bias"):
        section["add_bias_linear"] = True
    return section


def vision_section(config: dict[str, Any]) -> dict[str, Any]:
    """The `vision` section for the configuration of a tower, or of the CLIP or SigLIP model it is half of.

    Raises:
        ConfigError: as `language_section`.
    """
    if config.get("model_type") in ("clip", "siglip") and "vision_config" in config:
        config = {"model_type": f"{config['model_type']}_vision_model", **config["vision_config"]}
    kind = config.get("model_type")
    if kind not in VISION_DEFAULTS:
        _refuse_type(kind, VISION_DEFAULTS, "vision tower")
    c = {**VISION_DEFAULTS[kind], **config}
    _expect(kind, c, "hidden_act", VISION_DEFAULTS[kind]["hidden_act"])
    _expect(kind, c, "num_channels", 3)
    if c["image_size"] % c["patch_size"]:
        _refuse(kind, "image_size", c["image_size"], f"megatron-core takes multiples of patch_size ({c['patch_size']}) only, and "
                "a published tower cuts the rest off")
    return {"model_type": kind.split("_")[0], "image_size": c["image_size"], "patch_size": c["patch_size"],
            "hidden_size": c["hidden_size"], "num_layers": c["num_hidden_layers"],
            "num_attention_heads": c["num_attention_heads"], "ffn_hidden_size": c["intermediate_size"],
            "norm_epsilon": c["layer_norm_eps"]}


def llava_sections(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`language`, `vision`) for the configuration of a LLaVA model. The vision section of LLaVA's own format holds no more than
    what is read from the tower, whose sizes are in the tower's own directory.

    Raises:
        ConfigError: as `language_section`; or a projector other than mlp2x_gelu, features of several layers.
    """
    if config["model_type"] == "llava":
        return _transformers_llava(config)
    language = {**config, "model_type": config["model_type"].removeprefix("llava_")}
    if language["model_type"] == "qwen":
        language["model_type"] = "qwen2"
    _expect("llava", config, "mm_projector_type", "mlp2x_gelu", default="linear")
    vision = {"feature_layer": config.get("mm_vision_select_layer", -2),
              "feature_select": config.get("mm_vision_select_feature", "patch")}
    return language_section(language), vision


def _transformers_llava(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    text = {"model_type": "llama", **config.get("text_config", {})}
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
    tower = {"model_type": "clip_vision_model", **config.get("vision_config", {})}
    _expect("llava", config, "projector_hidden_act", "gelu")
    _expect("llava", config, "multimodal_projector_bias", True)
    layer, select = config.get("vision_feature_layer", -2), config.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int):
        _refuse("llava", "vision_feature_layer", layer, "features of one layer are read here")
    if select not in ("default", "full"):
        _refuse("llava", "vision_feature_select_strategy", select, "default and full are known")
    vision = vision_section(tower)
    if select == "default" and vision["model_type"] == "siglip":
        _refuse("llava", "vision_feature_select_strategy", select, "it would drop SigLIP's first patch, for want of a class token")
    return language_section(text), {**vision, "feature_layer": layer,
                                    "feature_select": "patch" if select == "default" else "cls_patch"}


def _refuse_text(kind: str, c: dict[str, Any]) -> None:
    """Settings of known architectures that the core cannot compute."""
    _expect(kind, c, "hidden_act", "gelu_new" if kind == "phi" else "silu")
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        _expect(kind, c, key, None)
    if c.get("use_sliding_window") or "sliding_attention" in (c.get("layer_types") or [] if kind != "mistral" else []):
        _refuse(kind, "use_sliding_window", True, "the window would hold for some layers only")
    for key in ("use_parallel_residual", "qk_layernorm"):
        _expect(kind, c, key, False)
    if bool(c.get("attention_bias")) != bool(c.get("mlp_bias")):
        _refuse(kind, "attention_bias, mlp_bias", (c.get("attention_bias"), c.get("mlp_bias")),
                "megatron-core has both or neither")
    if kind != "llama":
        _expect(kind, c, "attention_bias", False)
    if "quantization_config" in c:
        _refuse(kind, "quantization_config", c["quantization_config"].get("quant_method", "?"), "give the unquantised weights")


def _rope(kind: str, c: dict[str, Any]) -> dict[str, Any]:
    """RoPE's fields, from `rope_parameters` (5.x) or `rope_theta`, `rope_scaling`, `partial_rotary_factor`."""
    given = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if any(isinstance(v, dict) for v in given.values()):
        _refuse(kind, "rope_parameters", given, "all layers must share one RoPE")
    base = float(given.get("rope_theta") or c.get("rope_theta") or _ROPE_DEFAULT)
    if base != int(base):
        _refuse(kind, "rope_theta", base, "the base must be a whole number")
    section: dict[str, Any] = {"rotary_base": int(base)}
    share = given.get("partial_rotary_factor", c.get("partial_rotary_factor"))
    if share is not None and share != 1.0:
        section["rotary_percent"] = float(share)
    scaling = given.get("rope_type", given.get("type", "default"))
    if scaling == "default":
        return section
    if scaling not in ("linear", "llama3"):
        _refuse(kind, "rope_type", scaling, "megatron-core has linear and llama3 scaling")
    if scaling == "llama3":
        for key, value in (("low_freq_factor", 1.0), ("high_freq_factor", 4.0), ("original_max_position_embeddings", 8192)):
            _expect(kind, given, key, value)
    return {**section, "rope_scaling_type": scaling, "rope_scaling_factor": float(given["factor"])}


def _expect(kind: str, config: dict[str, Any], key: str, value: Any, default: Any = ...) -> None:
    found = config.get(key, value if default is ... else default)
    if found != value:
        _refuse(kind, key, found, f"only {value!r} can be expressed")


def _refuse(kind: str, key: str, value: Any, why: str) -> NoReturn:
    raise ConfigError(f"{kind} with {key} = {value!r} cannot be imported: {why}")


def _refuse_type(kind: Any, known: dict[str, Any], what: str) -> NoReturn:
    reason = _KNOWN_REFUSALS.get(kind)
    if reason is None and isinstance(kind, str) and ("moe" in kind or kind in ("mixtral", "dbrx", "jamba")):
        reason = "it is a mixture already; give a dense model"
    raise ConfigError(f"model_type {kind!r} cannot be imported as a {what}{': ' + reason if reason else ''}; "
                      f"these can: {', '.join(known)}")
