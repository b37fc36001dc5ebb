"""Converting a large model: memory is bounded by the largest tensor."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.convert import benchmark

GIGABYTES = 4.1


@pytest.mark.slow
def test_memory(tmp_path):
    """Converting a 4 GB model needs little memory, in both directions.

    The peak memory of the whole process is at most three times the largest tensor plus 500 MB. Speed is
    measured by `benchmarks/convert.py`.
    """
    if shutil.disk_usage(tmp_path).free < 4 * GIGABYTES * 1e9:
        pytest.skip("not enough disk")
    found, largest = benchmark(tmp_path, GIGABYTES, rounds=1)
    for name, measured in found.items():
        print(name, measured)
        assert measured.bytes > 4e9
        assert measured.peak <= 3 * largest + 500e6, f"{name}: {measured.peak / 1e6:.0f} MB"
