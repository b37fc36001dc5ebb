"""Settings that need a GPU with Transformer Engine: FP8 and fused kernels, as fields of megatron-core.

Only the language decoder computes in FP8. megatron-core enables FP8 around the layers of a block whose
configuration asks for it, and there only Transformer Engine's linear layers use it. Routers and hypernetworks
(plain matrix products in fp32), norms, softmax, embedding, output layer and the state of evolution therefore
never do. The configurations of the vision tower and of the projector do not ask for FP8, because the 577
positions per image of CLIP-L/336 are not a multiple of what an FP8 product needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.utils import get_model_config

from megatron_evomoe.config import ConfigError, RunConfig

Capability = tuple[int, int]

# Transformer Engine's limits (2.11); it lacks some transposed forms of mxfp8 for compute capability 12.x
_LOWEST: dict[str, Capability] = {
    "delayed": (8, 9),
    "tensorwise": (8, 9),
    "blockwise": (9, 0),
    "mxfp8": (10, 0),
}
_MXFP8_BELOW: Capability = (12, 0)

# The number of rows of an FP8 product is a multiple of this: 16 for the weight's gradient, or the recipe's
# block
_ROWS = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}


def language_settings(config: RunConfig, *, use_te: bool, capability: Capability | None) -> dict[str, Any]:
    """Fields of the decoder's `TransformerConfig`. With the local layers everything is off.

    Args:
        use_te: whether the layers are Transformer Engine's.
        capability: the GPU's compute capability, such as (9, 0) for Hopper; None without a GPU.

    Raises:
        ConfigError: FP8 is asked for, and there is no GPU or it does not support the recipe.
    """
    return {**_fusions(config, use_te), **_fp8(config, use_te, capability)}


def sequence_multiple(config: RunConfig) -> int:
    """The multiple to which sequence lengths are padded, so that each TP rank's part fits an FP8 product."""
    rows = _ROWS[config.gpu.fp8_recipe] if config.gpu.fp8_format else 1
    return config.parallel.tensor_model_parallel_size * rows


def check_sequence(config: RunConfig) -> None:
    """Check that the longest sequence can be padded.

    Raises:
        ConfigError: `seq_length` is not a multiple of `sequence_multiple`.
    """
    multiple = sequence_multiple(config)
    if config.data.seq_length % multiple:
        raise ConfigError(
            f"seq_length {config.data.seq_length} must be a multiple of {multiple}, to which sequences are "
            "padded"
        )


@contextlib.contextmanager
def without_fp8(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, the decoder computes in its own dtype, since an answer grows by one token to any length."""
    configs = {id(c): c for c in map(get_model_config, chunks)}.values()
    formats = [c.fp8 for c in configs]
    for core in configs:
        core.fp8 = None
    try:
        yield
    finally:
        for core, fp8 in zip(configs, formats, strict=True):
            core.fp8 = fp8


def _fusions(config: RunConfig, use_te: bool) -> dict[str, Any]:
    gpu = config.gpu

    def chosen(wanted: bool | None, by_default: bool = True) -> bool:
        return use_te and (by_default if wanted is None else wanted)

    return {
        "apply_rope_fusion": chosen(gpu.apply_rope_fusion),
        "moe_permute_fusion": chosen(gpu.moe_permute_fusion),
        # megatron-core rounds its gradient to bf16, whatever the parameters' type (0.16.1 and 0.19.2)
        "cross_entropy_loss_fusion": chosen(gpu.cross_entropy_loss_fusion, by_default=config.train.bf16),
    }


def _fp8(config: RunConfig, use_te: bool, capability: Capability | None) -> dict[str, Any]:
    gpu = config.gpu
    if gpu.fp8_format is None:
        return {}
    if not use_te or capability is None:
        raise ConfigError(
            f"fp8_format {gpu.fp8_format} needs Transformer Engine on a GPU; leave fp8_format out here"
        )
    _check_capability(gpu.fp8_recipe, capability)
    return {
        "fp8": gpu.fp8_format,
        "fp8_recipe": gpu.fp8_recipe,
        "fp8_margin": gpu.fp8_margin,
        "fp8_amax_history_len": gpu.fp8_amax_history_len,
        "fp8_amax_compute_algo": gpu.fp8_amax_compute_algo,
        "first_last_layers_bf16": gpu.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": gpu.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": gpu.num_layers_at_end_in_bf16,
        # moe_router_padding_for_fp8 is megatron-core's old name of it, and gives a warning
        "moe_router_padding_for_quantization": gpu.moe_router_padding_for_fp8,
    }


def _check_capability(recipe: str, capability: Capability) -> None:
    has = "{}.{}".format(*capability)
    if capability < _LOWEST[recipe]:
        fits = [name for name, lowest in _LOWEST.items() if lowest <= capability]
        remedy = f"choose {' or '.join(fits)}" if fits else "leave fp8_format out"
        raise ConfigError(
            f"fp8_recipe {recipe} needs compute capability {'{}.{}'.format(*_LOWEST[recipe])}, this GPU has "
            f"{has}; {remedy}"
        )
    if recipe == "mxfp8" and capability >= _MXFP8_BELOW:
        raise ConfigError(
            f"Transformer Engine has no fp8_recipe mxfp8 for compute capability {has}; choose tensorwise"
        )
