"""Chooses the code that computes the DTR (`moe.dtr_kernel`). Triton is imported only if it is chosen."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_evomoe.config import ConfigError
from megatron_evomoe.parallel import backend


def check(kernel: str) -> None:
    """Check that this machine can run `kernel`.

    Raises:
        ConfigError: `triton` without Triton, or without a GPU (unless TRITON_INTERPRET=1 lets the interpreter
            run the kernels, very slowly).
    """
    if kernel != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "dtr_kernel triton needs Triton, which does not import here; install it, or use dtr_kernel torch"
        )
    if not backend.on_gpu() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("dtr_kernel triton needs a GPU, and there is none; set dtr_kernel to torch")


def fused(kernel: str, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """`dtr_logits` on Triton kernels for `triton`; None for `torch`, the factored form in PyTorch.

    Raises:
        ConfigError: as `check`; or `triton`, which computes in fp32, is to compute in another dtype.
    """
    check(kernel)
    if kernel != "triton":
        return None
    if dtype != torch.float32:
        raise ConfigError(
            f"dtr_kernel triton computes in fp32, and this router in {dtype}; set dtr_kernel to torch"
        )
    from megatron_evomoe.moe.dtr import triton as dtr_triton

    return dtr_triton.dtr_logits
