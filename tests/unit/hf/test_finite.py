"""Values that are not finite are found at every place and in every type; the error helps."""

from __future__ import annotations

import pytest
import torch

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.hf.from_hf.finite import converted, is_finite

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_is_found_at_every_place(dtype, value):
    for size in (1, 7, 64, 131):  # every vector width, and sizes with a remainder
        tensor = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert is_finite(tensor)
        for i in range(size):
            bad = tensor.clone()
            bad[i] = value
            assert not is_finite(bad)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_largest_and_smallest_are_finite(dtype):
    info = torch.finfo(dtype)
    assert is_finite(
        torch.tensor([info.max, info.min, info.tiny, -0.0], dtype=dtype).repeat(9).reshape(6, 6).t()
    )
    assert is_finite(torch.empty(0, 3, dtype=dtype))


def test_what_is_wrong_and_what_helps_is_said():
    bad = torch.ones(4, 5)
    bad[1, 2], bad[3, 0] = float("nan"), float("inf")
    with pytest.raises(CheckpointError, match=r"w in f: 2 of 20 values are not finite .* in the source"):
        converted("w in f", bad, torch.float16)
    with pytest.raises(
        CheckpointError, match=r"w in f: 3 of 6 .* exceed the largest float16, 65504,.*--dtype fp32 or bf16"
    ):
        converted("w in f", torch.tensor([1.0, 7e4, -7e4, 65504.0, 65519.0, 1e30]), torch.float16)
    with pytest.raises(CheckpointError, match="1 of 1 values exceed the largest bfloat16"):
        converted("w", torch.tensor([3.4e38]), torch.bfloat16)
    kept = torch.ones(3)
    assert converted("w", kept, torch.float32) is kept
