"""Cross-field validation: rules that relate fields to each other.

What a single field may hold is its type (config/types.py). Each function here takes the sections whose fields
it relates and raises `ConfigError` for the first rule that does not hold; `RunConfig.check` calls them all.
"""

from __future__ import annotations

from megatron_evomoe.config.errors import ConfigError
from megatron_evomoe.config.kinds import MIXTURE_KINDS, StageKind
from megatron_evomoe.config.model import LanguageConfig, MoEConfig, VisionConfig
from megatron_evomoe.config.training import (
    DataConfig,
    GpuConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)

_FP8_MULTIPLE = 16  # Transformer Engine's FP8 matrix products take sizes that are multiples of this


def _rule(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def check_language(language: LanguageConfig, data: DataConfig) -> None:
    """Heads, RoPE, sequence length and the output layer fit each other."""
    heads, groups = language.num_attention_heads, language.query_groups
    _rule(
        language.kv_channels is not None or language.hidden_size % heads == 0,
        f"hidden_size {language.hidden_size} is not a multiple of num_attention_heads {heads}; change one, "
        "or set kv_channels",
    )
    _rule(
        heads % groups == 0,
        f"num_attention_heads {heads} is not a multiple of num_query_groups {groups}; change one of them",
    )
    size, percent = language.head_size, language.rotary_percent
    rotated = int(size * percent) if percent < 1 else size  # megatron-core rounds down
    _rule(
        rotated > 0 and rotated % 2 == 0,
        f"RoPE would turn {rotated} of the {size} channels of a head, and it turns pairs of channels; change "
        "hidden_size, num_attention_heads, kv_channels or rotary_percent so that the number is even and at "
        "least 2",
    )
    _rule(
        data.seq_length <= language.max_position_embeddings,
        f"seq_length {data.seq_length} exceeds max_position_embeddings {language.max_position_embeddings}; "
        "lower the first, or raise the second",
    )
    _rule(
        not (language.tie_word_embeddings and language.lm_head_bias),
        "lm_head_bias needs untied embeddings; set tie_word_embeddings to false, or leave lm_head_bias out",
    )


def check_vision(vision: VisionConfig, data: DataConfig) -> None:
    """Patches, heads and the chosen layer exist, and an image fits the sequence."""
    _rule(
        vision.image_size % vision.patch_size == 0,
        f"vision image_size {vision.image_size} is not a multiple of patch_size {vision.patch_size}; change "
        "one of them",
    )
    _rule(
        vision.hidden_size % vision.num_attention_heads == 0,
        f"vision hidden_size {vision.hidden_size} is not a multiple of its num_attention_heads "
        f"{vision.num_attention_heads}; change one of them",
    )
    _rule(
        1 <= vision.num_layers_used <= vision.num_layers,
        f"vision feature_layer {vision.feature_layer} is not a layer of a tower of {vision.num_layers}; use "
        f"1 to {vision.num_layers}, or {-vision.num_layers} to -1 counted from the last",
    )
    _rule(
        vision.tokens_per_image < data.seq_length,
        f"one image takes {vision.tokens_per_image} tokens and does not fit seq_length {data.seq_length}; "
        "raise seq_length",
    )


def check_experts(moe: MoEConfig, num_layers: int) -> None:
    """The MoE layers exist, and the router's options fit the router."""
    if isinstance(moe.moe_layer_freq, list):
        _rule(
            len(moe.moe_layer_freq) == num_layers,
            f"moe_layer_freq lists {len(moe.moe_layer_freq)} layers, the model has {num_layers}; list one "
            "0 or 1 per layer",
        )
    else:
        _rule(
            moe.moe_layer_freq <= num_layers,
            f"moe_layer_freq {moe.moe_layer_freq} leaves no MoE layer among {num_layers}; use 1 to "
            f"{num_layers}",
        )
    _rule(
        moe.moe_router_topk <= moe.num_experts,
        f"moe_router_topk {moe.moe_router_topk} must lie between 1 and num_experts {moe.num_experts}",
    )
    _rule(
        moe.dtr_kernel != "triton" or moe.router == "dtr",
        f"dtr_kernel triton computes the router dtr, and this router is {moe.router}; leave dtr_kernel out",
    )
    for low, high in moe.evolution_beta or []:
        _rule(low <= high, f"evolution_beta range [{low}, {high}] must satisfy 0 <= low <= high <= 1")


def check_mixture(moe: MoEConfig, num_layers: int, kind: StageKind) -> None:
    """A stage kind that trains experts or a router has a layer to train them in."""
    _rule(
        kind not in MIXTURE_KINDS or any(moe.layer_pattern(num_layers)),
        f"moe_layer_freq lists no MoE layer, and a stage of kind {kind} needs at least one; put a 1 into the "
        "list",
    )


def check_training(
    train: TrainConfig, optimizer: OptimizerConfig, parallel: ParallelConfig, gpu: GpuConfig, num_layers: int
) -> None:
    """Schedule, profiler, recompute and precision do not contradict each other."""
    _rule(
        optimizer.min_lr <= optimizer.lr,
        f"min_lr {optimizer.min_lr} is above lr {optimizer.lr}; lower min_lr, or raise lr",
    )
    _rule(
        not train.profile or train.profile_step_start < train.profile_step_end,
        f"profile_step_start {train.profile_step_start} must be below profile_step_end "
        f"{train.profile_step_end}",
    )
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    consecutive = chunk or num_layers // parallel.pipeline_model_parallel_size
    _rule(
        train.recompute_granularity != "full" or consecutive % train.recompute_num_layers == 0,
        f"recompute_num_layers {train.recompute_num_layers} does not divide the {consecutive} layers that "
        "follow each other on a rank; use a divisor",
    )
    _rule(
        train.bf16 or not gpu.cross_entropy_loss_fusion,
        "cross_entropy_loss_fusion rounds the gradient to bf16, and this run is fp32; set bf16, or leave it "
        "out",
    )
    _rule(
        not (optimizer.override_opt_param_scheduler and optimizer.use_checkpoint_opt_param_scheduler),
        "override_opt_param_scheduler and use_checkpoint_opt_param_scheduler contradict each other; set one "
        "of them",
    )


def check_fp8(
    gpu: GpuConfig, train: TrainConfig, moe: MoEConfig, parallel: ParallelConfig, language: LanguageConfig
) -> None:
    """What FP8 needs: bf16, sizes of which it can make blocks, and options that its recipe can do."""
    if gpu.fp8_format is None:
        _rule(
            not gpu.moe_router_padding_for_fp8,
            "moe_router_padding_for_fp8 pads for FP8, and this run has no FP8; set fp8_format, or leave it "
            "out",
        )
        return
    _rule(
        train.bf16,
        f"fp8_format {gpu.fp8_format} keeps everything but linear layers in bf16; set train.bf16 too",
    )
    _rule(
        not (gpu.moe_router_padding_for_fp8 and moe.moe_token_dispatcher_type == "allgather"),
        "moe_router_padding_for_fp8 has no effect with moe_token_dispatcher_type allgather; use alltoall or "
        "flex",
    )
    recomputed = set(train.recompute_modules) if train.recompute_granularity == "selective" else set()
    refused = sorted(recomputed & {"moe_act", "layernorm"})
    _rule(
        gpu.fp8_recipe != "delayed" or not refused,
        f"megatron-core cannot recompute {', '.join(refused)} with fp8_recipe delayed; take them out of "
        "recompute_modules, or use tensorwise or blockwise",
    )
    if gpu.first_last_layers_bf16:
        _check_bf16_ends(gpu, language.num_layers)
    _check_fp8_widths(language, parallel)


def _check_bf16_ends(gpu: GpuConfig, num_layers: int) -> None:
    start, end = gpu.num_layers_at_start_in_bf16, gpu.num_layers_at_end_in_bf16
    _rule(
        gpu.fp8_recipe != "delayed",
        "first_last_layers_bf16 does not work with fp8_recipe delayed; use tensorwise",
    )
    _rule(
        start + end < num_layers,
        f"{start} first and {end} last layers in bf16 leave none of {num_layers} in FP8; lower "
        "num_layers_at_start_in_bf16 or num_layers_at_end_in_bf16",
    )


def _check_fp8_widths(language: LanguageConfig, parallel: ParallelConfig) -> None:
    tp, expert_tp = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    for name, width in {
        "hidden_size": language.hidden_size,
        "ffn_hidden_size / tensor_model_parallel_size": language.ffn_hidden_size / tp,
        "ffn_hidden_size / expert_tensor_parallel_size": language.ffn_hidden_size / expert_tp,
        "attention heads' width / tensor_model_parallel_size": (
            language.num_attention_heads * language.head_size / tp
        ),
    }.items():
        _rule(
            width % _FP8_MULTIPLE == 0,
            f"{name} is {width:g}, and FP8 needs multiples of {_FP8_MULTIPLE}; leave fp8_format out, or "
            "change the size",
        )
