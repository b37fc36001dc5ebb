"""The norm of the local layers is PyTorch's own, marked for sequence parallelism."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_evomoe.model.norm import TorchNorm


@pytest.mark.parametrize(
    ("kind", "cls", "names"),
    [("LayerNorm", torch.nn.LayerNorm, ["weight", "bias"]), ("RMSNorm", torch.nn.RMSNorm, ["weight"])],
)
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_kind_dtype_and_mark(kind, cls, names, sequence_parallel):
    config = SimpleNamespace(
        normalization=kind, sequence_parallel=sequence_parallel, params_dtype=torch.bfloat16
    )
    norm = TorchNorm(config, 8, eps=1e-3)
    assert type(norm) is cls and norm.eps == 1e-3
    assert [n for n, _ in norm.named_parameters()] == names
    for parameter in norm.parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.sequence_parallel is sequence_parallel
