"""The running mean and the density that figures draw, in numpy."""

from __future__ import annotations

import math

import numpy as np


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about 1/25 of the points [n], over fewer at both ends.

    The mean is nan where the window holds no finite value.
    """
    half = max(1, len(values) // 50)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density of `values` [n] at `grid` [g]; 0 where there are no values.

    The bandwidth is Silverman's, and at least two grid steps.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return np.zeros_like(grid)
    quartiles = np.quantile(values, [0.25, 0.75])
    spans = [s for s in (values.std(), (quartiles[1] - quartiles[0]) / 1.34) if s > 0]
    width = max(0.9 * min(spans, default=0.0) * len(values) ** -0.2, 2 * (grid[1] - grid[0]))
    z = (grid[:, None] - values[None]) / width
    return np.exp(-0.5 * z * z).sum(1) / (len(values) * width * math.sqrt(2 * math.pi))
