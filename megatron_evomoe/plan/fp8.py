"""Memory that FP8 (`gpu.fp8_format`) adds for copies of weights and saves for inputs. An estimate.

It follows the code of Transformer Engine 2.11 (``pytorch/module/``, ``pytorch/tensor/``) and megatron-core
0.16.1 for Hopper, and is not measured. A weight stays in bf16, and each linear layer keeps an FP8 copy of
it from step to step. FP8 products on Hopper need both factors with the summed dimension last, so a layer
that computes its input's gradient keeps a transposed copy too. Of its input a layer keeps one FP8 copy in
one of the two orders. Padding of rows and scales is not counted.
"""

from __future__ import annotations

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.plan.gradient_flow import LayerFlow, chunk_flow, recomputed_modules
from megatron_evomoe.plan.rank_tensors import chunk_layers, chunks, layer_tensors, local_numel

_INPUT_PER_SCALE_BYTE = {"blockwise": 32, "mxfp8": 32}
"""Elements per byte of scales: 4 bytes for 128 of a row, or 1 for 32. Others have a scale per tensor."""
_WEIGHT_PER_SCALE_BYTE = {"blockwise": 128 * 128 // 4, "mxfp8": 32}
"""Elements per byte of scales: 4 bytes for 128 x 128, or 1 for 32."""


def input_bytes(config: RunConfig, elements: int) -> int:
    """Bytes that an FP8 linear layer keeps of an input of `elements` for its weight's gradient."""
    return _bytes(elements, _INPUT_PER_SCALE_BYTE.get(config.gpu.fp8_recipe))


def projection_keeps_copy(config: RunConfig) -> bool:
    """Whether the attention's output projection keeps an FP8 copy of its input, beside attention's in bf16.

    megatron-core lets it share the bf16 tensor, which Transformer Engine does not support with `delayed`.
    """
    return config.gpu.fp8_recipe == "delayed"


def weight_bytes(config: RunConfig, kind: StageKind, pp_rank: int) -> int:
    """FP8 copies of the decoder's weights on one rank; `config` has layout and overrides applied."""
    if config.gpu.fp8_format is None:
        return 0
    total = 0
    for chunk in range(chunks(config)):
        layers = chunk_layers(config, pp_rank, chunk)
        for layer, flow in zip(layers, chunk_flow(config, kind, pp_rank, chunk), strict=True):
            total += _layer_bytes(config, kind, layer, flow) if flow.fp8 else 0
    return total


def _layer_bytes(config: RunConfig, kind: StageKind, layer: int, flow: LayerFlow) -> int:
    transposed = _transposed(config, layer, flow)
    total = 0
    for tensor in layer_tensors(config, kind, layer):
        *_, linear, parameter = tensor.name.split(".")
        if linear in transposed and parameter == "weight":
            copies = 1 + transposed[linear]
            per_scale_byte = _WEIGHT_PER_SCALE_BYTE.get(config.gpu.fp8_recipe)
            total += copies * _bytes(local_numel(config, tensor), per_scale_byte)
    return total


def _transposed(config: RunConfig, layer: int, flow: LayerFlow) -> dict[str, bool]:
    """Linear layer -> whether it keeps a transposed copy too.

    It does if its input needs a gradient, and always if a norm is fused into it (model/language.py).
    """
    fuses = not config.language.parallel_residual
    # Recompute of a mixture makes its input need a gradient, so that its trained parameters get one
    # (moe/layer.py).
    mixture_input = (
        flow.mixture and (flow.trains_router or flow.trains_ffn) and "moe" in recomputed_modules(config)
    )
    return {
        "linear_qkv": fuses or flow.ffn_input_grad,
        "linear_proj": flow.ffn_input_grad,
        "linear_fc1": flow.ffn_input_grad or mixture_input or (fuses and not config.moe.is_moe_layer(layer)),
        # The input of fc2 is multiplied by the router's probability, which needs a gradient.
        "linear_fc2": flow.ffn_input_grad or flow.trains_ffn or flow.trains_router,
    }


def _bytes(elements: int, per_scale_byte: int | None) -> int:
    return elements + (elements // per_scale_byte if per_scale_byte else 0)
