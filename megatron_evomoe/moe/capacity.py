"""Which tokens an expert may keep under a capacity factor: a function of the microbatch, whatever ranks its
tokens lie on.

The core decides on each rank from the tokens it holds. Under sequence parallelism that is a part of the
microbatch, so that TP 2 would drop other tokens than one rank does, and padding takes places that real tokens
then lack.

Shapes: T tokens of this rank · N experts · R ranks that share the microbatch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_STEPS = 1 << 12
"""Steps of a probability that count. Rows of a microbatch begin alike (system prompt, first token), so equal
tokens are common, and what one layout computes for them differs from another's in the last bits: finer
differences decide nothing, the position does.
"""


@torch.no_grad()
def within_capacity(
    probs_TN: Tensor,
    routing_map_TN: Tensor,
    is_padding_T: Tensor | None,
    *,
    topk: int,
    factor: float,
    by_position: bool,
    group: dist.ProcessGroup,
) -> Tensor:
    """bool [T, N]: which choices stay. Communicates over `group`.

    Each expert keeps ⌈factor x real tokens x K / N⌉ of the microbatch's real tokens that chose it: the most
    probable, or with `by_position` the first. Among equally probable ones (to 2⁻¹²) the first stay, in the
    order of positions, then of rows. A padding token keeps no expert.

    Args:
        probs_TN: probability of the chosen experts, in [0, 1].
        routing_map_TN: bool, the choices.
        is_padding_T: bool; none means that all tokens are real.
        topk: experts K that each token chose.
        group: ranks that hold the microbatch's tokens, in the order of its positions, equally many each.
    """
    chosen = routing_map_TN if is_padding_T is None else routing_map_TN & ~is_padding_T[:, None]
    score = chosen.int() if by_position else chosen * (1 + (probs_TN * _STEPS).round().int())
    everyone = _gather(score, group)  # [R·T, N]; a choice scores at least 1
    real = (everyone > 0).any(dim=1).sum()
    capacity = (real.double() * topk / score.shape[1] * factor).ceil()
    order = everyone.argsort(dim=0, descending=True, stable=True)
    place = torch.arange(len(order), device=order.device)[:, None].expand_as(order)
    rank_in_expert = torch.empty_like(order).scatter_(0, order, place)
    first = dist.get_rank(group) * len(score)
    return (rank_in_expert[first : first + len(score)] < capacity) & chosen


def _gather(score: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return score
    everyone = score.new_empty(ranks * len(score), score.shape[1])
    dist.all_gather_into_tensor(everyone, score.contiguous(), group=group)
    return everyone
