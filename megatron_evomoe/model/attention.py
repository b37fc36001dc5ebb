"""Attention of the local layers by PyTorch's fused kernels, for padded rows and for rows of several segments.

megatron-core's `DotProductAttention` keeps all s × s scores for the backward and knows no segments. The
kernels behind `scaled_dot_product_attention` keep one number per query, and segments are calls of their own.

Shape legend: s positions · b rows · t positions of the only row of a packed microbatch · h heads of the
    query · g heads of key and value, which divides h · d size of a head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_CAUSAL = {
    AttnMaskType.causal: True,
    AttnMaskType.padding_causal: True,  # Transformer Engine's name of it for packed rows
    AttnMaskType.no_mask: False,
}


@dataclasses.dataclass
class PackedSegments(PackedSeqParams):
    """The segments of a packed row: megatron-core's description of them, and their lengths on the host.

    megatron-core's has the lengths on the device alone, where reading them waits for everything before.
    """

    segments: tuple[int, ...] = ()
    """Lengths, of which each is at least 1; they sum to the length of the row."""

    @classmethod
    def of(cls, segments: Sequence[int], device: torch.device, *, thd: bool) -> PackedSegments:
        """Describe a row.

        Args:
            segments: lengths in the order of the row. Padding at the end of a sample, such as context
                parallelism needs, belongs to its segment: no earlier position attends to it.
            device: where the ends of the segments are needed.
            thd: for Transformer Engine's layers, in whose layout queries, keys and values have no dimension
                for rows. The local layers keep that dimension, for then megatron-core rotates a packed row
                as any other, and reads no lengths from the device.

        Raises:
            ValueError: there is no segment, or one is empty.
        """
        if min(segments, default=0) < 1:
            raise ValueError(f"segments of lengths {list(segments)}: each needs at least one position")
        ends = torch.tensor([0, *itertools.accumulate(segments)], dtype=torch.int32)
        if device.type == "cuda":
            ends = ends.pin_memory().to(device, non_blocking=True)
        longest = max(segments)
        return cls(
            qkv_format="thd" if thd else "sbhd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            segments=tuple(segments),
        )


class SdpaAttention(MegatronModule):
    """Takes the place of megatron-core's `DotProductAttention` and is built and called as it is.

    The softmax is computed in float32 for inputs of 16 bits, as `attention_softmax_in_fp32` asks, and in the
    inputs' own type for others. `apply_query_key_layer_scaling` changes nothing: it divides the scores by the
    number of the layer before they are stored and multiplies them by it afterwards, and here none are stored.
    With `deterministic_mode` all scores are kept, because the fused kernels of GPUs add up gradients in any
    order.

    Raises:
        ValueError: the configuration asks for dropout, another softmax, a window that reaches ahead, context
            parallelism, or another mask than the causal one or none.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        _check(config, config.attention_dropout if attention_dropout is None else attention_dropout)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = 1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, self.layer_number
        )
        self.window = config.window_size[0] if windowed and config.window_size[0] >= 0 else None
        _is_causal(attn_mask_type, self.window)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each row or segment.

        Args:
            query: [s, b, h, d], or [t, h, d] of a packed row.
            key: [s, b, g, d], or [t, g, d].
            value: [s, b, g, d], or [t, g, d].
            attention_mask: None; `attn_mask_type` is the mask.
            attn_mask_type: by default that of the constructor.
            attention_bias: None.
            packed_seq_params: the `PackedSegments` of a packed row, none for rows of one sample.

        Returns:
            [s, b, h·d], or [t, h·d] of a packed row that came without the dimension of the rows.

        Raises:
            ValueError: a mask or a bias is given, or segments without their lengths on the host.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("SdpaAttention takes no attention_mask and no attention_bias; pass None")
        causal = _is_causal(attn_mask_type or self.attn_mask_type, self.window)
        if packed_seq_params is None:
            return self._attend(query, key, value, causal)
        if not isinstance(packed_seq_params, PackedSegments):
            raise ValueError(
                f"SdpaAttention needs the lengths of the segments on the host, and {type(packed_seq_params)} "
                "has none; pass PackedSegments.of(…)"
            )
        if query.dim() == 4:
            q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
            return self._attend_segments(q, k, v, packed_seq_params, causal).unsqueeze(1)
        return self._attend_segments(query, key, value, packed_seq_params, causal)

    def _attend_segments(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments, causal: bool
    ) -> Tensor:
        """[t, h, d], [t, g, d] and [t, g, d] to [t, h·d]."""
        if _has_varlen_kernel(query) and not self.config.deterministic_mode:
            return varlen(query, key, value, packed, self._window(causal), self.softmax_scale).flatten(1)
        parts = zip(*(x.unsqueeze(1).split(packed.segments) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(q, k, v, causal) for q, k, v in parts]).squeeze(1)

    def _window(self, causal: bool) -> tuple[int, int]:
        """How many positions a query sees before and after its own; −1 for all."""
        return (-1 if self.window is None else self.window, 0) if causal else (-1, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        """[n, b, h, d], [n, b, g, d] and [n, b, g, d] to [n, b, h·d]."""
        if query.is_cuda and query.element_size() > 2:
            # no fused kernel for float32 lets queries share keys, so PyTorch would keep all scores
            repeats = query.shape[2] // key.shape[2]
            key, value = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (key, value))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, h or g, n, d]
        options: dict[str, Any] = {"scale": self.softmax_scale}
        if k.shape[1] != q.shape[1]:
            options["enable_gqa"] = True
        with sdpa_kernel(SDPBackend.MATH) if self.config.deterministic_mode else contextlib.nullcontext():
            if self.window is None or q.shape[2] <= self.window + 1:
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal, **options)
            else:
                attended = _sliding(q, k, v, self.window, options)
        return attended.permute(2, 0, 1, 3).flatten(2)


def _sliding(q: Tensor, k: Tensor, v: Tensor, window: int, options: dict[str, Any]) -> Tensor:
    """Causal attention [b, h, n, d] of which each query sees `window` positions before its own.

    Queries go in blocks as long as the window, so a mask has window² entries and work grows with n·window.
    """
    n, block = q.shape[2], window + 1
    blocks = []
    for start in range(0, n, block):
        end, first = min(n, start + block), max(0, start - window)
        at = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
        mask = (at >= 0) & (at <= window)
        keys, values = k[:, :, first:end], v[:, :, first:end]
        blocks.append(
            F.scaled_dot_product_attention(q[:, :, start:end], keys, values, attn_mask=mask, **options)
        )
    return torch.cat(blocks, dim=2)


def _has_varlen_kernel(query: Tensor) -> bool:
    """Whether one kernel can attend within all segments of [t, h, d] (FlashAttention's limits)."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[2] % 8 == 0
        and query.shape[2] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _varlen_attn() is not None
    )


def varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments, window: tuple[int, int], scale: float
) -> Tensor:
    """Attend within all segments by one kernel of a GPU, without reading a length from it.

    Args:
        query: [t, h, d] in 16 bits.
        key: [t, g, d].
        value: [t, g, d].
        window: how many positions a query sees before and after its own; −1 for all.

    Returns:
        [t, h, d].
    """
    kernel = _varlen_attn()
    assert kernel is not None
    return kernel(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=scale,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _varlen_attn() -> Callable[..., Any] | None:
    """PyTorch's attention over segments, if this version has it with windows and shared heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"scale", "window_size", "enable_gqa"}
    return varlen_attn if needed <= set(inspect.signature(varlen_attn).parameters) else None


def _is_causal(mask: AttnMaskType, window: int | None) -> bool:
    if mask not in _CAUSAL or (window is not None and not _CAUSAL[mask]):
        raise ValueError(
            f"SdpaAttention has no mask of type {mask.name}{'' if window is None else ' with a window'}; it "
            f"knows {', '.join(m.name for m in _CAUSAL)}, and windows with a causal mask only"
        )
    return _CAUSAL[mask]


def _check(config: TransformerConfig, dropout: float) -> None:
    """Refuse what `SdpaAttention` would silently compute differently."""
    refused = {
        f"attention_dropout {dropout} (only 0)": dropout != 0,
        f"softmax_type {config.softmax_type!r} (only 'vanilla')": config.softmax_type != "vanilla",
        f"context_parallel_size {config.context_parallel_size} (only 1)": config.context_parallel_size != 1,
        f"window_size {config.window_size} (only positions before the query's own)": bool(
            config.window_size and config.window_size[1] != 0
        ),
    }
    for setting, is_on in refused.items():
        if is_on:
            raise ValueError(f"SdpaAttention does not compute {setting}")
