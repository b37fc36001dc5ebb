"""Puts the features of images at their positions among word embeddings.

Shape legend: b rows · s positions · C width · n images of t positions each.
"""

from __future__ import annotations

import torch


def splice(words: torch.Tensor, is_vision: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """`words` with the features at the vision positions, [s, b, C]. Needs no device synchronisation.

    The k-th vision position, counted row by row, takes the k-th feature. `masked_scatter` does the same, but
    its backward has to know how many positions are marked, for which the host waits for the device.

    Args:
        words: [s, b, C].
        is_vision: bool [b, s], true at n·t positions.
        features: [n, t, C] in the dtype of `words`. With n = 0 the result still depends on them, so that
            whatever computed them gets a (zero) gradient, which other data-parallel ranks wait for.

    Raises:
        RuntimeError: the number of marked positions is not n·t. On a GPU an assertion fails on the device.
    """
    s, b, width = words.shape
    rows = features.reshape(-1, width)
    torch._assert_async(is_vision.sum() == len(rows), "vision positions and features differ in number")
    marked_first = torch.argsort(is_vision.flatten(), descending=True, stable=True)[: len(rows)]
    places = marked_first % s * b + marked_first // s  # in [s, b] instead of [b, s]
    return words.reshape(s * b, width).index_copy(0, places, rows).view(s, b, width)
