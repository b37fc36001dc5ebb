"""FLOP and bytes of one router layer, forward and backward, counted from its formulas.

`router.py` divides them by the measured seconds.

**FLOP** are 2 per multiplication and addition of matrix products, as each form computes them: a form that
takes more work for the same logits has a higher count. Element-wise operations, a few per number, are left
out.

**Bytes** are compulsory traffic: no schedule of the same form needs less while caches hold nothing from one
pass to the next. Forward and backward each read tokens and weights once; logits and the gradients of tokens
and weights are written once, and the gradient of the logits is read once. What the forward leaves for the
backward could be computed again, so it is not counted. Forms that build Θ write it once, read it in both
passes, and write and read its gradient.

Shapes as in `megatron_evomoe/moe/dtr/maths.py`: T tokens · C width · h, r inner sizes · K = h + 1 · N
experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from measure import ON_GPU

BUILD_THETA = ("naive", "naive-tuned")
ITEM_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of the router layer in one row of the benchmark."""

    T: int
    C: int
    h: int
    r: int
    N: int
    ffn: int
    """Inner width of the expert FFN."""

    @property
    def projected(self) -> int:
        """Number of columns, e and u, to which the factored form projects a token."""
        return self.h + (self.h + 1) * 2 * self.r


def precision(subject: str, dtype: str) -> str:
    """Precision of a subject's matrix products, given tokens and weights in `dtype`.

    The subject's speed is compared with the ceiling of this precision.
    """
    return dtype if subject in ("fused", "ffn") or (subject == "masked" and ON_GPU) else "fp32"


def flop(subject: str, s: Shape) -> int:
    """FLOP of forward and backward.

    Every product has two products in the backward, or one if its weights are frozen.
    """
    passes = 2 if subject == "ffn" else 3
    return 2 * passes * _forward_products(subject, s)


def _forward_products(subject: str, s: Shape) -> int:
    """Multiplications of the matrix products in the forward."""
    K, theta = s.h + 1, 3 * s.r * s.C
    project = s.T * s.projected * s.C
    # Products with each token's eu: sums over k, and s·(φ·Θ_up).
    mix, up = (s.T * K * (2 * s.r + s.N), s.T * K * s.r * s.N)
    folded = 2 * K * s.r * s.C * s.N  # φ·Θ_up of both modalities
    return {
        "linear": s.T * s.C * s.N,
        "naive": s.T * (s.h * s.C + s.h * theta + theta + s.C * s.N),
        "naive-tuned": s.T * (s.h * s.C + K * theta + theta + s.C * s.N),
        "autograd": project + mix + up + folded,
        "masked": 2 * project + mix + 2 * up + folded,
        "factored": project + mix + up + folded,
        "fused": project + mix + up + folded,
        "ffn": s.T * 3 * s.C * s.ffn,
    }[subject]


def weights(subject: str, s: Shape) -> int:
    """Number of weights that the layer learns, or of the expert FFN."""
    if subject in ("linear", "ffn"):
        return s.N * s.C if subject == "linear" else 3 * s.C * s.ffn
    return 2 * (s.h * s.C + s.h + (s.h + 1) * 3 * s.r * s.C) + s.N * s.C


def traffic(subject: str, s: Shape, dtype: str) -> int:
    """Compulsory bytes of forward and backward; logits and Θ are fp32."""
    item = ITEM_BYTES[dtype]
    tokens = 3 * s.T * s.C * item  # read twice, and their gradient is written once
    # The expert FFN is frozen, so its weights have no gradient; its outputs are as wide as tokens.
    if subject == "ffn":
        return tokens + 2 * weights(subject, s) * item + 2 * s.T * s.C * item
    theta = 5 * s.T * 3 * s.r * s.C * 4 if subject in BUILD_THETA else 0
    return tokens + 3 * weights(subject, s) * item + 2 * s.T * s.N * 4 + theta
