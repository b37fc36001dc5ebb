"""Who gets which token: counts, divergences and the shuffle test. Plain tensors in and out; nothing here
communicates.

Shapes: L MoE layers (in order of depth, from 0), E experts, T tokens, M = 2 modalities in the order of
`MODALITIES`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.diagnose.similarity import (  # noqa: F401  (one door to the measures)
    cosine_from_gram,
    expert_gram,
    expert_similarity,
    mean_off_diagonal,
    output_cosines,
    output_similarity,
)

MODALITIES = ("text", "vision")


class ShareCounter:
    """Counts, per layer and modality, the tokens each expert was given. Padding is left out.

    `counts` is int64 [L, M, E] on `device` (the model's, or each `add` waits for it). Sum it in place over
    the ranks that saw other tokens (data, sequence and context parallel) before reading.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(num_layers, len(MODALITIES), num_experts, dtype=torch.int64, device=device)

    def add(self, layer: int, token_types: Tensor, routing_map: Tensor) -> None:
        """Count one forward of MoE layer `layer`.

        token_types: int [T] or any shape of T elements; 0 text, 1 vision, 2 padding.
        routing_map: bool [T, E], in the same token order. Masked by multiplication, so that a device is not
        waited for.

        Raises:
            ValueError: the two disagree on T, or the map on E.
        """
        token_types, experts = token_types.reshape(-1), self.counts.shape[-1]
        if routing_map.shape != (token_types.numel(), experts):
            raise ValueError(
                f"routing_map has shape {tuple(routing_map.shape)}; {token_types.numel()} token types and "
                f"{experts} "
                f"experts need ({token_types.numel()}, {experts})"
            )
        is_modality = torch.stack([token_types == TokenType.TEXT, token_types == TokenType.VISION])  # [M, T]
        # float64: a matrix product that exists on every device and counts exactly
        counted = is_modality.double() @ routing_map.to(is_modality.device).double()
        self.counts[layer] += counted.to(self.counts)

    def shares(self) -> Tensor:
        """float64 [L, M, E]; see `normalise`."""
        return normalise(self.counts)

    def reset(self) -> None:
        """Back to zero, in place."""
        self.counts.zero_()


def normalise(counts: Tensor) -> Tensor:
    """counts [..., E] -> shares [..., E] float64 that sum to 1; all nan where nothing was counted (no share
    is 0 by absence).
    """
    counts = counts.double()
    return counts / counts.sum(-1, keepdim=True)


def max_overload_factor(counts: Tensor) -> Tensor:
    """Busiest expert's load over an even share: [L, M, E] -> [L]; 1 is balanced, E is collapse, nan means no
    token.
    """
    load = counts.double().sum(1)
    return load.amax(-1) / load.mean(-1)


def dead_experts(counts: Tensor, threshold: float = 0.0) -> Tensor:
    """Experts whose load is at most `threshold` × an even share: [L, M, E] -> bool [L, E]. Layers without
    tokens have none.
    """
    load = counts.double().sum(1)
    even = load.mean(-1, keepdim=True)
    return (load <= threshold * even) & (even > 0)


def modality_divergence(shares: Tensor) -> Tensor:
    """Jensen-Shannon divergence in bits between vision's and text's expert distributions: [L, M, E] -> [L] in
    [0, 1].

    0: both modalities use the experts alike. 1: they share no expert. nan where a modality had no token.
    """
    p, q = shares.double().unbind(1)
    middle = (p + q) / 2
    # rounding leaves ±1e-16 around the ends; nan passes through
    return ((_kl_bits(p, middle) + _kl_bits(q, middle)) / 2).clamp(0.0, 1.0)


def _kl_bits(p: Tensor, q: Tensor) -> Tensor:
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1) / torch.log(
        torch.tensor(2.0, dtype=p.dtype)
    )


def share_metrics(counts: Tensor, layers: list[int]) -> dict[str, float]:
    """counts [L, M, E] as named metrics: shares, divergence, overload; `layers` are the decoder's, from 0.
    nan is left out.
    """
    counts = counts.cpu()  # one wait for the device, not one per number
    shares = normalise(counts)
    divergence, overload = modality_divergence(shares), max_overload_factor(counts)
    metrics = {
        f"moe/share_{modality}/layer_{number}/expert_{e}": shares[i, m, e].item()
        for i, number in enumerate(layers)
        for m, modality in enumerate(MODALITIES)
        for e in range(counts.shape[-1])
    }
    metrics |= {
        f"moe/modality_divergence_layer_{number}": divergence[i].item() for i, number in enumerate(layers)
    }
    metrics["moe/max_overload_factor"] = overload.nan_to_num(0.0).max().item()
    metrics["moe/dead_experts"] = float(dead_experts(counts).sum())
    return {name: value for name, value in metrics.items() if value == value}


class LogitSample:
    """A bounded, uniform sample of router logits per layer and modality, for density plots.

    Each token draws a random key and the `capacity` largest keys stay: a reservoir that merges exactly over
    ranks. The same seed and the same stream give the same sample; ranks need different seeds (seed + rank),
    or their draws coincide.
    """

    def __init__(self, num_layers: int, num_experts: int, capacity: int = 1000, seed: int = 0):
        # float64 [L, M, capacity, 1 + E]: key, then logits; key −1 marks an empty slot
        self.state = torch.full(
            (num_layers, len(MODALITIES), capacity, 1 + num_experts), -1.0, dtype=torch.float64
        )
        # one stream per cell: the sample must not depend on the order in which layers report
        self._generators = [
            [
                torch.Generator().manual_seed(seed * 1_000_003 + layer * len(MODALITIES) + m)
                for m in range(len(MODALITIES))
            ]
            for layer in range(num_layers)
        ]

    def add(self, layer: int, token_types: Tensor, logits: Tensor) -> None:
        """token_types: int, T elements. logits: float [T, E], copied to the CPU (waits for the device: call
        it on few steps).
        """
        token_types, logits = token_types.reshape(-1).cpu(), logits.detach().double().cpu()
        for m, kind in enumerate((TokenType.TEXT, TokenType.VISION)):
            chosen = logits[token_types == kind]
            # float64: the largest of 10⁸ float32 keys would tie, and ties favour early tokens
            keys = torch.rand(len(chosen), 1, generator=self._generators[layer][m], dtype=torch.float64)
            self.state[layer, m] = _largest_keys(
                torch.cat([self.state[layer, m], torch.cat([keys, chosen], 1)]), self.state.shape[2]
            )

    def merge(self, states: Tensor) -> None:
        """Become the sample of all ranks: states [ranks, L, M, capacity, 1 + E], every rank's `state`, this
        one's included.
        """
        pooled = states.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [L, M, ranks · capacity, 1 + E]
        for layer in range(pooled.shape[0]):
            for m in range(pooled.shape[1]):
                self.state[layer, m] = _largest_keys(pooled[layer, m].cpu(), self.state.shape[2])

    def values(self, layer: int, modality: int) -> Tensor:
        """float64 [n, E], n ≤ capacity: what was kept of `modality` (TEXT or VISION)."""
        cell = self.state[layer, modality]
        return cell[cell[:, 0] >= 0, 1:]


def _largest_keys(rows: Tensor, count: int) -> Tensor:
    order = torch.sort(rows[:, 0], descending=True, stable=True).indices[:count]
    return rows[order]


def draw_permutation(
    mode: Literal["permute", "random"], num_tokens: int, num_experts: int, generator: torch.Generator
) -> Tensor:
    """What `shuffle_routing` takes: int64 on the generator's device.

    permute: one permutation [E] for all tokens of the layer: experts swap places, tokens that went together
    stay together. random: one per token [T, E]: each token goes to uniformly drawn experts, so a trained
    router's knowledge is all gone. Both are uniform over all permutations, so an expert keeps its place one
    time in E.

    Raises:
        ValueError: another mode.
    """
    if mode not in ("permute", "random"):
        raise ValueError(f"shuffle mode {mode!r} is not one of permute, random")
    shape = (num_experts,) if mode == "permute" else (num_tokens, num_experts)
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).argsort(-1)


def shuffle_routing(routing_map: Tensor, probs: Tensor, permutation: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's shuffle test: what went to expert e goes to expert permutation[..., e], with the same gate
    value.

    If the score hardly drops, the experts are interchangeable. Works for any top-k and for dropped tokens,
    since each token's number of experts and its gate values stay.

    routing_map: bool [T, E]. probs: float [T, E]. permutation: int64 [E] or [T, E] (`draw_permutation`).
    Returns new tensors; where ranks share a token (TP), the caller gives them equal permutations.

    Raises:
        ValueError: the permutation has another shape.
    """
    if permutation.shape not in (routing_map.shape, routing_map.shape[1:]):
        raise ValueError(
            f"permutation has shape {tuple(permutation.shape)}; a routing_map of {tuple(routing_map.shape)} "
            "needs "
            f"{tuple(routing_map.shape[1:])} or {tuple(routing_map.shape)}"
        )
    target = permutation.to(routing_map.device).expand(routing_map.shape)
    return (
        torch.zeros_like(routing_map).scatter(1, target, routing_map),
        torch.zeros_like(probs).scatter(1, target, probs),
    )
