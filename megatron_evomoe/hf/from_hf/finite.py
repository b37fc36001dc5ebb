"""Converts weights to the dtype in which they are written, and refuses values that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_evomoe.checkpoint.record import CheckpointError


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert `tensor` to `dtype`; a tensor that has it already is returned itself.

    Args:
        name: of the tensor, for messages.

    Raises:
        CheckpointError: a value is not finite before or after the conversion.
    """
    new = tensor.to(dtype)
    if is_finite(new):
        return new
    if bad := _count(tensor):
        raise CheckpointError(
            f"{name}: {bad} of {tensor.numel()} values are not finite (NaN or infinite) in the source, and "
            "no model can compute with them. Download it again, or use another version of the model"
        )
    raise CheckpointError(
        f"{name}: {_count(new)} of {tensor.numel()} values exceed the largest {_short(dtype)}, "
        f"{torch.finfo(dtype).max:g}, and would become infinite; import with --dtype fp32 or bf16"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    Minimum and maximum suffice, because both are NaN as soon as one value is. They are found in one pass and
    without a copy.
    """
    if tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _count(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
