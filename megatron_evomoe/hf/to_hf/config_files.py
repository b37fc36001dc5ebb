"""Translates this package's configuration to the JSON files of an export, without those of the tokenizer.

They have the form of transformers 4.x, which 5.x reads too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_evomoe.config import ConfigError, LanguageConfig, RunConfig, VisionConfig
from megatron_evomoe.config.kinds import MIXTURE_KINDS, StageKind
from megatron_evomoe.data.image import processor_for
from megatron_evomoe.hf.export_format import OWN_KEY
from megatron_evomoe.hf.remote_code.exported_files import AUTO_MAP, IMAGE_AUTO_MAP

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Numbers that are built into megatron-core."""
Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids in the configuration files."""

    bos: int | None
    eos: int
    pad: int
    image: int
    stop: tuple[int, ...]
    """Ids of tokens that end an answer."""

    def roles(self) -> Json:
        """The ids under the keys of configuration files."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def own_sections(config: RunConfig, kind: str, stage: Json) -> Json:
    """This package's configuration as an export carries it, so that an import loses nothing.

    Args:
        kind: stage kind of the exported model; `dense` for the first expert of an evolving one.
        stage: the checkpoint's stage, step and lineage.
    """
    whole = config.to_dict()
    data = {key: whole["data"][key] for key in ("conversation_template", "image_aspect_ratio", "seq_length")}
    return {
        "kind": kind,
        **{name: whole[name] for name in ("language", "vision", "moe")},
        "data": data,
        "stage": stage,
    }


def evomoe_config(config: RunConfig, kind: str, tokens: Tokens, own: Json, dtype: str) -> Json:
    """The ``config.json`` of an export with custom code."""
    lm, vision, moe = config.language, config.vision, config.moe
    mixtures = (
        [i for i, is_moe in enumerate(moe.layer_pattern(lm.num_layers)) if is_moe]
        if kind in MIXTURE_KINDS
        else []
    )
    text = {
        "model_type": "evomoe_text",
        **_sizes(lm),
        "head_dim": lm.head_size,
        "norm_type": lm.normalization,
        "norm_eps": lm.norm_epsilon,
        "hidden_act": _ACTIVATIONS[lm.activation],
        "gated_ffn": lm.gated_linear_unit,
        "qkv_bias": lm.add_qkv_bias,
        "linear_bias": lm.add_bias_linear,
        "qk_norm": lm.qk_layernorm,
        "parallel_residual": lm.parallel_residual,
        "lm_head_bias": lm.lm_head_bias,
        "rope_base": float(lm.rotary_base),
        "rotary_percent": lm.rotary_percent,
        "rope_adjustment": _rope_adjustment(lm),
        "sliding_window": lm.window_size,
        "moe_layers": mixtures,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "router": moe.router if kind == StageKind.ROUTE else "none",
        "router_gate": moe.router_gate,
        "dtr_hidden_size": moe.dtr_hidden_size,
        "dtr_rank": moe.dtr_rank,
        "dtr_activation": moe.dtr_activation,
        **tokens.roles(),
    }
    tower = {
        "model_type": "evomoe_vision",
        "tower": vision.model_type,
        **_tower_sizes(vision),
        "keep_class_token": vision.model_type == "clip" and vision.feature_select == "cls_patch",
    }
    return {
        "architectures": ["EvoMoeForConditionalGeneration"],
        "model_type": "evomoe",
        "auto_map": AUTO_MAP,
        "dtype": dtype,
        "image_token_id": tokens.image,
        "image_seq_length": vision.tokens_per_image,
        "tie_word_embeddings": lm.tie_word_embeddings,
        **tokens.roles(),
        "text_config": text,
        "vision_config": tower,
        OWN_KEY: own,
    }


def llava_config(config: RunConfig, tokens: Tokens, own: Json, dtype: str, rows: int) -> Json:
    """The ``config.json`` of an export for transformers' own LLaVA.

    The exported tower ends at the feature layer, so the feature is the output of its last layer.

    Args:
        rows: rows of the embedding, with one for the image token.

    Raises:
        ConfigError: as `stock_text_config`.
    """
    vision, lm = config.vision, config.language
    is_clip = vision.model_type == "clip"
    tower = {
        "model_type": f"{vision.model_type}_vision_model",
        **_tower_sizes(vision),
        "hidden_act": "quick_gelu" if is_clip else "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
    }
    tower |= {"projection_dim": vision.hidden_size} if is_clip else {"vision_use_head": False}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "image_token_index": tokens.image,
        "image_seq_length": vision.tokens_per_image,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": _select(vision),
        "tie_word_embeddings": lm.tie_word_embeddings,
        **tokens.roles(),
        "text_config": {**stock_text_config(lm), "vocab_size": rows, **tokens.roles()},
        "vision_config": tower,
        OWN_KEY: own,
    }


def stock_text_config(lm: LanguageConfig) -> Json:
    """The configuration of the decoder as a llama, mistral, qwen2, qwen3 or stablelm of transformers.

    Raises:
        ConfigError: none of them computes this decoder.
    """
    kind = _stock_type(lm)
    base = {
        "model_type": kind,
        **_sizes(lm),
        "hidden_act": "silu",
        "rope_theta": float(lm.rotary_base),
        "attention_dropout": 0.0,
        "tie_word_embeddings": lm.tie_word_embeddings,
    }
    if (adjustment := _rope_adjustment(lm)) is not None:
        base["rope_scaling"] = {"rope_type": adjustment.pop("type"), **adjustment}
    if kind == "stablelm":
        return {
            **base,
            "layer_norm_eps": lm.norm_epsilon,
            "use_qkv_bias": lm.add_qkv_bias,
            "hidden_dropout": 0.0,
            "partial_rotary_factor": lm.rotary_percent,
            "use_parallel_residual": False,
            "qk_layernorm": False,
        }
    base |= {"rms_norm_eps": lm.norm_epsilon, "head_dim": lm.head_size}
    if kind == "mistral":
        return {**base, "sliding_window": lm.window_size}
    if kind == "llama":
        return {**base, "attention_bias": lm.add_bias_linear, "mlp_bias": lm.add_bias_linear}
    return {**base, "use_sliding_window": False, "sliding_window": None}


def _stock_type(lm: LanguageConfig) -> str:
    def need(ok: bool, why: str) -> None:
        if not ok:
            raise ConfigError(
                f"no language model of transformers' LLaVA can compute this one: {why}; use --format evomoe"
            )

    need(lm.activation == "silu" and lm.gated_linear_unit, "its FFN is not a SwiGLU")
    need(not lm.parallel_residual, "its attention and FFN share a norm")
    need(not lm.lm_head_bias, "its output layer has a bias")
    biased, plain_heads = (
        lm.add_qkv_bias or lm.add_bias_linear,
        lm.head_size == lm.hidden_size // lm.num_attention_heads,
    )
    if lm.normalization == "LayerNorm":
        need(
            not lm.qk_layernorm and not lm.add_bias_linear and lm.window_size is None and plain_heads,
            "StableLM has no norm on queries and keys, no biases but QKV's, no window, and heads of size "
            "width / number",
        )
        return "stablelm"
    need(
        lm.rotary_percent == 1.0,
        f"it has RMSNorm and rotates only a share of {lm.rotary_percent} of each head",
    )
    if lm.qk_layernorm:
        need(not biased and lm.window_size is None, "Qwen3 has neither biases nor a window")
        return "qwen3"
    if lm.window_size is not None:
        need(not biased, "Mistral has no biases")
        return "mistral"
    if lm.add_qkv_bias and not lm.add_bias_linear:
        need(plain_heads, "Qwen2's heads have the size width / number")
        return "qwen2"
    return "llama"


def generation_config(tokens: Tokens, rows: int) -> Json:
    """The ``generation_config.json``: greedy decoding that ends at any stop token.

    The image token is suppressed, because it has no meaning as output.
    """
    suppressed = {"suppress_tokens": [tokens.image]} if tokens.image < rows else {}
    return {
        **tokens.roles(),
        "eos_token_id": sorted(tokens.stop),
        "do_sample": False,
        "max_new_tokens": 512,
        **suppressed,
    }


def processor_configs(config: RunConfig, form: str) -> dict[str, Json]:
    """File name -> contents of the files for the processor and the image processor.

    Args:
        form: `evomoe` names the image processor in the export's own code, `llava` one of transformers'.
    """
    vision, ours = config.vision, processor_for(config)
    image = {
        "processor_class": "LlavaProcessor",
        "do_resize": True,
        "size": {"shortest_edge": ours.size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": ours.size, "width": ours.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(ours.mean),
        "image_std": list(ours.std),
        "do_convert_rgb": True,
    }
    pads = ours.aspect_ratio == "pad"
    if form == "evomoe":
        image |= {"image_processor_type": "EvoMoeImageProcessor", "auto_map": IMAGE_AUTO_MAP, "do_pad": pads}
    else:
        image |= (
            {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
            if pads
            else {"image_processor_type": "CLIPImageProcessor"}
        )
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": vision.patch_size,
        "image_token": "<image>",
        "vision_feature_select_strategy": _select(vision),
        "num_additional_image_tokens": int(vision.model_type == "clip"),
    }
    return {"preprocessor_config.json": image, "processor_config.json": processor}


def _select(vision: VisionConfig) -> str:
    return "default" if vision.model_type == "clip" and vision.feature_select == "patch" else "full"


def _sizes(lm: LanguageConfig) -> Json:
    return {
        "vocab_size": lm.vocab_size,
        "hidden_size": lm.hidden_size,
        "intermediate_size": lm.ffn_hidden_size,
        "num_hidden_layers": lm.num_layers,
        "num_attention_heads": lm.num_attention_heads,
        "num_key_value_heads": lm.query_groups,
        "max_position_embeddings": lm.max_position_embeddings,
        "initializer_range": lm.init_method_std,
        "tie_word_embeddings": lm.tie_word_embeddings,
    }


def _tower_sizes(vision: VisionConfig) -> Json:
    return {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers_used,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_epsilon,
    }


def _rope_adjustment(lm: LanguageConfig) -> Json | None:
    if lm.rope_scaling_type is None:
        return None
    numbers = _LLAMA3 if lm.rope_scaling_type == "llama3" else {}
    return {"type": lm.rope_scaling_type, "factor": lm.rope_scaling_factor, **numbers}
