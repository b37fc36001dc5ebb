"""The local layers' attention against attention written out in float64, outputs and gradients.

Inputs are float64 too, so that differences are those of the order of summation; the largest seen is 7e-15.
Inputs of 16 bits are compared at the precision of their outputs.
"""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_evomoe.model import attention
from megatron_evomoe.model.attention import PackedSegments, SdpaAttention

CPU = torch.device("cpu")


def transformer_config(**changes) -> TransformerConfig:
    values = dict(num_layers=2, hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
    return TransformerConfig(**{**values, **changes})


def layer(mask=AttnMaskType.causal, scale=None, cls=SdpaAttention, **changes):
    return cls(
        config=transformer_config(**changes),
        layer_number=1,
        attn_mask_type=mask,
        attention_type="self",
        cp_comm_type=None,
        softmax_scale=scale,
        pg_collection=types.SimpleNamespace(tp=types.SimpleNamespace(size=lambda: 1)),
    )


def written_out(query, key, value, *, scale, segment_of, causal, window):
    """Attention [n, b, h·d] with all scores, of positions in the same segment."""
    n, _, h, _ = query.shape
    key, value = (x.repeat_interleave(h // x.shape[2], dim=2) for x in (key, value))
    at = torch.arange(n)
    distance = at[:, None] - at
    seen = segment_of[:, None] == segment_of
    if causal:
        seen &= (distance >= 0) & (distance <= (n if window is None else window))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * scale
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", probabilities, value).flatten(2)


def inputs(n, b, heads, groups, size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, b, count, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]


def output_and_gradients(function, tensors):
    output = function(*tensors)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad((output * weights.to(output)).sum(), tensors)]


def assert_same(got, wanted, tolerance=1e-13):
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= tolerance * (1 + b.abs().max())


@st.composite
def shapes(draw):
    groups = draw(st.integers(1, 3))
    return {
        "groups": groups,
        "heads": groups * draw(st.integers(1, 4)),
        "size": draw(st.sampled_from([2, 6, 16])),
        "window": draw(st.none() | st.integers(0, 9)),
        "scale": draw(st.none() | st.floats(0.05, 2)),
        "seed": draw(st.integers(0, 3)),
    }


def compare(shape, query_key_value, segments, *, causal, packed=None, b=1):
    heads, size, window = shape["heads"], shape["size"], shape["window"] if causal else None
    ours = layer(
        AttnMaskType.causal if causal else AttnMaskType.no_mask,
        shape["scale"],
        num_attention_heads=heads,
        num_query_groups=shape["groups"],
        hidden_size=heads * size,
        window_size=None if window is None else (window, 0),
    )
    segment_of = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
    scale = size**-0.5 if shape["scale"] is None else shape["scale"]
    got = output_and_gradients(lambda q, k, v: ours(q, k, v, None, packed_seq_params=packed), query_key_value)
    wanted = output_and_gradients(
        lambda q, k, v: written_out(
            q, k, v, scale=scale, segment_of=segment_of, causal=causal, window=window
        ),
        query_key_value,
    )
    assert_same(got, wanted)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shapes(), st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_padded_rows(shape, n, b, causal):
    tensors = inputs(n, b, shape["heads"], shape["groups"], shape["size"], seed=shape["seed"])
    compare(shape, tensors, (n,), causal=causal)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shapes(), st.lists(st.integers(1, 20), min_size=1, max_size=12), st.booleans())
def test_segments(shape, segments, causal):
    """One segment that fills the row, many of them, and segments of one position are among the examples."""
    tensors = inputs(sum(segments), 1, shape["heads"], shape["groups"], shape["size"], seed=shape["seed"])
    packed = PackedSegments.of(segments, CPU, thd=False)
    compare(shape, tensors, segments, causal=causal, packed=packed)


def test_a_row_without_its_dimension_of_rows():
    """[t, h, d] is what megatron-core hands over in Transformer Engine's layout."""
    segments = (3, 1, 5)
    q, k, v = inputs(9, 1, 4, 2, 8)
    ours = layer(num_query_groups=2)
    with_rows = ours(q, k, v, None, packed_seq_params=PackedSegments.of(segments, CPU, thd=False))
    without = ours(
        *(x.squeeze(1) for x in (q, k, v)), None, packed_seq_params=PackedSegments.of(segments, CPU, thd=True)
    )
    assert with_rows.shape == (9, 1, 32) and without.shape == (9, 32)
    assert torch.equal(with_rows.squeeze(1), without)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "changes", [{}, {"apply_query_key_layer_scaling": True}, {"deterministic_mode": True}]
)
@pytest.mark.parametrize(
    ("mask", "window"),
    [(AttnMaskType.causal, None), (AttnMaskType.causal, (4, 0)), (AttnMaskType.no_mask, None)],
)
def test_takes_the_place_of_megatron_core_s(mask, window, changes):
    changes = {**changes, "window_size": window, "num_query_groups": 2, "masked_softmax_fusion": False}
    tensors = inputs(11, 2, 4, 2, 8, dtype=torch.float32)
    results = []
    for cls in (SdpaAttention, DotProductAttention):
        module = layer(mask, cls=cls, **changes)
        assert not module.sharded_state_dict(metadata={"dp_cp_group": None}) and not list(module.parameters())
        results.append(output_and_gradients(lambda *x, m=module: m(*x, None), tensors))
    # fp32; the largest difference seen is 2e-7
    assert_same(results[0], [x.double() for x in results[1]], 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_sixteen_bits_keep_the_precision_of_their_output(dtype, tolerance):
    """The softmax is not rounded to 16 bits: the mean of 1000 equal values is that value."""
    q, k, v = (torch.zeros(1000, 1, 4, 8, dtype=dtype) for _ in range(3))
    v += 1.0
    got = layer()(q, k, v, None)
    assert got.dtype == dtype and (got - 1).abs().max() <= tolerance / 2
    tensors = inputs(64, 1, 4, 4, 8, dtype=dtype)
    wanted = layer()(*(x.double() for x in tensors), None)
    assert (layer()(*tensors, None).double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_what_is_kept_grows_with_the_row_and_not_with_its_square():
    def kept(n, **changes):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes), lambda x: x):
            layer(**changes)(*inputs(n, 1, 4, 4, 8, dtype=torch.float32), None)
        return sum(sizes)

    assert kept(512) < 2.1 * kept(256)
    assert kept(512, deterministic_mode=True) > 3 * kept(
        256, deterministic_mode=True
    )  # without fused kernels


@pytest.mark.skipif(attention._varlen_attn() is None, reason="this PyTorch has no kernel for segments")
def test_the_kernel_for_segments_takes_these_arguments():
    """Its arguments fit this version of PyTorch. What it computes is compared on a GPU, in tests/gpu."""
    packed = PackedSegments.of((3, 5), CPU, thd=False)
    q, k, v = (torch.empty(8, count, 16, dtype=torch.bfloat16, device="meta") for count in (4, 2, 2))
    packed.cu_seqlens_q = packed.cu_seqlens_kv = packed.cu_seqlens_q.to("meta")
    assert attention.varlen(q, k, v, packed, (4, 0), 0.25).shape == (8, 4, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"softmax_type": "off-by-one"}, "softmax_type 'off-by-one'"),
        ({"window_size": (4, 4)}, r"window_size \(4, 4\)"),
        ({"context_parallel_size": 2}, "context_parallel_size 2"),
    ],
)
def test_what_it_would_compute_differently_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        layer(**changes)


def test_masks_it_does_not_have_are_refused():
    with pytest.raises(ValueError, match="arbitrary"):
        layer(AttnMaskType.arbitrary)
    with pytest.raises(ValueError, match="no_mask with a window"):
        layer(AttnMaskType.no_mask, window_size=(4, 0))
    with pytest.raises(ValueError, match="attention_mask"):
        layer()(*inputs(4, 1, 4, 4, 8), torch.ones(4, 4, dtype=torch.bool))


@pytest.mark.parametrize("segments", [(), (3, 0), (4, -1)])
def test_a_segment_has_a_position(segments):
    with pytest.raises(ValueError, match="at least one position"):
        PackedSegments.of(segments, CPU, thd=True)


def test_lengths_on_the_device_alone_are_refused():
    from megatron.core.packed_seq_params import PackedSeqParams

    with pytest.raises(ValueError, match="PackedSegments"):
        layer()(*inputs(4, 1, 4, 4, 8), None, packed_seq_params=PackedSeqParams(qkv_format="thd"))
