"""The DTR on Triton kernels: the function of `maths.dtr_logits` without any device synchronisation.

A CUDA graph can therefore hold it. Importing this file imports Triton; `kernel.py` decides whether that
happens. docs/router.md says what each pass reads and writes, and why the work is divided into these passes.
None of it has run on a GPU yet, and the tile sizes are guesses.

Shape legend: as in `maths.py` and `triton_kernels.py`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megatron_evomoe.moe.dtr import triton_kernels as kernels
from megatron_evomoe.moe.dtr.maths import DtrWeights

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

BLOCK_TOKENS, BLOCK_COLUMNS, BLOCK_DEPTH = 128, 128, 32  # of the products
BLOCK_MIX = 16  # tokens of the small kernels, which hold a matrix [r, N] for each


def dtr_logits(z_TC: Tensor, is_vision_T: Tensor, weights: DtrWeights, *, activation: str = "none") -> Tensor:
    """Router logits [T, N] in fp32.

    If z and the weights are both bf16, tensor cores multiply bf16 numbers and sum in fp32, which is exact
    in the forward; in the backward the projection's gradient is rounded to bf16, as that of any linear
    layer is in bf16 training. Any other pair of types is computed in fp32.
    """
    # Text tokens come first, and the tokens of each modality stay in sequence order.
    order_T = torch.argsort(is_vision_T.to(torch.uint8), stable=True)
    num_text = (~is_vision_T).sum()  # stays on the device
    text, vision, phi_NC = weights.text, weights.vision, weights.phi_NC.float()
    bias_Mh = torch.stack([text.bias1_h, vision.bias1_h]).float()
    folded_MKrN = torch.stack([F.linear(hyper.weight2_up_KrC.float(), phi_NC) for hyper in (text, vision)])
    projections = text.weight1_hC, text.weight2_down_KJC, vision.weight1_hC, vision.weight2_down_KJC
    return _FusedDtr.apply(
        z_TC.contiguous(), order_T, num_text, bias_Mh, folded_MKrN, activation, *projections
    )


class _FusedDtr(torch.autograd.Function):
    """Everything that has a token axis.

    The backward keeps eu (T·P numbers in fp32) beside z, because reading it costs less than computing it
    again.
    """

    @staticmethod
    def forward(
        ctx: Any, z_TC: Tensor, order_T: Tensor, num_text: Tensor, bias_Mh: Tensor, folded_MKrN: Tensor,
        activation: str, *projections: Tensor,
    ) -> Tensor:  # fmt: skip
        weight_MPC = _side_by_side(projections)
        eu_TP = z_TC.new_empty(z_TC.shape[0], weight_MPC.shape[1], dtype=torch.float32)
        _grouped_product(z_TC, weight_MPC, eu_TP, order_T, num_text, gather=True)
        logits_TN = z_TC.new_empty(z_TC.shape[0], folded_MKrN.shape[-1], dtype=torch.float32)
        grid, shape, options = _mix_launch(z_TC.shape[0], folded_MKrN, activation)
        kernels.mix[grid](eu_TP, bias_Mh, folded_MKrN, logits_TN, order_T, num_text, *shape, **options)
        ctx.save_for_backward(z_TC, order_T, num_text, bias_Mh, folded_MKrN, eu_TP, *projections)
        ctx.activation = activation
        return logits_TN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogits_TN: Tensor) -> tuple[Tensor | None, ...]:
        z_TC, order_T, num_text, bias_Mh, folded_MKrN, eu_TP, *projections = ctx.saved_tensors
        deu_TP, dbias_Mh, dfolded_MKrN = _mix_backward(
            dlogits_TN.contiguous(), eu_TP, bias_Mh, folded_MKrN, order_T, num_text, ctx.activation
        )
        dz_TC: Tensor | None = None
        dprojections: tuple[Tensor | None, ...] = (None,) * 4
        weight_MPC = _side_by_side(projections)
        if ctx.needs_input_grad[0]:
            dz_TC = torch.empty_like(z_TC)
            _grouped_product(deu_TP, weight_MPC.transpose(1, 2), dz_TC, order_T, num_text, gather=False)
        if any(ctx.needs_input_grad[6:]):
            dprojections = _weight_gradient(deu_TP, z_TC, weight_MPC, order_T, num_text, projections)
        return dz_TC, None, None, dbias_Mh, dfolded_MKrN, None, *dprojections


def _side_by_side(projections: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """W1 over W2_down, text then vision: [M, P, C]. A pass makes this copy, which is small beside z."""
    return torch.cat([weight.flatten(0, -2) for weight in projections]).unflatten(0, (2, -1))


def _grouped_product(
    a: Tensor, b_MND: Tensor, out: Tensor, order_T: Tensor, num_text: Tensor, *, gather: bool
) -> None:
    """Fill `out` with each token's row of `a` times its modality's matrix."""
    (num_tokens, depth), num_columns = a.shape, b_MND.shape[1]
    # Column tiles are the first axis, so that tiles of the same tokens run together and share the L2 cache.
    grid = (triton.cdiv(num_columns, BLOCK_COLUMNS), triton.cdiv(num_tokens, BLOCK_TOKENS) + 1)
    kernels.grouped_product[grid](
        a, b_MND, out, order_T, num_text, num_tokens, num_columns, depth, *b_MND.stride(),
        GATHER=gather, BLOCK_T=BLOCK_TOKENS, BLOCK_N=BLOCK_COLUMNS, BLOCK_D=BLOCK_DEPTH, num_warps=8,
        **_precision(a if gather else out, b_MND, round_a=not gather),
    )  # fmt: skip


def _weight_gradient(
    deu_TP: Tensor,
    z_TC: Tensor,
    weight_MPC: Tensor,
    order_T: Tensor,
    num_text: Tensor,
    projections: list[Tensor],
) -> tuple[Tensor, ...]:
    dweight_MPC = torch.empty_like(weight_MPC)
    M, P, C = weight_MPC.shape
    grid = (triton.cdiv(P, BLOCK_COLUMNS), triton.cdiv(C, BLOCK_COLUMNS), M)
    kernels.weight_gradient[grid](
        deu_TP, z_TC, dweight_MPC, order_T, num_text, z_TC.shape[0], P, C,
        BLOCK_P=BLOCK_COLUMNS, BLOCK_C=BLOCK_COLUMNS, BLOCK_T=BLOCK_DEPTH, num_warps=8,
        **_precision(z_TC, weight_MPC, round_a=True),
    )  # fmt: skip
    parts = dweight_MPC.flatten(0, 1).split([weight.shape[:-1].numel() for weight in projections])
    return tuple(part.view_as(weight) for part, weight in zip(parts, projections, strict=True))


def _precision(z: Tensor, weight: Tensor, *, round_a: bool) -> dict[str, Any]:
    """How a product treats its factors. With `round_a` the first one is the projection's gradient in fp32."""
    bf16 = z.dtype == weight.dtype == torch.bfloat16
    # Triton's interpreter computes in numpy, which has no bf16
    return dict(ROUND=bf16 and round_a, OPERAND=tl.bfloat16 if bf16 and not _INTERPRETED else tl.float32)


def _mix_backward(
    dlogits_TN: Tensor,
    eu_TP: Tensor,
    bias_Mh: Tensor,
    folded_MKrN: Tensor,
    order_T: Tensor,
    num_text: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(∂eu, ∂bias, ∂folded)."""
    M, K, r, N = folded_MKrN.shape
    deu_TP = torch.empty_like(eu_TP)
    grid, shape, options = _mix_launch(eu_TP.shape[0], folded_MKrN, activation)
    partial = eu_TP.new_empty(grid[0], K, r * N + 1)
    kernels.mix_backward[grid](
        dlogits_TN, eu_TP, bias_Mh, folded_MKrN, deu_TP, partial, order_T, num_text, *shape, **options
    )
    text_tiles = (num_text + BLOCK_MIX - 1) // BLOCK_MIX
    is_vision = torch.arange(grid[0], device=partial.device) >= text_tiles  # for each tile
    sums = (torch.stack([~is_vision, is_vision]).float() @ partial.flatten(1)).view(M, K, r * N + 1)
    return deu_TP, sums[:, :-1, -1].contiguous(), sums[..., :-1].reshape(M, K, r, N)


def _mix_launch(
    num_tokens: int, folded_MKrN: Tensor, activation: str
) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """Grid, sizes and constants of the two small kernels."""
    _, K, r, N = folded_MKrN.shape
    sizes = num_tokens, K - 1 + K * 2 * r, K - 1, r, N
    blocks = dict(BLOCK_T=BLOCK_MIX, BLOCK_R=triton.next_power_of_2(r), BLOCK_N=triton.next_power_of_2(N))
    return (triton.cdiv(num_tokens, BLOCK_MIX) + 1,), sizes, dict(ACTIVATION=activation, **blocks)
