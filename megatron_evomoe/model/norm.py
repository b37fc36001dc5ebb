"""The norm of the local layers, those without Transformer Engine."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_NORMS: dict[str, type[torch.nn.Module]] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class TorchNorm:
    """PyTorch's LayerNorm or RMSNorm, by ``config.normalization``, over the last dimension.

    megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism, without which `MoELayer` refuses to
    train with TP > 1. Under sequence parallelism each TP rank normalises its own positions, so its
    gradients of the weights are partial; the mark ``sequence_parallel`` makes `finalize_model_grads` sum
    them.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:  # type: ignore[misc]
        """Build the norm for activations [..., hidden_size] in ``config.params_dtype``."""
        norm = _NORMS[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
