"""Routers and mixtures of experts.

Shapes: T tokens · C width · N experts · K experts per token · h, r inner width and rank of the dynamic
router.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN


class EvoMoeFFN(nn.Module):
    """A feed-forward network without a gate: a dense one, or one expert."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.linear_bias)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.linear_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden, scale=None):
        """[…, C] to […, C]; `scale` […, 1] multiplies the output."""
        return scaled_linear(self.fc2, self.act(self.fc1(hidden)), scale)


class EvoMoeGatedFFN(nn.Module):
    """A feed-forward network with a gate: a dense one, or one expert."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.linear_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.linear_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.linear_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden, scale=None):
        """[…, C] to […, C]; `scale` […, 1] multiplies the output."""
        return scaled_linear(self.down_proj, self.act(self.gate_proj(hidden)) * self.up_proj(hidden), scale)


def scaled_linear(linear, inner, scale):
    """The output of `linear` times `scale`.

    As in training, the scale multiplies the input and the bias.
    """
    if scale is None:
        return linear(inner)
    output = F.linear((inner * scale).to(inner.dtype), linear.weight)
    return output if linear.bias is None else output + (linear.bias * scale).to(output.dtype)


def build_ffn(config):
    """A feed-forward network of the decoder's kind (`gated_ffn`)."""
    return EvoMoeGatedFFN(config) if config.gated_ffn else EvoMoeFFN(config)


class EvoMoeHyperNetwork(nn.Module):
    """Computes the weights of a small router for each token z of one modality: Θ(z) = W2·(W1·z + b1) + b2.

    The last slice of `weight2_*` along the first axis is the bias b2. `weight2_up` is stored transposed.
    """

    def __init__(self, config):
        super().__init__()
        width, inner, rank = config.hidden_size, config.dtr_hidden_size, config.dtr_rank
        self.weight1 = nn.Parameter(torch.empty(inner, width))
        self.bias1 = nn.Parameter(torch.empty(inner))
        self.weight2_down = nn.Parameter(torch.empty(inner + 1, 2 * rank, width))
        self.weight2_up = nn.Parameter(torch.empty(inner + 1, rank, width))
        self.activation = config.dtr_activation

    def draw_weights(self, std):
        """Random weights for a model that is not loaded."""
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name == "bias1" else nn.init.normal_(parameter, std=std)

    def forward(self, tokens, phi):
        """Logits [T, N] of tokens [T, C]: φ·Θ_up·SwiGLU(Θ_down·z), all in float32.

        Θ is never stored. With e = W1·z + b1, after the activation, it is linear in ê = [e, 1], so Θ_down·z
        is one matrix product and a sum weighted by ê, and φ is multiplied into W2_up once for all tokens.
        """
        down, up = self.weight2_down.float(), self.weight2_up.float()
        terms, rank, width = up.shape
        e = tokens @ self.weight1.float().t() + self.bias1.float()
        if self.activation != "none":
            e = ACT2FN[self.activation](e)
        e = F.pad(e, (0, 1), value=1.0)[:, None]
        projected = (tokens @ down.flatten(0, 1).t()).view(-1, terms, 2 * rank)
        gate, value = torch.bmm(e, projected)[:, 0].chunk(2, dim=-1)
        folded = F.linear(up.reshape(-1, width), phi).view(terms, rank, len(phi))
        of_each_term = ((F.silu(gate) * value) @ folded.transpose(0, 1).reshape(rank, -1)).view(
            -1, terms, len(phi)
        )
        return torch.bmm(e, of_each_term)[:, 0]


class EvoMoeDynamicRouter(nn.Module):
    """EvoMoE's dynamic token-aware router: a hypernetwork for each modality, one map φ to logits."""

    def __init__(self, config):
        super().__init__()
        self.text, self.vision = EvoMoeHyperNetwork(config), EvoMoeHyperNetwork(config)
        self.phi = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, tokens, is_vision):
        """Logits [T, N] in float32. Each token passes through the hypernetwork of its modality."""
        tokens, phi = tokens.float(), self.phi.weight.float()
        logits = tokens.new_empty(len(tokens), len(phi))
        for network, mask in ((self.text, ~is_vision), (self.vision, is_vision)):
            index = mask.nonzero()[:, 0]
            logits = logits.index_copy(0, index, network(tokens[index], phi))
        return logits


class EvoMoeLinearRouter(nn.Linear):
    """One linear map for all tokens, with a bias if all linear layers have one."""

    def __init__(self, config):
        super().__init__(config.hidden_size, config.num_experts, bias=config.linear_bias)

    def forward(self, tokens, is_vision):
        """Logits [T, N] in float32."""
        return F.linear(tokens.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class EvoMoeModalityLinearRouter(nn.Module):
    """One linear map for each modality."""

    def __init__(self, config):
        super().__init__()
        self.text = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.vision = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, tokens, is_vision):
        """Logits [T, N] in float32."""
        both = F.linear(tokens.float(), torch.cat([self.text.weight, self.vision.weight]).float())
        of_text, of_vision = both.chunk(2, dim=-1)
        return torch.where(is_vision[:, None], of_vision, of_text)


class EvoMoeCosineRouter(nn.Module):
    """The cosine between a token and each expert's centroid, divided by a learned temperature."""

    def __init__(self, config):
        super().__init__()
        self.centroids = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.log_scale = nn.Parameter(torch.empty(1))

    def draw_weights(self, std):
        """Random weights for a model that is not loaded."""
        nn.init.normal_(self.centroids, std=std)
        nn.init.constant_(self.log_scale, math.log(2))

    def forward(self, tokens, is_vision):
        """Logits [T, N] in float32."""
        tokens, centroids = (F.normalize(v.float(), dim=-1, eps=1e-6) for v in (tokens, self.centroids))
        return tokens @ centroids.t() * self.log_scale.float().clamp(max=math.log(100)).exp()


ROUTERS = {
    "linear": EvoMoeLinearRouter,
    "modality-linear": EvoMoeModalityLinearRouter,
    "dtr": EvoMoeDynamicRouter,
    "cosine": EvoMoeCosineRouter,
}


class EvoMoeMixture(nn.Module):
    """A router and its experts. With the router "none" every token goes to expert 0."""

    def __init__(self, config):
        super().__init__()
        self.router = None if config.router == "none" else ROUTERS[config.router](config)
        self.experts = nn.ModuleList(build_ffn(config) for _ in range(config.num_experts))
        self.top_k, self.gate = config.num_experts_per_tok, config.router_gate

    def forward(self, hidden, is_vision):
        """Hidden states [b, s, C] to the output [b, s, C] and the router's logits [b·s, N].

        `is_vision`, bool [b, s], marks image positions. Without a router the logits are None.
        """
        if self.router is None:
            return self.experts[0](hidden), None
        tokens = hidden.flatten(0, 1)
        logits = self.router(tokens, is_vision.flatten())
        weights, chosen = self.choose(logits)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            output.index_add_(0, token, expert(tokens[token], weights[token, slot, None]))
        return output.view_as(hidden), logits

    def choose(self, logits):
        """Logits [T, N] to weights in float32 and expert indices, both [T, K]. No token is dropped."""
        weights, chosen = torch.softmax(logits, dim=-1).topk(self.top_k, dim=-1)
        if self.gate == "straight_through":
            weights = weights / weights.detach().sum(dim=-1, keepdim=True)
        return weights, chosen
