"""Chooses the tokens that each expert keeps under a capacity factor, from the whole microbatch.

megatron-core chooses on each rank from the tokens which that rank holds. Under sequence parallelism these are
only a part of the microbatch, so TP 2 would drop other tokens than one rank does; and padding would take
places of real tokens. Here the choice does not depend on the layout, and padding takes no place.

Shape legend: T tokens of this rank · N experts · R ranks that share the microbatch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_STEPS = 1 << 12
"""Number of steps to which probabilities are rounded before they are compared.

Rows of a microbatch begin alike (system prompt, first token), so equal tokens are common, and two layouts
compute probabilities for them that differ in the last bits. Between probabilities that round to the same step
the position decides.
"""


@torch.no_grad()
def within_capacity(
    probs_TN: Tensor,
    routing_map_TN: Tensor,
    is_padding_T: Tensor | None,
    starts_T: Tensor | None = None,
    *,
    topk: int,
    factor: float,
    by_position: bool,
    group: dist.ProcessGroup,
) -> Tensor:
    """Which choices the experts keep, bool [T, N]. Communicates over `group`.

    Each expert keeps at most ⌈factor x real tokens x K / N⌉ of the real tokens that chose it: those with the
    highest probability, or with `by_position` the first. Among equal probabilities (to 2⁻¹²) the first tokens
    are kept, by position and then by row. No expert keeps a padding token. In a packed row, a segment counts
    as a row, so the same tokens are kept as in padded rows.

    Args:
        probs_TN: probabilities of the chosen experts, in [0, 1].
        routing_map_TN: bool; the experts that each token chose.
        is_padding_T: bool; None if all tokens are real.
        starts_T: bool; the first tokens of the segments of a packed row. Tokens before the first such mark,
            or all without any mark, are in the order [s, b] of padded rows. None is without marks.
        topk: K, the experts that each token chose.
        group: ranks that share the microbatch, in the order of its positions, with equally many tokens each.
    """
    chosen = routing_map_TN if is_padding_T is None else routing_map_TN & ~is_padding_T[:, None]
    score = chosen.int() if by_position else chosen * (1 + (probs_TN * _STEPS).round().int())
    everyone = _gather(score, group)  # [R·T, N]; a choice scores at least 1
    real = (everyone > 0).any(dim=1).sum()
    capacity = (real.double() * topk / score.shape[1] * factor).ceil()
    if starts_T is not None:
        by_place = _by_position(_gather(starts_T.int()[:, None], group)[:, 0] > 0)
        order = by_place[everyone[by_place].argsort(dim=0, descending=True, stable=True)]
    else:
        order = everyone.argsort(dim=0, descending=True, stable=True)
    place = torch.arange(len(order), device=order.device)[:, None].expand_as(order)
    rank_in_expert = torch.empty_like(order).scatter_(0, order, place)
    first = dist.get_rank(group) * len(score)
    return (rank_in_expert[first : first + len(score)] < capacity) & chosen


def _by_position(starts: Tensor) -> Tensor:
    """Indices of tokens, int64 [R·T], sorted by position in the segment and then by segment."""
    index = torch.arange(len(starts), device=starts.device)
    first = torch.where(starts, index, 0).cummax(dim=0).values
    return (index - first).argsort(stable=True)


def _gather(score: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return score
    everyone = score.new_empty(ranks * len(score), score.shape[1])
    dist.all_gather_into_tensor(everyone, score.contiguous(), group=group)
    return everyone
