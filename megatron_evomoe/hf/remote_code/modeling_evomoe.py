"""EvoMoE: a LLaVA-style vision-language model with mixtures of experts, routed by modality and token.

Needs only torch and transformers 4.56 or later. Tensors are named as in LLaVA files of transformers 4.x.

Shapes: b rows · s positions · n images of p positions · C width · D size of a head · V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import ClassVar, Optional

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .configuration_evomoe import EvoMoeConfig
from .routing_evomoe import EvoMoeMixture, build_ffn
from .vision_evomoe import EvoMoeProjector, EvoMoeVisionEmbeddings, EvoMoeVisionTower

_MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
# Caches of fixed size in transformers 4 must be told where to write; in transformers 5 they count themselves.
_CACHE_WANTS_POSITIONS = "cache_kwargs" in inspect.signature(Cache.update).parameters


class EvoMoeRMSNorm(nn.Module):
    """Root mean square normalisation: x / rms(x) · weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden):
        """Normalise a tensor of any shape over its last axis."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def build_norm(config, width):
    """A norm of the decoder's kind (`norm_type`)."""
    return (
        EvoMoeRMSNorm(width, config.norm_eps)
        if config.norm_type == "RMSNorm"
        else nn.LayerNorm(width, eps=config.norm_eps)
    )


def rotary_tables(config, position_ids, dtype):
    """The rotary tables: cos and sin [b, 1, s, R] for the R rotated channels of each head.

    They are computed anew and not stored as buffers, which loading would leave uninitialised.
    """
    rotated = int(config.head_dim * config.rotary_percent)
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=position_ids.device) / rotated
    frequencies = 1.0 / config.rope_base**exponents
    adjustment = config.rope_adjustment or {}
    if adjustment.get("type") == "linear":
        frequencies = frequencies / adjustment["factor"]
    elif adjustment.get("type") == "llama3":
        frequencies = _llama3_frequencies(frequencies, adjustment)
    angles = (position_ids[..., None].float() * frequencies).repeat(1, 1, 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _llama3_frequencies(frequencies, adjustment):
    """RoPE scaling of Llama 3.1: divides low frequencies by `factor`, keeps high ones, and blends between."""
    low, high = adjustment["low_freq_factor"], adjustment["high_freq_factor"]
    turns = adjustment["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / adjustment["factor"] + kept * frequencies


def rotate(states, cos, sin):
    """Rotate the first R channels of [b, heads, s, D] by their position; the others are unchanged."""
    rotated, passed = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat([rotated * cos + torch.cat([-second, first], dim=-1) * sin, passed], dim=-1)


def eager_attention(module, query, key, value, attention_mask, scaling, **ignored):
    """Attention in plain torch, softmax in float32. The signature is that of transformers' functions."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class EvoMoeAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.is_causal = config, layer, True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, bias = config.hidden_size, config.qkv_bias or config.linear_bias
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.output_name = "dense" if config.parallel_residual else "o_proj"  # Phi's and Llama's names
        setattr(self, self.output_name, nn.Linear(queries, width, bias=config.linear_bias))
        self.q_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, hidden, cos, sin, mask, cache, cache_arguments, packed_positions):
        """[b, s, C] to [b, s, C]; keys and values pass through the cache, if there is one."""
        query, key, value = (
            p(hidden).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = rotate(self.q_norm(query).transpose(1, 2), cos, sin)
        key = rotate(self.k_norm(key).transpose(1, 2), cos, sin)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer, *cache_arguments)
        name = self.config._attn_implementation
        attend = eager_attention if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS[name]
        output, _ = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=0.0,
            scaling=self.head_dim**-0.5,
            sliding_window=self.config.sliding_window,
            position_ids=packed_positions,  # where FlashAttention finds the samples of a packed row
        )
        return getattr(self, self.output_name)(output.flatten(2))


class EvoMoeDecoderLayer(nn.Module):
    """Attention, then a dense FFN or a mixture of experts.

    With a parallel residual both read the same norm, and their outputs are added together.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = build_norm(config, config.hidden_size)
        self.self_attn = EvoMoeAttention(config, layer)
        self.post_attention_layernorm = (
            None if config.parallel_residual else build_norm(config, config.hidden_size)
        )
        self.mlp = EvoMoeMixture(config) if layer in config.moe_layers else build_ffn(config)

    def forward(self, hidden, is_vision, *attention_arguments):
        """[b, s, C] to [b, s, C] and the router's logits [b·s, N], None without a router."""
        normed = self.input_layernorm(hidden)
        attended = self.self_attn(normed, *attention_arguments)
        if self.post_attention_layernorm is None:
            fed, logits = self._feed(normed, is_vision)
            return hidden + attended + fed, logits
        hidden = hidden + attended
        fed, logits = self._feed(self.post_attention_layernorm(hidden), is_vision)
        return hidden + fed, logits

    def _feed(self, normed, is_vision):
        return (
            self.mlp(normed, is_vision) if isinstance(self.mlp, EvoMoeMixture) else (self.mlp(normed), None)
        )


class EvoMoeDecoder(nn.Module):
    """Word embeddings, decoder layers, and the final norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(EvoMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm_name = "final_layernorm" if config.parallel_residual else "norm"  # Phi's and Llama's names
        setattr(self, self.norm_name, build_norm(config, config.hidden_size))

    def forward(self, inputs_embeds, is_vision, attention_mask, position_ids, cache):
        """Embeddings [b, s, C] to hidden states [b, s, C] and the router logits of each mixture.

        `is_vision`, bool [b, s], marks image positions.
        """
        seen = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
        # as in transformers' own models, positions that start again begin another sample of a packed row
        packed_positions = position_ids if attention_mask is None and cache is None else None
        if position_ids is None:
            position_ids = _positions(attention_mask, positions, inputs_embeds)
        mask = _mask(self.config, inputs_embeds, attention_mask, cache, positions, packed_positions)
        tables = rotary_tables(self.config, position_ids, inputs_embeds.dtype)
        cache_arguments = ({"cache_position": positions},) if _CACHE_WANTS_POSITIONS else ()
        hidden, router_logits = inputs_embeds, []
        for layer in self.layers:
            hidden, logits = layer(hidden, is_vision, *tables, mask, cache, cache_arguments, packed_positions)
            if logits is not None:
                router_logits.append(logits)
        return getattr(self, self.norm_name)(hidden), tuple(router_logits)


def _positions(attention_mask, positions, inputs_embeds):
    """Position ids [b, s]. In padded rows they count the tokens that are not padding."""
    if attention_mask is None or attention_mask.ndim != 2:
        return positions.expand(inputs_embeds.shape[:2])
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]


def _mask(config, inputs_embeds, attention_mask, cache, positions, packed_positions):
    """transformers' causal mask for the attention function. Its arguments depend on the version."""
    embeds = "inputs_embeds" if "inputs_embeds" in _MASK_ARGUMENTS else "input_embeds"
    arguments = {
        "config": config,
        embeds: inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": cache,
        "position_ids": packed_positions,
    }
    if "cache_position" in _MASK_ARGUMENTS:
        arguments["cache_position"] = positions
    return (create_sliding_window_causal_mask if config.sliding_window else create_causal_mask)(**arguments)


class EvoMoeLanguageModel(nn.Module):
    """Decoder and output layer, with the names that they have in LLaVA files."""

    def __init__(self, config):
        super().__init__()
        self.model = EvoMoeDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)


@dataclass
class EvoMoeOutput(ModelOutput):
    """Output of the model.

    Attributes:
        loss: mean cross entropy of `labels`, if they are given.
        logits: [b, s, V].
        past_key_values: the cache, if it is used.
        router_logits: one float32 tensor [b·s, N] for each mixture, in layer order, if requested.
    """

    loss: Optional[torch.FloatTensor] = None
    logits: Optional[torch.FloatTensor] = None
    past_key_values: Optional[Cache] = None
    router_logits: Optional[tuple[torch.FloatTensor, ...]] = None


class EvoMoePreTrainedModel(PreTrainedModel):
    """Settings and initial weights, as transformers expects them of a model class."""

    config_class = EvoMoeConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules: ClassVar[list[str]] = ["EvoMoeDecoderLayer", "EvoMoeVisionLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _supports_flash_attn = True
    # Servers that pass embeddings alone would silently route image tokens as text, so they must refuse.
    _supports_attention_backend = False

    def _init_weights(self, module):
        """Set initial weights, by torch.nn.init only, which transformers 5 disables for loaded weights."""
        std = self.config.text_config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, EvoMoeRMSNorm)):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, EvoMoeVisionEmbeddings) and module.class_embedding is not None:
            nn.init.normal_(module.class_embedding, std=std)
        elif hasattr(module, "draw_weights"):  # a part of a router
            module.draw_weights(std)


class EvoMoeForConditionalGeneration(EvoMoePreTrainedModel, GenerationMixin):
    """The whole model, which answers to images and text with text."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "language_model.lm_head.weight": "language_model.model.embed_tokens.weight"
    }

    def __init__(self, config):
        super().__init__(config)
        if (
            config.text_config._attn_implementation is None
        ):  # transformers sets it only for parts that are PreTrainedModels
            config.text_config._attn_implementation = config._attn_implementation
        self.vision_tower = EvoMoeVisionTower(config.vision_config)
        self.multi_modal_projector = EvoMoeProjector(config)
        self.language_model = EvoMoeLanguageModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        """The word embeddings."""
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value):
        """Replace the word embeddings."""
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self):
        """The output layer."""
        return self.language_model.lm_head

    def set_output_embeddings(self, value):
        """Replace the output layer."""
        self.language_model.lm_head = value

    def get_image_features(self, pixel_values, **ignored):
        """Normalised pixels [n, 3, S, S] to features [n, p, C]."""
        return self.multi_modal_projector(self.vision_tower(pixel_values))

    def embed(self, input_ids, pixel_values=None):
        """Embed text and images.

        Args:
            input_ids: int64 [b, s].
            pixel_values: the images of all rows in order, [n, 3, S, S].

        Returns:
            Embeddings [b, s, C], and bool [b, s] that marks image positions.

        Raises:
            ValueError: the number of image positions does not fit the number of images.
        """
        is_vision = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(
            input_ids.masked_fill(is_vision, 0)  # the image token may have no embedding
        )
        if pixel_values is None:
            return embeds, is_vision
        features = self.get_image_features(pixel_values).flatten(0, 1).to(embeds)
        if int(is_vision.sum()) != len(features):
            raise ValueError(
                f"input_ids has {int(is_vision.sum())} image tokens, but pixel_values gives {len(features)} "
                f"image features; each image takes {self.config.image_seq_length} tokens of id "
                f"{self.config.image_token_id}"
            )
        return embeds.masked_scatter(is_vision[..., None], features), is_vision

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        image_mask=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        output_router_logits=False,
        return_dict=None,
        **ignored,
    ):
        """Compute next-token logits.

        Args:
            input_ids: int64 [b, s], with `config.image_token_id` at every image position.
            attention_mask: [b, cached tokens + s], 0 at padding, which may be on either side.
            position_ids: int64 [b, s]. Without `attention_mask` and without a cache (use_cache=False, or in
                training), a row may hold several samples, whose positions each start at 0; no sample attends
                to another.
            inputs_embeds: [b, s, C], instead of `input_ids`.
            image_mask: bool [b, s], with `inputs_embeds`: marks image positions for the routers. Without it
                all positions are text.
            pixel_values: normalised pixels [n, 3, S, S], with `input_ids`.
            labels: int64 [b, s], not shifted; -100 at positions without a label. The loss has no
                load-balancing term.
            logits_to_keep: compute the logits of this many last positions, 0 for all; or a tensor of
                positions.
            output_router_logits: return the router logits of each mixture.

        Returns:
            An `EvoMoeOutput`.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds` are given, `pixel_values` is given
                with `inputs_embeds`, or the number of image positions does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both")
        if input_ids is not None:
            inputs_embeds, is_vision = self.embed(input_ids, pixel_values)
        elif pixel_values is not None:
            raise ValueError(
                "pixel_values needs input_ids; with inputs_embeds, put the image features into it and give "
                "image_mask"
            )
        else:
            is_vision = (
                inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.bool)
                if image_mask is None
                else image_mask
            )
        use_cache = (labels is None and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden, router_logits = self.language_model.model(
            inputs_embeds, is_vision, attention_mask, position_ids, past_key_values
        )
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.language_model.lm_head(hidden[:, kept])
        output = EvoMoeOutput(
            loss=None if labels is None else _loss(logits, labels),
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            router_logits=router_logits if output_router_logits else None,
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self, input_ids, *args, inputs_embeds=None, pixel_values=None, **kwargs
    ):
        """Arguments of one generation step; images are given in the first step, later the cache has them."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        cache = inputs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            inputs["pixel_values"] = pixel_values
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, pixel_values=None, **kwargs
    ):
        """Repeat rows for beams and for several answers.

        The images of a row are repeated together; transformers would repeat each by itself, in a wrong order.
        """
        if pixel_values is not None and input_ids is not None:
            counts = (input_ids == self.config.image_token_id).sum(-1) // self.config.image_seq_length
            pixel_values = torch.cat(
                [images.repeat(expand_size, 1, 1, 1) for images in pixel_values.split(counts.tolist())]
            )
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, "pixel_values": pixel_values}


def _loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


__all__ = ["EvoMoeForConditionalGeneration", "EvoMoePreTrainedModel"]
