"""The batches of benchmarks/packing.py hold the same samples, and its lengths are those it states."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_evomoe.config.token_types import TokenType

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """Make the folder of scripts importable, as it is when a script runs."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def test_lengths_have_the_stated_mean_and_percentile():
    """200,000 draws: the mean's standard error is 1, the percentile's about 4."""
    import lengths

    drawn = lengths.lengths(200_000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(895, abs=4)
    assert np.percentile(drawn, 95) == pytest.approx(1586, abs=16)


def test_batches_hold_the_same_samples():
    import lengths
    import packing

    text, has_image = lengths.texts(packing.TRAINED, np.random.default_rng(5))
    found = {}
    for way in ("none", "sort", "pack"):
        samples = []
        step = packing.step_of(packing.tiny(way, "warmup"), text, has_image, seed=1)
        for micro in step.microbatches:
            rows = zip(micro.tokens, micro.labels, micro.token_types, strict=True)
            if micro.segments is not None:
                parts = (micro.tokens[0], micro.labels[0], micro.token_types[0])
                rows = zip(*(part.split(micro.segments) for part in parts), strict=True)
            for tokens, labels, types in rows:
                real = types != TokenType.PADDING
                samples.append(tuple(tuple(t[real].tolist()) for t in (tokens, labels, types)))
            assert (micro.token_types == TokenType.VISION).sum() == 64 * len(micro.images)
        found[way] = sorted(samples)
    assert found["none"] == found["sort"] == found["pack"]
    assert len(found["none"]) == packing.TRAINED


def test_dealing_counts_padding_and_the_slowest_replica():
    import packing

    none, pack = (packing.dealt(way, 64, 8, 2, 0.0) for way in ("none", "pack 8192"))
    assert 0 < pack["padding"] < 0.01 < 0.2 < none["padding"] <= none["static_padding"] < 1
    assert 1 <= pack["slowest"] < none["slowest"] <= none["slowest_in_rounds"] + 1e-9
