"""The norm of the local (no Transformer Engine) layers."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_NORMS: dict[str, type[torch.nn.Module]] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class TorchNorm:
    """PyTorch's LayerNorm or RMSNorm, by ``config.normalization``, over the last dimension.

    It stands where megatron-core would put ``WrappedTorchNorm``, which refuses sequence parallelism, while
    `MoELayer` refuses to train with TP > 1 without it. Under sequence parallelism each TP rank normalises its
    own positions, so the weights see partial gradients; marking them ``sequence_parallel`` makes
    `finalize_model_grads` add those up.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:  # type: ignore[misc]
        """Build the norm for activations [..., hidden_size] in ``config.params_dtype``."""
        norm = _NORMS[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
