"""Random numbers a mixture starts from, as functions of the seed and of their place alone.

Experts' noise for training and imports, whole routers for imports. Plain tensor maths without megatron-core.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_evomoe.config import RunConfig
from megatron_evomoe.moe.router import draw_router, router_tensors


def expert_noise(seed: int, layer_number: int, expert: int, which: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise (fp32) for the whole of one expert's matrix.

    Args:
        layer_number: global, from 1.
        expert: global index, from 0.
        which: 1 or 2 for fc1 or fc2.
        shape: [gates, rows, columns], gates being 2 for a gated fc1 and 1 otherwise.
    """
    # The last word keeps these counters apart from those of evolution's draws, which have 0 there.
    philox = np.random.Philox(key=seed, counter=[0, layer_number, expert, which])
    return torch.from_numpy(np.random.Generator(philox).standard_normal(tuple(shape), dtype=np.float32))


def moments(weight: Tensor) -> Tensor:
    """Sum, sum of squares and number of the elements, in float64."""
    total, squares = (
        weight.sum(dtype=torch.float64),
        torch.linalg.vector_norm(weight, dtype=torch.float64).square(),
    )
    return torch.stack([total, squares, torch.full_like(total, weight.numel())])


def std_of(moments: Tensor) -> float:
    """Standard deviation of a whole matrix from the moments of its parts, summed.

    Rounded to fp32: the order of summation, which the layout decides, is below what the rounding leaves.
    """
    total, squares, count = moments.tolist()
    return float(np.float32(math.sqrt(max(squares / count - (total / count) ** 2, 0.0))))


def router_weights(config: RunConfig, layer_number: int) -> dict[str, Tensor]:
    """An untrained router of one layer, fp32, by parameter name, drawn from ``train.seed`` and the layer.

    Args:
        layer_number: global, from 1.
    """
    tensors = router_tensors(config.moe, config.language)
    values = {tensor.name: torch.empty(tensor.shape) for tensor in tensors}
    place = hashlib.sha256(f"{config.train.seed} router {layer_number}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(place[:8], "little") >> 1)
        draw_router(tensors, values)
    return values
