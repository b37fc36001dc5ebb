"""Weights as they will be written: of one type for each tensor of the checkpoint, and every number finite."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_evomoe.checkpoint.record import CheckpointError


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`; the same one if it has it.

    Raises:
        CheckpointError: a value is not finite, before or after; the message says how many and what helps.
    """
    new = tensor.to(dtype)
    if is_finite(new):
        return new
    if bad := _count(tensor):
        raise CheckpointError(
            f"{name}: {bad} of {tensor.numel()} values are not finite (NaN or infinite) in the source; a "
            "model "
            "cannot compute with them. Fetch it again, or ask its author for a whole one"
        )
    raise CheckpointError(
        f"{name}: {_count(new)} of {tensor.numel()} values are beyond the largest {_short(dtype)}, "
        f"{torch.finfo(dtype).max:g}, and would become infinite; import with --dtype fp32 or bf16"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Reads each value once and makes no copy: NaN is the smallest and
    largest of its like.
    """
    if tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _count(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
