"""The local layers' attention on a GPU against the CPU's in float64, and without a synchronisation."""

from __future__ import annotations

import types

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_evomoe.model.attention import PackedSegments, SdpaAttention
from megatron_evomoe.parallel import backend
from tests.gpu import needs

pytestmark = needs.cuda
SEGMENTS = (1, 300, 77, 1, 129)
# of the largest entry; bf16 rounds probabilities and outputs to 8 bits
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def results(segments, window, tensors):
    """Output and gradients of the attention of `tensors`, [t, 1, heads, 64]."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8 * 64,
        num_attention_heads=8,
        num_query_groups=2,
        attention_dropout=0.0,
        window_size=window,
    )
    layer = SdpaAttention(
        config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=types.SimpleNamespace(),
    )
    packed = PackedSegments.of(segments, tensors[0].device, thd=False) if segments else None
    output = layer(*tensors, None, packed_seq_params=packed)
    return [output, *torch.autograd.grad(output.float().square().sum(), tensors)]


@pytest.mark.parametrize("window", [None, (50, 0)])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one row", "segments"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_same_as_in_float64(dtype, segments, window):
    generator = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(sum(SEGMENTS), 1, heads, 64, generator=generator).to(dtype).double().requires_grad_()
        for heads in (8, 2, 2)
    ]
    given = [x.detach().to(backend.device(), dtype).requires_grad_() for x in exact]
    wanted = results(segments, window, exact)
    results(segments, window, given)  # what is only done once may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = results(segments, window, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.cpu().double() - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()
