"""The DTR's projections in static shapes: what a GPU multiplies, with nothing that the host would have to wait for.

Tokens are sorted by modality on the device and dealt into tiles of one modality each. ⌈T / B⌉ + 1 tiles of B rows hold them,
wherever the boundary between the modalities lies. So shapes follow from T alone, and a batched product meets each tile with its
modality's weights. With T / B = 8 that is an eighth more work than with the number of image tokens known; both hypernetworks on
all tokens would be twice.

Shapes as in `dtr.py`, and: X tiles · B rows of a tile · S = X·B slots · P = h + K·2r columns of a projection [W1·z, W2_down·z].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

TILES = 8
"""T / B. More tiles waste less work and copy the weights more often."""
_HAS_OUT_DTYPE = "dtype" in torch.ops.aten.bmm.overloads()


class Tiles(NamedTuple):
    """Which token is where."""

    token_S: Tensor
    """int64: the token in each slot; that of another slot where `exists` is false"""
    exists_S1: Tensor
    """bool"""
    slot_T: Tensor
    """int64: where each token is"""
    is_vision_X: Tensor
    """bool: each tile's modality"""


def deal(is_vision_T: Tensor) -> Tiles:
    """Text tokens to the first tiles, image tokens to those after the last of them, both in sequence order."""
    T, device = is_vision_T.shape[0], is_vision_T.device
    rows = max(1, -(-T // TILES))
    num_tiles = -(-T // rows) + 1 if T else 0
    order_T = torch.argsort(is_vision_T.to(torch.uint8), stable=True)
    num_text = T - is_vision_T.sum()  # stays on the device
    text_tiles = (num_text + rows - 1) // rows
    is_vision_X = torch.arange(num_tiles, device=device) >= text_tiles
    place_T = torch.arange(T, device=device)  # in sorted order
    slot_sorted_T = torch.where(place_T < num_text, place_T, place_T - num_text + text_tiles * rows)
    slot_T = torch.empty_like(order_T).scatter_(0, order_T, slot_sorted_T)
    token_S = order_T.new_zeros(num_tiles * rows).scatter_(0, slot_T, torch.arange(T, device=device))
    exists_S = torch.zeros_like(token_S, dtype=torch.bool).scatter_(0, slot_T, torch.ones_like(slot_T, dtype=torch.bool))
    return Tiles(token_S, exists_S[:, None], slot_T, is_vision_X)


def project(z_TC: Tensor, tiles: Tiles, *, text_PC: Tensor, vision_PC: Tensor) -> Tensor:
    """Each token's projections [T, P] by its modality's weights, in fp32 (fp64 from fp64 weights).

    Where z and the weights are both bf16, products are of bf16 numbers: exact in fp32 in the forward, while in the backward the
    gradient is rounded to bf16, as any linear layer's is in bf16 training. Any other pair is multiplied in the weights' dtype.
    """
    return _Project.apply(z_TC, *tiles, text_PC, vision_PC)


class _Project(torch.autograd.Function):
    """By hand because autograd would keep the tokens as they lie in their slots; what is kept is z as it came."""

    @staticmethod
    def forward(ctx: Any, z_TC: Tensor, token_S: Tensor, exists_S1: Tensor, slot_T: Tensor, is_vision_X: Tensor, text_PC: Tensor,
                vision_PC: Tensor) -> Tensor:
        ctx.save_for_backward(z_TC, token_S, exists_S1, slot_T, is_vision_X, text_PC, vision_PC)
        weight_XPC = torch.stack([text_PC, vision_PC])[is_vision_X.long()]
        z_XBC = _in_tiles(z_TC, token_S, is_vision_X)
        return _product(z_XBC, weight_XPC.transpose(1, 2)).flatten(0, 1).index_select(0, slot_T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, deu_TP: Tensor) -> tuple[Tensor | None, ...]:
        z_TC, token_S, exists_S1, slot_T, is_vision_X, text_PC, vision_PC = ctx.saved_tensors
        if z_TC.dtype == text_PC.dtype == torch.bfloat16:
            deu_TP = deu_TP.to(torch.bfloat16)
        deu_XBP = _in_tiles(deu_TP, token_S, is_vision_X)
        deu_XBP = deu_XBP * exists_S1.view(*deu_XBP.shape[:2], 1)
        dz_TC = dtext = dvision = None
        if ctx.needs_input_grad[0]:
            weight_XPC = torch.stack([text_PC, vision_PC])[is_vision_X.long()]
            dz_TC = _product(deu_XBP, weight_XPC).flatten(0, 1).index_select(0, slot_T).to(z_TC.dtype)
        if any(ctx.needs_input_grad[5:]):
            dweight_XPC = _product(deu_XBP.transpose(1, 2), _in_tiles(z_TC, token_S, is_vision_X))
            halves = torch.stack([~is_vision_X, is_vision_X]).to(dweight_XPC.dtype) @ dweight_XPC.flatten(1)
            dtext, dvision = (half.view_as(text_PC).to(text_PC.dtype) for half in halves)
        return dz_TC, None, None, None, None, dtext, dvision


def _in_tiles(x_TD: Tensor, token_S: Tensor, is_vision_X: Tensor) -> Tensor:
    """[X, B, D]; rows that do not exist hold some token's."""
    tiles = len(is_vision_X)
    return x_TD.index_select(0, token_S).view(tiles, len(token_S) // max(1, tiles), x_TD.shape[1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of batches, sums and result in fp32; of bf16 numbers on a GPU's tensor cores, which loses nothing."""
    if a.dtype == b.dtype == torch.bfloat16:
        if a.is_cuda and _HAS_OUT_DTYPE:
            return torch.bmm(a, b, out_dtype=torch.float32)
        return torch.bmm(a.float(), b.float())
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))
