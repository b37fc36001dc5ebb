"""How alike experts are, by their weights and by what they put out. Plain tensors; nothing here communicates.

Shapes: L MoE layers, E experts, P weights of one expert, T tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = (
    1 << 20
)  # weights per float64 slice: an expert of the 7B model has 10⁸, which twice over would not fit beside it


def expert_similarity(weights: Sequence[Tensor], reference: Sequence[Tensor] | str | None = None) -> Tensor:
    """Pairwise cosine similarity of flattened expert weights.

    weights: one [E, P] per layer.
    reference: what is subtracted first. None: nothing. A sequence of [P], one per layer: for instance the
    stage-I FFN that all
        experts came from. "mean": the experts' own mean.

    Experts that grew from one FFN differ by a thousandth of their norm, so their raw cosine is ~1 whatever
    they learned; the cosine of *differences from the reference* tells whether they moved the same way (1),
    unrelatedly (0) or apart (< 0). With "mean" the differences sum to zero: E unrelated experts score −1/(E −
    1), not 0, and two always score −1.

    Returns float64 [L, E, E]; experts that equal the reference (no direction) are 1 to each other and 0 to
    the rest.

    Raises:
        ValueError: `reference` is another string or has another number of layers.
    """
    if isinstance(reference, str):
        if reference != "mean":
            raise ValueError(f"reference {reference!r}: give None, 'mean' or one tensor [P] per layer")
        references: Sequence[Tensor | str | None] = ["mean"] * len(weights)
    else:
        references = [None] * len(weights) if reference is None else reference
    if len(references) != len(weights):
        raise ValueError(f"{len(references)} references for {len(weights)} layers; give one [P] per layer")
    return torch.stack(
        [cosine_from_gram(expert_gram(w, r)) for w, r in zip(weights, references, strict=True)]
    )


def expert_gram(weights: Tensor, reference: Tensor | str | None = None) -> Tensor:
    """Inner products of one layer's experts: [E, P] -> float64 [E, E], after subtracting the reference.

    A sum over P, so shards of the weights (tensor parallelism) add up: all-reduce the result, then
    `cosine_from_gram`.
    """
    weights = weights.detach()
    gram = torch.zeros(len(weights), len(weights), dtype=torch.float64, device=weights.device)
    for start in range(0, weights.shape[1], CHUNK):
        part = weights[:, start : start + CHUNK].double()
        if isinstance(reference, Tensor):
            part = part - reference.detach()[start : start + CHUNK].to(part)
        elif reference is not None:
            part = part - part.mean(0)
        gram += part @ part.T
    return gram


def cosine_from_gram(gram: Tensor) -> Tensor:
    """[..., E, E] inner products -> cosines in [−1, 1], float64."""
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = norm[..., :, None] * norm[..., None, :]
    cosine = torch.where(
        scale > 0, gram / scale.clamp(min=torch.finfo(gram.dtype).tiny), torch.zeros_like(gram)
    )
    both_zero = (norm[..., :, None] == 0) & (norm[..., None, :] == 0)
    return torch.where(both_zero, torch.ones_like(cosine), cosine).clamp(-1.0, 1.0)


def output_similarity(outputs: Tensor) -> Tensor:
    """Mean pairwise cosine of expert outputs on the same tokens: [E, T, C] -> 0-d float64, over tokens and
    pairs.

    What counts for a user: weights may differ and outputs agree, and the other way round.
    """
    return mean_off_diagonal(output_cosines(outputs))


def output_cosines(outputs: Tensor) -> Tensor:
    """The same before averaging over pairs: [E, T, C] -> float64 [E, E]. An output of zeros has cosine 0."""
    unit = torch.nn.functional.normalize(outputs.detach().double(), dim=-1)
    return torch.einsum("etc,ftc->ef", unit, unit) / outputs.shape[1]


def mean_off_diagonal(similarity: Tensor) -> Tensor:
    """Mean over pairs of different experts: [..., E, E] -> [...]; nan for a single expert."""
    experts = similarity.shape[-1]
    total = similarity.sum((-2, -1)) - similarity.diagonal(dim1=-2, dim2=-1).sum(-1)
    return total / (experts * (experts - 1)) if experts > 1 else torch.full_like(total, float("nan"))
