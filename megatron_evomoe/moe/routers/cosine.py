"""A router that compares directions: the cosine between a token and each expert's centroid.

    logits_n = τ⁻¹ · ⟨z, c_n⟩ / (‖z‖·‖c_n‖)

Only a token's direction chooses its experts, and no expert attracts more tokens because its row is longer.
X-MoE (arXiv 2204.09179) routes so, on a hypersphere, against the collapse of representations, and so does
online k-means routing (arXiv 2605.12476), whose centroids are each expert's mean token. Cluster-aware
upcycling (arXiv 2604.13508) starts a router's rows at the centroids of clusters of the dense model's
activations.

The temperature τ is learned as ``log_scale`` = log τ⁻¹; it starts at 0.5, and τ⁻¹ is clamped to 100. Both
numbers are those of `CosineTopKGate` in Microsoft's Tutel. Unlike X-MoE and Tutel this router does not
project tokens to fewer dimensions first: the [N, C] product is small beside the experts, and a centroid
remains a vector that can be compared with tokens.

Shape legend: s sequence · b batch · T = s·b tokens · C width · N experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_evomoe.moe.routers.base import TypedRouter

MAX_LOG_SCALE = math.log(100)
"""The largest log τ⁻¹ that counts; beyond it the temperature gets no gradient."""
EPSILON = 1e-6
"""Vectors that are shorter count as this long, so a zero vector has the cosine 0."""


class CosineRouter(TypedRouter):
    """Normalised tokens against normalised centroids [N, C], one set for both modalities."""

    def logits(self, hidden: Tensor, token_types: Tensor) -> Tensor:
        logits_TN = cosine_logits(hidden.flatten(0, 1), self.centroids, self.log_scale, self.gate_dtype)
        return logits_TN.view(*hidden.shape[:2], -1)


def cosine_logits(z_TC: Tensor, centroids_NC: Tensor, log_scale_1: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [T, N], computed and returned in `dtype`, from tensors of any floating types."""
    return _CosineLogits.apply(z_TC, centroids_NC, log_scale_1, dtype)


class _CosineLogits(torch.autograd.Function):
    """Written by hand, so that the backward keeps the tokens as they came.

    Autograd would keep a copy of them in `dtype`, and would round each of the two parts of a bf16 token's
    gradient, which cancel along the token.
    """

    @staticmethod
    def forward(
        ctx: Any, z_TC: Tensor, centroids_NC: Tensor, log_scale_1: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(z_TC, centroids_NC, log_scale_1)
        ctx.dtype = dtype
        (unit_TC, _), (unit_NC, _) = _unit(z_TC, dtype), _unit(centroids_NC, dtype)
        return (unit_TC @ unit_NC.t()).mul_(_scale(log_scale_1, dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        z_TC, centroids_NC, log_scale_1 = ctx.saved_tensors
        (unit_TC, inverse_T1), (unit_NC, inverse_N1) = _unit(z_TC, ctx.dtype), _unit(centroids_NC, ctx.dtype)
        cosine_TN, scale_1 = unit_TC @ unit_NC.t(), _scale(log_scale_1, ctx.dtype)
        grad_TN = grad_TN * scale_1
        along_TN = grad_TN * cosine_TN
        dz = dcentroids = dlog_scale = None
        if ctx.needs_input_grad[0]:
            dz = _tangent(grad_TN @ unit_NC, along_TN.sum(1, keepdim=True), unit_TC, inverse_T1)
            dz = dz.to(z_TC.dtype)
        if ctx.needs_input_grad[1]:
            dcentroids = _tangent(grad_TN.t() @ unit_TC, along_TN.sum(0)[:, None], unit_NC, inverse_N1)
            dcentroids = dcentroids.to(centroids_NC.dtype)
        if ctx.needs_input_grad[2]:
            is_free = log_scale_1 <= MAX_LOG_SCALE
            dlog_scale = (along_TN.sum() * is_free).to(log_scale_1.dtype)
        return dz, dcentroids, dlog_scale, None


def _unit(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of length 1 in `dtype`, and the inverse of their lengths [rows, 1]."""
    vectors = vectors.to(dtype)
    inverse = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(EPSILON).reciprocal()
    return vectors * inverse, inverse


def _scale(log_scale_1: Tensor, dtype: torch.dtype) -> Tensor:
    return log_scale_1.to(dtype).clamp_max(MAX_LOG_SCALE).exp()


def _tangent(grad: Tensor, along: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of vectors, from the gradient of their unit vectors: what is not along the vector."""
    is_long = inverse < 1 / EPSILON
    return (grad - along * is_long * unit) * inverse
