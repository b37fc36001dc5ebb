"""The image encoder (CLIP's or SigLIP's), and the projector to the decoder's width.

Shapes: n images · p positions · V width of the tower · C width of the decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN


class EvoMoeVisionEmbeddings(nn.Module):
    """Patch embeddings, after CLIP's class token, plus position embeddings."""

    def __init__(self, config):
        super().__init__()
        is_clip = config.tower == "clip"
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if is_clip else None
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, config.patch_size, config.patch_size, bias=not is_clip
        )
        self.position_embedding = nn.Embedding(patches + int(is_clip), config.hidden_size)

    def forward(self, pixel_values):
        """[n, 3, S, S] to [n, p, V]."""
        hidden = (
            self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
            .flatten(2)
            .transpose(1, 2)
        )
        if self.class_embedding is not None:
            hidden = torch.cat([self.class_embedding.expand(len(hidden), 1, -1), hidden], dim=1)
        return hidden + self.position_embedding.weight


class EvoMoeVisionAttention(nn.Module):
    """Attention of every position to all positions."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, hidden):
        """[n, p, V] to [n, p, V]."""
        query, key, value = (
            projection(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class EvoMoeVisionMLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN["quick_gelu" if config.tower == "clip" else "gelu_pytorch_tanh"]

    def forward(self, hidden):
        """[n, p, V] to [n, p, V]."""
        return self.fc2(self.act(self.fc1(hidden)))


class EvoMoeVisionLayer(nn.Module):
    """Attention and MLP, each after a norm and with a residual."""

    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = EvoMoeVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EvoMoeVisionMLP(config)

    def forward(self, hidden):
        """[n, p, V] to [n, p, V]."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class EvoMoeVisionEncoder(nn.Module):
    """The layers of the tower."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(EvoMoeVisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden):
        """[n, p, V] to [n, p, V]."""
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class EvoMoeVisionTransformer(nn.Module):
    """The tower up to its feature layer, without a norm after it."""

    def __init__(self, config):
        super().__init__()
        is_clip = config.tower == "clip"
        self.embeddings = EvoMoeVisionEmbeddings(config)
        # misspelled as in CLIP's files
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if is_clip else None
        self.encoder = EvoMoeVisionEncoder(config)
        self.num_skipped = int(is_clip and not config.keep_class_token)

    def forward(self, pixel_values):
        """[n, 3, S, S] to features [n, p, V]."""
        hidden = self.embeddings(pixel_values)
        if self.pre_layrnorm is not None:
            hidden = self.pre_layrnorm(hidden)
        return self.encoder(hidden)[:, self.num_skipped :]


class EvoMoeVisionTower(nn.Module):
    """Holds the tower under the name that it has in LLaVA files."""

    def __init__(self, config):
        super().__init__()
        self.vision_model = EvoMoeVisionTransformer(config)

    def forward(self, pixel_values):
        """[n, 3, S, S] to features [n, p, V]."""
        return self.vision_model(pixel_values)


class EvoMoeProjector(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, config):
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features):
        """[n, p, V] to [n, p, C]."""
        return self.linear_2(F.gelu(self.linear_1(features)))
