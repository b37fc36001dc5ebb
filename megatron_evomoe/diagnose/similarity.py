"""How similar the weights of the experts are; plain tensors in and out, no communication.

Shapes: E experts, P weights of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Weights per expert that are converted to float64 at a time.

An expert of the 7B model has 10⁸ weights, and a float64 copy of all of them would not fit beside it.
"""


def expert_gram(weights: Tensor, *, centred: bool = False) -> Tensor:
    """Inner products of the experts of one layer: [E, P] to float64 [E, E].

    The result is a sum over P. Where tensor parallelism shards the weights, sum the results of the shards
    over the ranks before calling `cosine_from_gram`.

    Args:
        weights: float [E, P], the flattened weights of each expert.
        centred: subtract the mean of the experts first. Experts that started from one FFN differ by a
            thousandth of their norm, so the cosine of their weights is near 1 whatever they learned; the
            cosine of their differences from the mean tells whether they moved the same way (1), independently
            (near 0) or apart (below 0). The differences sum to zero: E independent experts have −1 / (E − 1).
    """
    weights = weights.detach()
    gram = torch.zeros(len(weights), len(weights), dtype=torch.float64, device=weights.device)
    for part in weights.split(CHUNK, dim=1):
        part = part.double()
        if centred:
            part = part - part.mean(0)
        gram += part @ part.T
    return gram


def cosine_from_gram(gram: Tensor) -> Tensor:
    """Inner products [..., E, E] to cosines in [−1, 1], float64.

    An expert whose vector is zero has cosine 1 with other such experts and 0 with the rest.
    """
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = norm[..., :, None] * norm[..., None, :]
    cosine = torch.where(
        scale > 0, gram / scale.clamp(min=torch.finfo(gram.dtype).tiny), torch.zeros_like(gram)
    )
    both_zero = (norm[..., :, None] == 0) & (norm[..., None, :] == 0)
    return torch.where(both_zero, torch.ones_like(cosine), cosine).clamp(-1.0, 1.0)
