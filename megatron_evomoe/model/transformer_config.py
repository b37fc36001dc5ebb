"""Translates our configuration into megatron-core's: one `TransformerConfig` for each part of the model.

Every field that changes the maths of a pretrained model is set here explicitly, so that a default which
changes between versions of megatron-core does not change the model. Two traps, each pinned by
``tests/parity/test_dense_hf.py``: megatron-core's fused bias+GELU is the tanh GELU, whatever was asked for,
and masked-softmax fusion needs kernels that no wheel contains.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal
from torch.overrides import TorchFunctionMode

from megatron_evomoe.config import ConfigError, RunConfig
from megatron_evomoe.model import precision
from megatron_evomoe.moe.dtr import kernel as dtr_kernel
from megatron_evomoe.parallel import backend
from megatron_evomoe.parallel.degrees import virtual_stages


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation (Phi-2's ``gelu_new``, SigLIP's ``gelu_pytorch_tanh``)."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's GELU, x·σ(1.702·x). megatron-core's is compiled, which needs a C++ compiler on a CPU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
}


_shapes_only: contextvars.ContextVar[bool] = contextvars.ContextVar("shapes_only", default=False)


class _OnMeta(TorchFunctionMode):
    """Creates every tensor on the meta device: with a shape and without memory.

    ``torch.device("meta")`` does not cover calls that name a device, as megatron-core's do on GPUs, nor the
    factories that `parallel.cpu` has wrapped.
    """

    _FACTORIES = frozenset(
        inspect.unwrap(getattr(torch, name))
        for name in ("empty", "zeros", "ones", "full", "tensor", "rand", "randn", "arange")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FACTORIES:
            kwargs["device"] = "meta"
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, the builders of ``model/`` make models of any size without weights, for names and shapes."""
    token = _shapes_only.set(True)
    try:
        with _OnMeta():
            yield
    finally:
        _shapes_only.reset(token)


def resolve_transformer_impl(config: RunConfig) -> str:
    """``local`` or ``transformer_engine``.

    ``auto`` means Transformer Engine if there is a CUDA device and it imports. Without CUDA it is not
    imported.

    Raises:
        ConfigError: Transformer Engine is asked for, or needed by another setting, and cannot be used.
    """
    wanted = config.train.transformer_impl
    available = backend.on_gpu() and _have_transformer_engine()
    if wanted == "transformer_engine" and not available:
        why = "it does not import" if backend.on_gpu() else "there is no CUDA device"
        raise ConfigError(
            f"transformer_impl transformer_engine cannot be used: {why}; install the [gpu] extra on a GPU "
            "machine, or set transformer_impl to auto or local"
        )
    impl = "transformer_engine" if available and wanted != "local" else "local"
    needs = {
        "context_parallel_size": config.parallel.context_parallel_size > 1,
        "moe_grouped_gemm": config.moe.moe_grouped_gemm,
        "fp8_format": config.gpu.fp8_format is not None,
        "apply_rope_fusion": bool(config.gpu.apply_rope_fusion),
        "moe_permute_fusion": bool(config.gpu.moe_permute_fusion),
        "cross_entropy_loss_fusion": bool(config.gpu.cross_entropy_loss_fusion),
    }
    for name, needed in needs.items():
        if needed and impl == "local":
            raise ConfigError(
                f"{name} needs Transformer Engine, and this run uses the local layers; leave {name} at its "
                "default, or run with Transformer Engine on a GPU"
            )
    return impl


def _have_transformer_engine() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def language_transformer_config(config: RunConfig) -> TransformerConfig:
    """The decoder's configuration, the same for every stage kind, so that checkpoints of all stages agree.

    Raises:
        ConfigError: megatron-core refuses the combination of settings, or would compute something else.
    """
    lm, moe, train, parallel = config.language, config.moe, config.train, config.parallel
    full, selective = train.recompute_granularity == "full", train.recompute_granularity == "selective"
    _check_language(config)
    return _build(
        config,
        num_layers=lm.num_layers,
        hidden_size=lm.hidden_size,
        ffn_hidden_size=lm.ffn_hidden_size,
        num_attention_heads=lm.num_attention_heads,
        init_method_std=lm.init_method_std,
        num_query_groups=lm.query_groups,
        kv_channels=lm.head_size,
        normalization=lm.normalization,
        layernorm_epsilon=lm.norm_epsilon,
        activation_func=ACTIVATIONS[lm.activation],
        gated_linear_unit=lm.gated_linear_unit,
        # megatron-core's fused kernels compute the same function for this pair alone
        bias_activation_fusion=backend.on_gpu() and lm.activation == "silu" and lm.gated_linear_unit,
        bias_dropout_fusion=backend.on_gpu() and not lm.add_bias_linear,
        add_bias_linear=lm.add_bias_linear,
        add_qkv_bias=lm.add_qkv_bias,
        qk_layernorm=lm.qk_layernorm,
        rotary_interleaved=False,
        # Hugging Face counts the query's own position, megatron-core only the positions before it
        window_size=(lm.window_size - 1, 0) if lm.window_size else None,
        recompute_granularity=train.recompute_granularity,
        recompute_method="uniform" if full else None,
        recompute_num_layers=train.recompute_num_layers if full else None,
        recompute_modules=list(train.recompute_modules) if selective else None,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages(config),
        # With two stages of several chunks a rank sends activations and gradients to the same peer. Nothing
        # tells them apart in batched messages, and gradients would arrive as activations. Overlapped messages
        # use a group for each direction.
        overlap_p2p_comm=virtual_stages(config) is not None,
        batch_p2p_comm=virtual_stages(config) is None,
        # `sort` and `pack` give microbatches of different lengths; the stages then tell each other the shapes
        variable_seq_lengths=_has_varying_lengths(config),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=_sequence_parallel(config),
        num_moe_experts=moe.num_experts,
        moe_layer_freq=moe.layer_pattern(lm.num_layers),
        moe_ffn_hidden_size=lm.ffn_hidden_size,
        moe_router_topk=moe.moe_router_topk,
        # The softmax is over all experts, before the choice: over a single chosen logit it would be the
        # constant 1, from which nothing learns, and `router_gate` is defined on these probabilities for
        # every K.
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=moe.moe_aux_loss_coeff,
        moe_z_loss_coeff=moe.moe_z_loss_coeff,
        moe_expert_capacity_factor=moe.moe_expert_capacity_factor,
        moe_token_dispatcher_type=moe.moe_token_dispatcher_type,
        moe_grouped_gemm=moe.moe_grouped_gemm,
        **precision.language_settings(
            config,
            use_te=resolve_transformer_impl(config) == "transformer_engine",
            capability=backend.capability(),
        ),
    )


def _has_varying_lengths(config: RunConfig) -> bool:
    data = config.data
    pipelined = config.parallel.pipeline_model_parallel_size > 1
    return pipelined and data.packing != "none" and not data.pad_to_seq_length


def _check_language(config: RunConfig) -> None:
    """Refuse what megatron-core accepts and then fails at later with an obscure error (seen with 0.16.1)."""
    lm, train, tp = config.language, config.train, config.parallel.tensor_model_parallel_size
    local = resolve_transformer_impl(config) == "local"
    dtr_kernel.check(config.moe.dtr_kernel)  # here, so that the first stage fails and not a later one
    groups = lm.query_groups
    if local and groups % tp:
        raise ConfigError(
            f"num_query_groups {groups} is not a multiple of tensor_model_parallel_size {tp}, as attention "
            "without Transformer Engine needs"
        )
    recomputed = set(train.recompute_modules) if train.recompute_granularity == "selective" else set()
    if local and recomputed & {"layernorm", "moe_act"}:
        raise ConfigError(
            "recompute_modules layernorm and moe_act need Transformer Engine, and this run uses the local "
            "layers; take them out"
        )
    if lm.parallel_residual and "layernorm" in recomputed:
        raise ConfigError(
            "recompute_modules names layernorm, but with parallel_residual one norm feeds both attention and "
            "FFN and is kept; take layernorm out"
        )
    if lm.parallel_residual and "mlp" in recomputed and config.gpu.fp8_format:
        # It would be recomputed outside of the context that FP8's second forward needs; megatron-core has
        # `te_checkpoint` for this in its own layer.
        raise ConfigError(
            "recompute_modules names mlp, which a parallel_residual layer cannot recompute in FP8; take mlp "
            "out, or set recompute_granularity to full"
        )
    if lm.add_bias_linear and not lm.parallel_residual and "mlp" in recomputed:
        # In megatron-core's layer the bias leaves the checkpointed function, and the backward recurses until
        # memory is exhausted.
        raise ConfigError(
            "recompute_modules names mlp, which megatron-core cannot recompute with add_bias_linear; take "
            "mlp out, or set recompute_granularity to full"
        )


def vision_transformer_config(config: RunConfig) -> TransformerConfig:
    """The vision tower's configuration: TP alone divides it, and nothing in it is recomputed."""
    vision = config.vision
    return _build(
        config,
        num_layers=vision.num_layers_used,
        init_method_std=vision.init_method_std,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.norm_epsilon,
        activation_func=quick_gelu if vision.model_type == "clip" else gelu_tanh,
        gated_linear_unit=False,
        add_bias_linear=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=backend.on_gpu(),
    )


def projector_transformer_config(config: RunConfig) -> TransformerConfig:
    """The projector's configuration, LLaVA's mlp2x_gelu: linear, exact GELU, linear, with biases.

    Weights start with the spread of ``torch.nn.Linear``'s initialisation, as in LLaVA, and not with 0.02.
    """
    lm, vision = config.language, config.vision
    return _build(
        config,
        num_layers=1,
        hidden_size=lm.hidden_size,
        ffn_hidden_size=lm.hidden_size,
        num_attention_heads=lm.num_attention_heads,
        activation_func=F.gelu,
        gated_linear_unit=False,
        add_bias_linear=True,
        bias_activation_fusion=False,
        init_method=init_method_normal(1 / math.sqrt(3 * vision.hidden_size)),
        output_layer_init_method=init_method_normal(1 / math.sqrt(3 * lm.hidden_size)),
    )


def _build(config: RunConfig, **values: Any) -> TransformerConfig:
    """A `TransformerConfig` of what all parts share and of `values`, which override that."""
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    weightless = _shapes_only.get()
    shared = {
        "transformer_impl": resolve_transformer_impl(config),
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": config.train.bf16,
        "use_cpu_initialization": weightless or not backend.on_gpu(),
        "perform_initialization": not weightless,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": backend.on_gpu() and _have_fused_weight_gradient(),
        "calculate_per_token_loss": False,
        "deterministic_mode": config.train.deterministic_mode and backend.on_gpu(),
        # Each layer has a key of its own in checkpoints, because layers differ; it is the same in every
        # layout.
        "hetereogenous_dist_checkpoint": True,
    }
    try:
        return TransformerConfig(**{**shared, **values})
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"megatron-core refuses this configuration: {error}") from error


def _have_fused_weight_gradient() -> bool:
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None  # built with NVIDIA's apex


def _sequence_parallel(config: RunConfig) -> bool:
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ConfigError("sequence_parallel needs tensor_model_parallel_size > 1; leave it out or raise TP")
    return (
        parallel.tensor_model_parallel_size > 1
        if parallel.sequence_parallel is None
        else parallel.sequence_parallel
    )
