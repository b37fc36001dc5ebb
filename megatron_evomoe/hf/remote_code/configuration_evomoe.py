"""Configuration of EvoMoE models: a vision tower, a projector, and a decoder with mixtures of experts.

Needs transformers 4.56 or later. Some names differ from transformers' (`rope_base`, `norm_eps`), because some
of its versions change fields of those names on loading.
"""

from __future__ import annotations

from typing import ClassVar

from transformers import PretrainedConfig


class EvoMoeVisionConfig(PretrainedConfig):
    """The image encoder up to the layer whose output is the image feature."""

    model_type = "evomoe_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        tower="clip",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        layer_norm_eps=1e-5,
        keep_class_token=False,
        **kwargs,
    ):
        """
        Args:
            tower: "clip" (class token, norm before the layers, quick GELU) or "siglip" (neither; tanh GELU).
            num_hidden_layers: number of layers; the output of the last one is the feature.
            keep_class_token: whether the output at CLIP's class token is a feature too.
        """
        self.tower = tower
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.image_size = image_size
        self.patch_size = patch_size
        self.layer_norm_eps = layer_norm_eps
        self.keep_class_token = keep_class_token
        super().__init__(**kwargs)


class EvoMoeTextConfig(PretrainedConfig):
    """The decoder with its mixtures of experts."""

    model_type = "evomoe_text"
    base_config_key = "text_config"

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=None,
        head_dim=None,
        max_position_embeddings=4096,
        norm_type="RMSNorm",
        norm_eps=1e-6,
        hidden_act="silu",
        gated_ffn=True,
        qkv_bias=False,
        linear_bias=False,
        qk_norm=False,
        parallel_residual=False,
        lm_head_bias=False,
        rope_base=10000.0,
        rotary_percent=1.0,
        rope_adjustment=None,
        sliding_window=None,
        moe_layers=(),
        num_experts=4,
        num_experts_per_tok=1,
        router="dtr",
        router_gate="straight_through",
        dtr_hidden_size=16,
        dtr_rank=16,
        dtr_activation="none",
        initializer_range=0.02,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        """
        Args:
            norm_type: "RMSNorm" or "LayerNorm".
            qkv_bias: whether the projections to queries, keys and values have biases.
            linear_bias: whether all linear layers but the output layer have biases, those of experts
                included.
            rope_adjustment: None, {"type": "linear", "factor": …}, or {"type": "llama3", "factor": …,
                "low_freq_factor": …, "high_freq_factor": …, "original_max_position_embeddings": …}.
            moe_layers: indices, from 0, of the layers with a mixture of experts.
            router: a key of `ROUTERS` in routing_evomoe.py, or "none", which sends every token to expert 0.
            router_gate: "straight_through" (the weights of a token's experts sum to 1) or "prob" (they are
                the experts' probabilities).
        """
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.norm_type = norm_type
        self.norm_eps = norm_eps
        self.hidden_act = hidden_act
        self.gated_ffn = gated_ffn
        self.qkv_bias = qkv_bias
        self.linear_bias = linear_bias
        self.qk_norm = qk_norm
        self.parallel_residual = parallel_residual
        self.lm_head_bias = lm_head_bias
        self.rope_base = rope_base
        self.rotary_percent = rotary_percent
        self.rope_adjustment = rope_adjustment
        self.sliding_window = sliding_window
        self.moe_layers = list(moe_layers)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.router = router
        self.router_gate = router_gate
        self.dtr_hidden_size = dtr_hidden_size
        self.dtr_rank = dtr_rank
        self.dtr_activation = dtr_activation
        self.initializer_range = initializer_range
        # transformers 4 and 5 have different defaults for these
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )


class EvoMoeConfig(PretrainedConfig):
    """The whole model."""

    model_type = "evomoe"
    sub_configs: ClassVar[dict[str, type]] = {
        "vision_config": EvoMoeVisionConfig,
        "text_config": EvoMoeTextConfig,
    }

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        image_token_id=32000,
        image_seq_length=576,
        evomoe_config=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        """
        Args:
            image_token_id: token id at every image position. It has no embedding and may lie beyond the
                vocabulary.
            image_seq_length: number of positions of one image.
            evomoe_config: the configuration in megatron_evomoe, from which it can import the model again.
        """
        # before the base class, which passes settings on to them
        self.vision_config = _sub_config(EvoMoeVisionConfig, vision_config)
        self.text_config = _sub_config(EvoMoeTextConfig, text_config)
        self.image_token_id = image_token_id
        self.image_seq_length = image_seq_length
        self.evomoe_config = evomoe_config
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def image_token_index(self):
        """The older name in LLaVA, which some programs read."""
        return self.image_token_id


def _sub_config(kind, given):
    return given if isinstance(given, PretrainedConfig) else kind(**(given or {}))


__all__ = ["EvoMoeConfig", "EvoMoeTextConfig", "EvoMoeVisionConfig"]
