"""What one field alone cannot know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_evomoe.config.errors import ConfigError

if TYPE_CHECKING:
    from megatron_evomoe.config.run import RunConfig


Rule = Callable[[bool, str], None]


def check(config: RunConfig, kind: str | None = None) -> None:
    """Check `config`, and what a stage of `kind` needs of it. Raises `ConfigError`."""

    def rule(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    for part in (_check_language, _check_vision, _check_experts, _check_loop, _check_fp8):
        part(config, rule)
    rule(
        kind not in ("evolve", "route") or any(config.moe.layer_pattern(config.language.num_layers)),
        f"moe_layer_freq lists no MoE layer, and a stage of kind {kind} needs one; put a 1 where one is to "
        "be",
    )


def _check_language(config: RunConfig, rule: Rule) -> None:
    lm, length = config.language, config.data.seq_length
    heads, groups = lm.num_attention_heads, lm.query_groups
    rule(
        lm.kv_channels is not None or lm.hidden_size % heads == 0,
        f"hidden_size {lm.hidden_size} is not a multiple of num_attention_heads {heads}; change one, or give "
        "kv_channels",
    )
    rule(
        heads % groups == 0,
        f"num_attention_heads {heads} is not a multiple of num_query_groups {groups}; change one",
    )
    head = lm.head_size
    rotated = int(head * lm.rotary_percent) if lm.rotary_percent < 1 else head  # as the core rounds it
    rule(
        rotated > 0 and rotated % 2 == 0,
        f"RoPE would turn {rotated} of the {head} channels of a head (hidden_size, "
        "num_attention_heads, kv_channels, rotary_percent), and it turns pairs; make that even and at least "
        "2",
    )
    rule(
        length <= lm.max_position_embeddings,
        f"seq_length {length} exceeds max_position_embeddings {lm.max_position_embeddings}",
    )
    rule(not (lm.tie_word_embeddings and lm.lm_head_bias), "lm_head_bias needs untied embeddings")


def _check_vision(config: RunConfig, rule: Rule) -> None:
    vision = config.vision
    rule(
        vision.image_size % vision.patch_size == 0,
        f"vision image_size {vision.image_size} is not a multiple of patch_size {vision.patch_size}",
    )
    rule(
        vision.hidden_size % vision.num_attention_heads == 0,
        f"vision hidden_size {vision.hidden_size} is not a multiple of its num_attention_heads "
        f"{vision.num_attention_heads}",
    )
    rule(
        1 <= vision.num_layers_used <= vision.num_layers,
        f"vision feature_layer {vision.feature_layer} needs a layer the tower's {vision.num_layers} do not "
        "have",
    )
    rule(
        vision.tokens_per_image < config.data.seq_length,
        f"one image takes {vision.tokens_per_image} tokens and does not fit seq_length "
        f"{config.data.seq_length}",
    )


def _check_experts(config: RunConfig, rule: Rule) -> None:
    moe, layers = config.moe, config.language.num_layers
    if isinstance(moe.moe_layer_freq, list):
        rule(
            len(moe.moe_layer_freq) == layers,
            f"moe_layer_freq lists {len(moe.moe_layer_freq)} layers, the model has {layers}",
        )
    else:
        rule(
            moe.moe_layer_freq <= layers,
            f"moe_layer_freq {moe.moe_layer_freq} leaves no MoE layer among {layers}; use 1 to {layers}",
        )
    rule(
        moe.moe_router_topk <= moe.num_experts,
        f"moe_router_topk {moe.moe_router_topk} must lie between 1 and num_experts {moe.num_experts}",
    )
    rule(
        moe.dtr_kernel != "triton" or moe.router == "dtr",
        f"dtr_kernel triton is for router dtr, and this router is {moe.router}; leave dtr_kernel out",
    )
    for low, high in moe.evolution_beta or []:
        rule(low <= high, f"evolution_beta range [{low}, {high}] must satisfy 0 <= low <= high <= 1")


def _check_loop(config: RunConfig, rule: Rule) -> None:
    train, optimizer, parallel = config.train, config.optimizer, config.parallel
    rule(
        optimizer.min_lr <= optimizer.lr,
        f"min_lr {optimizer.min_lr} is above lr {optimizer.lr}; lower it, or raise lr",
    )
    rule(
        not train.profile or train.profile_step_start < train.profile_step_end,
        f"profile_step_start {train.profile_step_start} must be below profile_step_end "
        f"{train.profile_step_end}",
    )
    together = (
        parallel.num_layers_per_virtual_pipeline_stage
        or config.language.num_layers // parallel.pipeline_model_parallel_size
    )
    rule(
        train.recompute_granularity != "full" or together % train.recompute_num_layers == 0,
        f"recompute_num_layers {train.recompute_num_layers} does not divide the {together} layers in a row; "
        "use a divisor",
    )
    rule(
        train.bf16 or not config.gpu.cross_entropy_loss_fusion,
        "cross_entropy_loss_fusion rounds the gradient to bf16, and this run is fp32; set bf16, or leave it "
        "out",
    )
    rule(
        not (
            config.optimizer.override_opt_param_scheduler
            and config.optimizer.use_checkpoint_opt_param_scheduler
        ),
        "override_opt_param_scheduler and use_checkpoint_opt_param_scheduler contradict each other; set one "
        "of them",
    )


def _check_fp8(config: RunConfig, rule: Rule) -> None:
    gpu, lm, parallel = config.gpu, config.language, config.parallel
    if gpu.fp8_format is None:
        rule(
            not gpu.moe_router_padding_for_fp8,
            "moe_router_padding_for_fp8 pads for FP8, and there is none; set fp8_format",
        )
        return
    rule(
        config.train.bf16,
        f"fp8_format {gpu.fp8_format} keeps everything but linear layers in bf16; set train.bf16 too",
    )
    rule(
        not (gpu.moe_router_padding_for_fp8 and config.moe.moe_token_dispatcher_type == "allgather"),
        "moe_router_padding_for_fp8 does nothing for moe_token_dispatcher_type allgather; use alltoall or "
        "flex",
    )
    train = config.train
    recomputed = (
        set(train.recompute_modules) & {"moe_act", "layernorm"}
        if train.recompute_granularity == "selective"
        else set()
    )
    rule(
        gpu.fp8_recipe != "delayed" or not recomputed,
        f"recompute_modules {', '.join(sorted(recomputed))} cannot be had with "
        "fp8_recipe delayed (a rule of megatron-core); leave them out, or use tensorwise or blockwise",
    )
    if gpu.first_last_layers_bf16:
        start, end = gpu.num_layers_at_start_in_bf16, gpu.num_layers_at_end_in_bf16
        rule(
            gpu.fp8_recipe != "delayed",
            "first_last_layers_bf16 cannot be had with fp8_recipe delayed; use tensorwise",
        )
        rule(
            start + end < lm.num_layers,
            f"{start} first and {end} last layers in bf16 leave none of {lm.num_layers} in FP8; lower "
            "num_layers_at_start_in_bf16 "
            "or num_layers_at_end_in_bf16",
        )
    heads = lm.num_attention_heads * lm.head_size
    tp, etp = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    for name, width in {
        "hidden_size": lm.hidden_size,
        "ffn_hidden_size / tensor_model_parallel_size": lm.ffn_hidden_size / tp,
        "ffn_hidden_size / expert_tensor_parallel_size": lm.ffn_hidden_size / etp,
        "attention heads' width / tensor_model_parallel_size": heads / tp,
    }.items():
        rule(
            width % 16 == 0,
            f"{name} is {width:g}, and FP8 needs multiples of 16; leave fp8_format out, or change the size",
        )
