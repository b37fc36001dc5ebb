"""A LLaVA with top-2 experts built of transformers' modules as in MoE-LLaVA, an alternative to this package.

CLIP, the two linear maps and Qwen2 are transformers' own, with SDPA. Every k-th FFN is replaced by a linear
router and experts of the FFN's architecture. Tokens are dispatched by a loop, or as in DeepSpeed by products
with one-hot dispatch and combine tensors. No token is dropped: the capacity of the one-hot tensors is the
number of tokens of the fullest expert. DeepSpeed's noise in the second choice is left out, so that losses can
be compared.

T tokens · C width · N experts · K capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.data.image import processor_for
from megatron_evomoe.hf.tensor_map import Entry, NameMap


def by_loop(x_TC: Tensor, weights_T2: Tensor, chosen_T2: Tensor, experts: nn.ModuleList) -> Tensor:
    """Apply each expert to its tokens, one expert after the other."""
    out = torch.zeros_like(x_TC)
    for i, expert in enumerate(experts):
        token, place = (chosen_T2 == i).nonzero(as_tuple=True)
        out.index_add_(0, token, expert(x_TC[token]) * weights_T2[token, place, None].to(x_TC.dtype))
    return out


def by_einsum(x_TC: Tensor, weights_T2: Tensor, chosen_T2: Tensor, experts: nn.ModuleList) -> Tensor:
    """Dispatch tokens to [N, K, C] and back by dense products with one-hot tensors [T, N, K].

    First choices are placed before second choices.
    """
    T, N = len(x_TC), len(experts)
    mask_2TN = F.one_hot(chosen_T2.t(), N)
    places = (mask_2TN.reshape(2 * T, N).cumsum(0) - 1).view(2, T, N)
    capacity = int(mask_2TN.sum((0, 1)).max())
    place_2T = (places * mask_2TN).sum(-1)
    slots_2TK = F.one_hot(place_2T, capacity).to(x_TC.dtype)
    routed_2TN = mask_2TN.to(x_TC.dtype)
    combine = torch.einsum("jt,jtn,jtk->tnk", weights_T2.t().to(x_TC.dtype), routed_2TN, slots_2TK)
    dispatch = torch.einsum("jtn,jtk->tnk", routed_2TN, slots_2TK)
    given_NKC = torch.einsum("tnk,tc->nkc", dispatch, x_TC)
    done_NKC = torch.stack([expert(given_NKC[i]) for i, expert in enumerate(experts)])
    return torch.einsum("tnk,nkc->tc", combine, done_NKC)


DISPATCH: dict[str, Callable[..., Tensor]] = {"loop": by_loop, "einsum": by_einsum}


class TopTwo(nn.Module):
    """MoE layer with two experts per token, weighted by their renormalised probabilities.

    `balance` holds the load-balancing loss of the last forward.
    """

    def __init__(self, width: int, experts: list[nn.Module]) -> None:
        super().__init__()
        self.router = nn.Linear(width, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)
        self.dispatch = "loop"
        self.balance: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        x_TC = hidden.flatten(0, -2)
        probs_TN = F.linear(x_TC.float(), self.router.weight.float()).softmax(-1)
        best_T2, chosen_T2 = probs_TN.topk(2)
        load_N = F.one_hot(chosen_T2, len(self.experts)).sum((0, 1)) / chosen_T2.numel()
        self.balance = len(self.experts) * (load_N * probs_TN.mean(0)).sum()
        weights_T2 = best_T2 / best_T2.sum(-1, keepdim=True)
        return DISPATCH[self.dispatch](x_TC, weights_T2, chosen_T2, self.experts).view_as(hidden)


class Peer(nn.Module):
    """Vision tower, projector and decoder, with the parameter names of our Hugging Face exports."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.coefficient = config.moe.moe_aux_loss_coeff
        self.normalize = processor_for(config).normalize
        self.vision_tower = _tower(config)
        C, Cv = config.language.hidden_size, config.vision.hidden_size
        self.multi_modal_projector = nn.ModuleDict(
            {"linear_1": nn.Linear(Cv, C), "linear_2": nn.Linear(C, C)}
        )
        self.language_model = _decoder(config)
        self.mixtures = [
            layer.mlp for layer in self.language_model.model.layers if isinstance(layer.mlp, TopTwo)
        ]

    def forward(self, tokens: Tensor, types: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the supervised tokens, to which the caller adds `balance`."""
        first, second = self.multi_modal_projector["linear_1"], self.multi_modal_projector["linear_2"]
        with torch.no_grad():
            features = self.vision_tower(self.normalize(pixels, first.weight.dtype)).last_hidden_state
        images = second(F.gelu(first(features[:, 1:])))
        words = self.language_model.model.embed_tokens(tokens)
        spliced = words.masked_scatter((types == TokenType.VISION)[..., None], images.to(words.dtype))
        logits = self.language_model(inputs_embeds=spliced, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)

    def balance(self) -> Tensor:
        """Load-balancing loss of the last forward, times its coefficient."""
        return self.coefficient * sum(mixture.balance for mixture in self.mixtures)

    def use(self, dispatch: str) -> None:
        """Use this dispatch, a key of `DISPATCH`, in all MoE layers."""
        for mixture in self.mixtures:
            mixture.dispatch = dispatch

    def train_parts(self, parts: tuple[str, ...]) -> list[nn.Parameter]:
        """Train only these parts (`router`, `experts` or both) and return their parameters."""
        self.requires_grad_(False)
        for mixture in self.mixtures:
            for part in parts:
                getattr(mixture, part).requires_grad_(True)
        return [p for p in self.parameters() if p.requires_grad]


def _tower(config: RunConfig) -> nn.Module:
    v = config.vision
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=v.hidden_size,
            intermediate_size=v.ffn_hidden_size,
            num_hidden_layers=v.num_layers_used,
            num_attention_heads=v.num_attention_heads,
            image_size=v.image_size,
            patch_size=v.patch_size,
            layer_norm_eps=v.norm_epsilon,
            attn_implementation="sdpa",
        )
    )


def _decoder(config: RunConfig) -> nn.Module:
    lm = config.language
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=lm.vocab_size,
            hidden_size=lm.hidden_size,
            intermediate_size=lm.ffn_hidden_size,
            num_hidden_layers=lm.num_layers,
            num_attention_heads=lm.num_attention_heads,
            num_key_value_heads=lm.query_groups,
            max_position_embeddings=lm.max_position_embeddings,
            rms_norm_eps=lm.norm_epsilon,
            tie_word_embeddings=lm.tie_word_embeddings,
            rope_theta=float(lm.rotary_base),
            attn_implementation="sdpa",
        )
    )
    for i, layer in enumerate(model.model.layers):
        if config.moe.is_moe_layer(i):
            experts = [type(layer.mlp)(model.config) for _ in range(config.moe.num_experts)]
            layer.mlp = TopTwo(lm.hidden_size, experts)
    return model


def load(peer: Peer, ours: nn.Module, config: RunConfig) -> None:
    """Give the peer the weights of our `route` model."""
    weights = dict(ours.named_parameters())
    named: dict[str, Tensor] = {}
    for entry in NameMap(config, "route").entries:
        named |= entry.to_hf(_core_tensor(entry, weights).detach())
    # transformers 5 dropped a level of the tower's names.
    if not any(".vision_model." in name for name in peer.state_dict()):
        named = {
            name.replace("vision_tower.vision_model.", "vision_tower."): value
            for name, value in named.items()
        }
    result = peer.load_state_dict(named, strict=False)
    # CLIP's post_layernorm comes after the layer whose output is the feature, so it needs no weights.
    missing = [name for name in result.missing_keys if "post_layernorm" not in name]
    if missing or result.unexpected_keys:
        raise ValueError(f"weights do not fit: {missing} are missing, {result.unexpected_keys} are too many")


def _core_tensor(entry: Entry, weights: Mapping[str, Any]) -> Tensor:
    """Parameter of our module that holds `entry`.

    Its name depends on the layers: experts are separate modules or one grouped product, and norms are
    separate or part of the linear layer after them.
    """
    apart = entry.core.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.")
    names = [entry.core, apart, apart.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")]
    if entry.expert is not None:
        names += [
            entry.core.replace(".experts.experts.", f".experts.local_experts.{entry.expert}."),
            f"{entry.core.replace('.experts.experts.', '.experts.')}{entry.expert}",
        ]
    return next(weights[name] for name in names if name in weights)
