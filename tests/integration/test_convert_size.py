"""Converting something large: memory is bounded by the largest tensor, and the time by that of a copy."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.convert import benchmark

GIGABYTES, ROUNDS = 4.1, 3


@pytest.mark.slow
def test_memory_and_speed(tmp_path):
    """Peak memory of the whole process: at most three times the largest tensor and 500 MB, in both directions of a 4 GB model.

    An import runs at half the speed of a plain copy of its files or more, by medians of rounds that alternate. (An export's
    speed is only measured, by the benchmark.)
    """
    if shutil.disk_usage(tmp_path).free < 4 * GIGABYTES * 1e9:
        pytest.skip("not enough disk")
    found, largest = benchmark(tmp_path, GIGABYTES, ROUNDS)
    for name, measured in found.items():
        print(name, measured)
        assert measured.bytes > 4e9
        assert measured.peak <= 3 * largest + 500e6, f"{name}: {measured.peak / 1e6:.0f} MB"
    assert found["import"].speed >= 0.5, found["import"]
