"""The maths of the Dynamic Token-aware Router (EvoMoE, Eq. 4-5): pure functions of tensors.

Nothing here keeps state or communicates.

Shape legend: T tokens · C width of z · N experts · h hypernetwork's inner width · r rank of the generated
    router ·
K = h + 1 terms of a generated matrix (h columns of W2 and its bias).

Each modality has a hypernetwork that turns a token z into the weights of a small router for that token:

    e = W1·z + b1,   Θ(z) = W2·e + b2 = [Θ_down (2r × C), Θ_up (C × r)]                           (Eq. 5)
    E = Θ_up · SwiGLU(Θ_down·z),   logits = φ(E)                                                  (Eq. 4)

Θ is never built. It is linear in ê = [e, 1], so Θ_down·z = Σ_k ê_k (W2_down[k]·z) is one GEMM C → K·2r and
a weighted sum over k, and φ·Θ_up·s = Σ_k ê_k (φ·W2_up[k])·s, in which the K small matrices φ·W2_up[k] (N ×
r) are the same for all tokens. This takes T·K·2r numbers of memory instead of T·3r·C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()  # torch 2.8
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda e: e, "gelu": F.gelu, "silu": F.silu}


class HyperWeights(NamedTuple):
    """One modality's hypernetwork. The last slice of `weight2_*` along k is the bias b2, the others W2."""

    weight1_hC: Tensor
    bias1_h: Tensor
    weight2_down_KJC: Tensor  # J = 2r: gate rows, then value rows
    weight2_up_KrC: Tensor  # Θ_up transposed, so that C is last everywhere


class DtrWeights(NamedTuple):
    """All that one layer's DTR learns. φ is shared by both modalities and has no bias (docs/router.md)."""

    text: HyperWeights
    vision: HyperWeights
    phi_NC: Tensor

    def named(self) -> dict[str, Tensor]:
        """The tensors by the names that `moe/router.py` gives them."""
        names = ("weight1", "bias1", "weight2_down", "weight2_up")
        halves = {"text": self.text, "vision": self.vision}
        return {"phi": self.phi_NC} | {
            f"{modality}.{name}": value
            for modality, hyper in halves.items()
            for name, value in zip(names, hyper, strict=True)
        }


def dtr_logits(
    z_TC: Tensor,
    is_vision_T: Tensor,
    weights: DtrWeights,
    *,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    gather: bool = True,
) -> Tensor:
    """Router logits [T, N] in `dtype`. Sums are in `dtype`, whatever the types of z and of the weights.

    With `gather` each token meets only its own modality's hypernetwork. The host must then know the number
    of image tokens, which needs a device synchronisation on a GPU. Without `gather` all tokens meet both
    hypernetworks and `where` picks one result: twice the products, but shapes are static, as CUDA graphs
    demand. In that form bf16 tokens are multiplied by bf16 weights without a cast. This is exact in fp32 in
    the forward; in the backward the gradient of the projection is rounded to bf16 first, as that of any
    linear layer is in bf16 training. Both forms give the weights of a modality without tokens gradients of
    zero.
    """
    z_TC = z_TC.contiguous()
    if not gather:
        return _static_logits(z_TC, is_vision_T[:, None], weights, activation, dtype)
    text, vision = _cast(weights.text, dtype), _cast(weights.vision, dtype)
    phi_NC = weights.phi_NC.to(dtype)

    num_vision = int(is_vision_T.sum())
    # Text tokens come first, and the tokens of each modality stay in sequence order.
    order_T = torch.argsort(is_vision_T.to(torch.uint8), stable=True)
    text_index, vision_index = order_T.split([z_TC.shape[0] - num_vision, num_vision])
    e_text, u_text, e_vision, u_vision = _ProjectByModality.apply(
        z_TC, text_index, vision_index,
        text.weight1_hC, text.weight2_down_KJC.flatten(0, 1),
        vision.weight1_hC, vision.weight2_down_KJC.flatten(0, 1),
    )  # fmt: skip
    sorted_TN = torch.cat(
        [
            _logits(e_text, u_text, text, phi_NC, activation),
            _logits(e_vision, u_vision, vision, phi_NC, activation),
        ]
    )
    return torch.empty_like(sorted_TN).index_copy(0, order_T, sorted_TN)


def naive_dtr_logits(
    z_TC: Tensor,
    is_vision_T: Tensor,
    weights: DtrWeights,
    *,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Eq. 4-5 as printed, with Θ(z) built for every token (T·3r·C numbers): the reference for tests."""
    z_TC, phi_NC = z_TC.to(dtype), weights.phi_NC.to(dtype)
    logits_TN = z_TC.new_zeros(z_TC.shape[0], phi_NC.shape[0])
    for hyper, index in ((weights.text, ~is_vision_T), (weights.vision, is_vision_T)):
        hyper, index = _cast(hyper, dtype), index.nonzero()[:, 0]
        z = z_TC[index]
        e_th = ACTIVATIONS[activation](F.linear(z, hyper.weight1_hC, hyper.bias1_h))
        down_tJC = torch.einsum("tk,kjc->tjc", e_th, hyper.weight2_down_KJC[:-1]) + hyper.weight2_down_KJC[-1]
        up_trC = torch.einsum("tk,kjc->tjc", e_th, hyper.weight2_up_KrC[:-1]) + hyper.weight2_up_KrC[-1]
        s_tr = _swiglu(torch.einsum("tjc,tc->tj", down_tJC, z))
        E_tC = torch.einsum("tjc,tj->tc", up_trC, s_tr)
        logits_TN = logits_TN.index_copy(0, index, F.linear(E_tC, phi_NC))
    return logits_TN


class _ProjectByModality(torch.autograd.Function):
    """(e, u) = (W1·z, W2_down·z) of the text tokens, then of the image tokens; e without its bias.

    Written by hand, because autograd would keep a gathered and up-cast copy of z (T·C numbers in fp32)
    until the backward, and would add up ∂z from two scatters into zeros. docs/router.md has measurements.
    """

    @staticmethod
    def forward(
        ctx: Any, z_TC: Tensor, text_index: Tensor, vision_index: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(z_TC, text_index, vision_index, *weights)
        outputs: list[Tensor] = []
        for index, (weight1, down) in ((text_index, weights[:2]), (vision_index, weights[2:])):
            z = z_TC.index_select(0, index).to(down.dtype)
            outputs += [z @ weight1.t(), z @ down.t()]
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z_TC, text_index, vision_index, *weights = ctx.saved_tensors
        dz_TC = torch.empty_like(z_TC) if ctx.needs_input_grad[0] else None
        dweights: list[Tensor | None] = []
        for half, index in enumerate((text_index, vision_index)):
            pair = slice(2 * half, 2 * half + 2)
            (weight1, down), (de, du) = weights[pair], grads[pair]
            z = z_TC.index_select(0, index).to(down.dtype)
            needs_weight1, needs_down = ctx.needs_input_grad[3:][pair]
            dweights += [de.t() @ z if needs_weight1 else None, du.t() @ z if needs_down else None]
            if dz_TC is not None:
                dz_TC.index_copy_(0, index, (du @ down).addmm_(de, weight1).to(z_TC.dtype))
        return dz_TC, None, None, *dweights


class _ProjectMasked(torch.autograd.Function):
    """(e, u) = (W1·z, W2_down·z) of each token by its modality, side by side [T, P]; e without its bias.

    All tokens meet both modalities' weights, which are [2P, C] with text's first. Written by hand for the
    reason given in `_ProjectByModality`: the backward keeps z as it came.
    """

    @staticmethod
    def forward(ctx: Any, z_TC: Tensor, is_vision_T1: Tensor, both_QC: Tensor) -> Tensor:
        ctx.save_for_backward(z_TC, is_vision_T1, both_QC)
        of_text, of_vision = _product(z_TC, both_QC.t()).chunk(2, dim=1)
        return torch.where(is_vision_T1, of_vision, of_text)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TP: Tensor) -> tuple[Tensor | None, ...]:
        z_TC, is_vision_T1, both_QC = ctx.saved_tensors
        if z_TC.dtype == both_QC.dtype == torch.bfloat16:
            grad_TP = grad_TP.to(torch.bfloat16)
        grad_TQ = torch.cat([grad_TP * ~is_vision_T1, grad_TP * is_vision_T1], dim=1)
        dz_TC = _product(grad_TQ, both_QC).to(z_TC.dtype) if ctx.needs_input_grad[0] else None
        dboth_QC = _product(grad_TQ.t(), z_TC).to(both_QC.dtype) if ctx.needs_input_grad[2] else None
        return dz_TC, None, dboth_QC


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b. Of bf16 factors the sums and the result are fp32; a GPU's tensor cores compute that exactly."""
    if a.dtype == b.dtype == torch.bfloat16:
        if not a.is_cpu and _HAS_OUT_DTYPE:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype) @ b.to(dtype)


def _static_logits(
    z_TC: Tensor, is_vision_T1: Tensor, weights: DtrWeights, activation: str, dtype: torch.dtype
) -> Tensor:
    """`dtr_logits` without `gather`."""
    # bf16 weights are not cast for bf16 tokens, because the products are exact in fp32
    is_exact = z_TC.dtype == weights.phi_NC.dtype == torch.bfloat16 and dtype == torch.float32
    text, vision = weights.text, weights.vision
    both_QC = torch.cat(
        [part for w in (text, vision) for part in (w.weight1_hC, w.weight2_down_KJC.flatten(0, 1))]
    )
    eu_TP = _ProjectMasked.apply(z_TC, is_vision_T1, both_QC if is_exact else both_QC.to(dtype))
    h, phi_NC = weights.text.bias1_h.shape[0], weights.phi_NC.to(dtype)
    bias_Th = torch.where(is_vision_T1, vision.bias1_h.to(dtype), text.bias1_h.to(dtype))
    e_T1K, s_Tr = _mix(eu_TP[:, :h], eu_TP[:, h:], bias_Th, activation)
    of_vision, of_text = (s_Tr @ _folded(w.weight2_up_KrC.to(dtype), phi_NC) for w in (vision, text))
    v_TX = torch.where(is_vision_T1, of_vision, of_text)
    return torch.bmm(e_T1K, v_TX.view(-1, h + 1, phi_NC.shape[0]))[:, 0]


def _logits(e_Th: Tensor, u_TKJ: Tensor, hyper: HyperWeights, phi_NC: Tensor, activation: str) -> Tensor:
    """From the two projections of T tokens of one modality to their logits [T, N]."""
    e_T1K, s_Tr = _mix(e_Th, u_TKJ, hyper.bias1_h, activation)
    v_TKN = (s_Tr @ _folded(hyper.weight2_up_KrC, phi_NC)).view(-1, e_T1K.shape[2], phi_NC.shape[0])
    return torch.bmm(e_T1K, v_TKN)[:, 0]


def _mix(e_Th: Tensor, u_TKJ: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """ê [T, 1, K] and s = SwiGLU(Θ_down·z) [T, r], from the two projections, e without its bias."""
    e_T1K = F.pad(ACTIVATIONS[activation](e_Th + bias), (0, 1), value=1.0)[:, None]
    return e_T1K, _swiglu(
        torch.bmm(e_T1K, u_TKJ.view(-1, e_T1K.shape[2], u_TKJ.shape[1] // e_T1K.shape[2]))[:, 0]
    )


def _folded(weight2_up_KrC: Tensor, phi_NC: Tensor) -> Tensor:
    """The K terms of φ·Θ_up side by side, [r, K·N]. They do not depend on tokens."""
    K, r, C = weight2_up_KrC.shape
    return F.linear(weight2_up_KrC.view(-1, C), phi_NC).view(K, r, -1).transpose(0, 1).reshape(r, -1)


def _swiglu(gate_and_value_TJ: Tensor) -> Tensor:
    gate, value = gate_and_value_TJ.chunk(2, dim=-1)
    return F.silu(gate) * value


def _cast(hyper: HyperWeights, dtype: torch.dtype) -> HyperWeights:
    return HyperWeights(*(w.to(dtype) for w in hyper))
