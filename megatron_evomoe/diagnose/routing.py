"""Which expert gets which tokens: counts, divergences and the shuffle test.

The functions take and return plain tensors and do not communicate.

Shapes: L MoE layers (in order of depth, from 0), E experts, T tokens, M = 2 modalities in the order of
`MODALITIES`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_evomoe.config.token_types import TokenType

MODALITIES = ("text", "vision")


class ShareCounter:
    """Counts, for each layer and modality, the tokens that each expert was given. Padding is not counted.

    `counts` is int64 [L, M, E] on `device`; use the model's device, because each `add` would synchronise with
    it otherwise. Before reading, sum `counts` in place over the ranks that hold other tokens (data, sequence
    and context parallel ranks).
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(num_layers, len(MODALITIES), num_experts, dtype=torch.int64, device=device)

    def add(self, layer: int, token_types: Tensor, routing_map: Tensor) -> None:
        """Count the tokens of one forward through MoE layer `layer`.

        The count is a matrix product, which needs no device synchronisation.

        Args:
            token_types: int [T], or any shape of T elements, of `TokenType`.
            routing_map: bool [T, E], in the same token order.

        Raises:
            ValueError: the two differ in T, or the map has another number of experts.
        """
        token_types, experts = token_types.reshape(-1), self.counts.shape[-1]
        if routing_map.shape != (token_types.numel(), experts):
            raise ValueError(
                f"routing_map has shape {tuple(routing_map.shape)}; {token_types.numel()} token types and "
                f"{experts} experts need ({token_types.numel()}, {experts})"
            )
        is_modality = torch.stack([token_types == TokenType.TEXT, token_types == TokenType.VISION])  # [M, T]
        # float64: a matrix product that exists on every device and counts exactly
        counted = is_modality.double() @ routing_map.to(is_modality.device).double()
        self.counts[layer] += counted.to(self.counts)

    def shares(self) -> Tensor:
        """The share of each expert, float64 [L, M, E]; see `normalise`."""
        return normalise(self.counts)

    def reset(self) -> None:
        """Set all counts to zero, in place."""
        self.counts.zero_()


def normalise(counts: Tensor) -> Tensor:
    """Counts [..., E] to shares [..., E] in float64 that sum to 1.

    All shares are nan where nothing was counted, so that 0 always means that the other experts got the
    tokens.
    """
    counts = counts.double()
    return counts / counts.sum(-1, keepdim=True)


def max_overload_factor(counts: Tensor) -> Tensor:
    """The load of the busiest expert divided by the mean load: counts [L, M, E] to [L].

    1 means balance, E means that one expert gets all tokens, nan means that there was no token.
    """
    load = counts.double().sum(1)
    return load.amax(-1) / load.mean(-1)


def dead_experts(counts: Tensor) -> Tensor:
    """Experts that got no token: counts [L, M, E] to bool [L, E]; none in a layer without tokens."""
    load = counts.sum(1)
    return (load == 0) & (load.sum(-1, keepdim=True) > 0)


def modality_divergence(shares: Tensor) -> Tensor:
    """Jensen-Shannon divergence, in bits, of the shares of text and vision: [L, M, E] to [L] in [0, 1].

    0 means that both modalities use the experts alike, 1 that they share no expert; nan means that a modality
    had no token.
    """
    p, q = shares.double().unbind(1)
    middle = (p + q) / 2
    # rounding leaves ±1e-16 around 0 and 1; clamp passes nan through
    return ((_kl_bits(p, middle) + _kl_bits(q, middle)) / 2).clamp(0.0, 1.0)


def _kl_bits(p: Tensor, q: Tensor) -> Tensor:
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1) / torch.log(
        torch.tensor(2.0, dtype=p.dtype)
    )


def share_metrics(counts: Tensor, layers: list[int]) -> dict[str, float]:
    """Shares, divergence, overload and dead experts as named metrics; values that are nan are left out.

    Args:
        counts: int64 [L, M, E].
        layers: the number of each MoE layer in the decoder, from 0.
    """
    counts = counts.cpu()  # one device synchronisation instead of one per number
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

    Each token draws a random key and the `capacity` tokens with the largest keys stay, so that the samples of
    several ranks merge exactly. The same seed and the same tokens give the same sample. Give each rank a seed
    of its own, because equal seeds draw equal keys.
    """

    def __init__(self, num_layers: int, num_experts: int, capacity: int = 1000, seed: int = 0):
        # float64 [L, M, capacity, 1 + E]: the key, then the logits; key −1 marks an empty slot
        self.state = torch.full(
            (num_layers, len(MODALITIES), capacity, 1 + num_experts), -1.0, dtype=torch.float64
        )
        # one generator for each layer and modality: the sample must not depend on the order of the layers'
        # calls
        self._generators = [
            [
                torch.Generator().manual_seed(seed * 1_000_003 + layer * len(MODALITIES) + m)
                for m in range(len(MODALITIES))
            ]
            for layer in range(num_layers)
        ]

    def add(self, layer: int, token_types: Tensor, logits: Tensor) -> None:
        """Offer the tokens of one forward through MoE layer `layer`.

        Copies both tensors to the CPU, which synchronises with the device: call it on few steps.

        Args:
            token_types: int, T elements of `TokenType`.
            logits: float [T, E].
        """
        token_types, logits = token_types.reshape(-1).cpu(), logits.detach().double().cpu()
        for m, modality in enumerate((TokenType.TEXT, TokenType.VISION)):
            chosen = logits[token_types == modality]
            # float64, because the largest of 10⁸ float32 keys would be equal, which would favour early tokens
            keys = torch.rand(len(chosen), 1, generator=self._generators[layer][m], dtype=torch.float64)
            self.state[layer, m] = _largest_keys(
                torch.cat([self.state[layer, m], torch.cat([keys, chosen], 1)]), self.state.shape[2]
            )

    def merge(self, states: Tensor) -> None:
        """Become the sample of all ranks, given `state` of each of them: [ranks, L, M, capacity, 1 + E]."""
        pooled = states.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [L, M, ranks · capacity, 1 + E]
        for layer in range(pooled.shape[0]):
            for m in range(pooled.shape[1]):
                self.state[layer, m] = _largest_keys(pooled[layer, m].cpu(), self.state.shape[2])

    def values(self, layer: int, modality: int) -> Tensor:
        """The logits kept of `modality` (TEXT or VISION): float64 [n, E], n ≤ capacity."""
        cell = self.state[layer, modality]
        return cell[cell[:, 0] >= 0, 1:]


def _largest_keys(rows: Tensor, count: int) -> Tensor:
    order = torch.sort(rows[:, 0], descending=True, stable=True).indices[:count]
    return rows[order]


def draw_permutations(num_tokens: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """One permutation of the experts for each token: int64 [T, E] on the generator's device.

    All permutations are equally likely, so an expert keeps its place with probability 1 / E.
    """
    shape = (num_tokens, num_experts)
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).argsort(-1)


def shuffle_routing(routing_map: Tensor, probs: Tensor, permutations: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's shuffle test: what went to expert e goes to permutations[t, e], with the same gate value.

    If the score hardly drops, the experts are interchangeable. Each token keeps its number of experts and its
    gate values, so any top-k and dropped tokens are fine.

    Args:
        routing_map: bool [T, E].
        probs: float [T, E].
        permutations: int64 [T, E], of `draw_permutations`; ranks that share a token must pass equal ones.

    Returns:
        A new routing map and new probs.

    Raises:
        ValueError: the permutations have another shape.
    """
    if permutations.shape != routing_map.shape:
        raise ValueError(
            f"permutations have shape {tuple(permutations.shape)}; the routing_map has "
            f"{tuple(routing_map.shape)}, and they need the same"
        )
    permutations = permutations.to(routing_map.device)
    return (
        torch.zeros_like(routing_map).scatter(1, permutations, routing_map),
        torch.zeros_like(probs).scatter(1, permutations, probs),
    )
