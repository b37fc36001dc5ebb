"""Lengths of samples like those of LLaVA-665k, for the benchmarks that deal samples into microbatches.

The data set is a mixture of twelve sources. Each source's text is drawn from a lognormal distribution, and
all but one have an image of 576 positions. The share of each source is that of the published mixture; the
medians and widths are set so that the whole, cut at 2048, has nearly the mean (898; here 895) and the 95th
percentile (1579; here 1586) of an earlier estimate.
"""

from __future__ import annotations

import numpy as np

IMAGE = 576
LONGEST = 2048

SOURCES: dict[str, tuple[int, float, float]] = {
    "conversation": (58, 400, 0.45),
    "detail": (23, 230, 0.30),
    "reasoning": (77, 280, 0.30),
    "sharegpt": (40, 1150, 0.75),
    "vqav2": (83, 150, 0.50),
    "gqa": (72, 230, 0.60),
    "okvqa": (9, 110, 0.35),
    "ocrvqa": (80, 180, 0.30),
    "aokvqa": (66, 120, 0.25),
    "textcaps": (22, 90, 0.20),
    "refcoco": (48, 350, 0.70),
    "vg": (86, 480, 0.80),
}
"""Thousands of samples, median of the text's tokens, and standard deviation of their logarithm."""
WITHOUT_IMAGE = "sharegpt"


def texts(n: int, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the text of n samples, int64 [n], and whether each has an image, bool [n]."""
    share = np.array([thousands for thousands, _, _ in SOURCES.values()], dtype=float)
    source = draws.choice(len(SOURCES), n, p=share / share.sum())
    median, sigma = np.array([values[1:] for values in SOURCES.values()])[source].T
    tokens = np.exp(np.log(median) + sigma * draws.standard_normal(n)).astype(np.int64)
    return np.maximum(tokens, 1), source != list(SOURCES).index(WITHOUT_IMAGE)


def lengths(n: int, draws: np.random.Generator) -> np.ndarray:
    """Positions of n samples, cut at 2048, int64 [n]."""
    text, has_image = texts(n, draws)
    return np.minimum(text + IMAGE * has_image, LONGEST)
