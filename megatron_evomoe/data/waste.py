"""How much of what steps compute is padding, for each way to make microbatches of the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from megatron_evomoe.config import DataConfig
from megatron_evomoe.data.packing import Packing, plan_step


@dataclass(frozen=True)
class Waste:
    """What some steps compute, over all replicas."""

    packing: str
    tokens: int
    """Without padding."""
    positions: int
    """With padding."""
    microbatches: float
    """Of a replica in a step, a mean."""
    imbalance: float
    """Positions of the busiest replica ÷ the mean over replicas, a mean over steps."""

    @property
    def share(self) -> float:
        """The share of positions that are padding."""
        return 1 - self.tokens / self.positions if self.positions else 0.0


def waste(data: DataConfig, micro_batch_size: int, replicas: int, steps: Sequence[np.ndarray]) -> list[Waste]:
    """The waste of `none`, `sort` and `pack` in the same steps, without rounding up to a multiple.

    Args:
        replicas: the data-parallel size, which divides the samples of a step into whole microbatches.
        steps: the kept lengths of the samples of each global batch, int [G]; 0 where one is left out.
    """
    return [_waste(data, packing, micro_batch_size, replicas, steps) for packing in get_args(Packing)]


def _waste(
    data: DataConfig, packing: Packing, micro_batch_size: int, replicas: int, steps: Sequence[np.ndarray]
) -> Waste:
    positions, microbatches, imbalance = 0, 0, []
    group = data.packing_replicas if (data.packing_replicas or 1) % replicas == 0 else None
    for lengths in steps:
        plan = plan_step(
            lengths,
            packing=packing,
            micro_batch_size=micro_batch_size,
            seq_length=data.seq_length,
            replicas=replicas,
            packing_replicas=group,
        )
        of_replicas = []
        for replica in range(replicas):
            mine = [lengths[held] for held in plan[replica::replicas]]
            of_replicas.append(sum(_positions(mine, packing, micro_batch_size, data)))
        positions += sum(of_replicas)
        microbatches += len(plan) // replicas
        imbalance.append(max(of_replicas) / max(float(np.mean(of_replicas)), 1.0))
    tokens = int(sum(int(lengths.sum()) for lengths in steps))
    return Waste(packing, tokens, positions, microbatches / len(steps), float(np.mean(imbalance)))


def _positions(
    microbatches: list[np.ndarray], packing: Packing, micro_batch_size: int, data: DataConfig
) -> list[int]:
    """The positions of each microbatch of a replica, padding included."""
    if data.pad_to_seq_length:
        return [micro_batch_size * data.seq_length] * len(microbatches)
    if packing == "pack":
        return [max(int(held.sum()), 1) for held in microbatches]
    longest = [max(int(held.max(initial=0)), 1) for held in microbatches]
    if packing == "none":  # all microbatches of a replica's step are padded alike
        longest = [max(longest)] * len(longest)
    return [micro_batch_size * length for length in longest]
