"""Which code computes the DTR: `moe.dtr_kernel`. Imports Triton only where it is asked for and can run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_evomoe.config import ConfigError
from megatron_evomoe.parallel import backend


def check(kernel: str) -> None:
    """Refuse what this machine cannot run.

    Raises:
        ConfigError: `triton` without Triton, or without a GPU (where TRITON_INTERPRET=1 still runs the
            kernels, very slowly).
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
    """`dtr_triton.dtr_logits` where `moe.dtr_kernel` asks for it; none means the factored form in PyTorch.

    Raises:
        ConfigError: see `check`; or `triton`, which sums in fp32, is to compute in another dtype.
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
