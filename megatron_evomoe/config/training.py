"""How it is trained: data, layout, optimizer, loop, kernels, checkpoints, logs.

`Fixed`, `Said` and `Free` say what a resume does where the value differs from the checkpoint's
(config/resume.py). Paths are `Said`, never `Fixed`: the same samples may lie elsewhere today; what a path
leads to is compared by fingerprints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional

from pydantic import BeforeValidator, Field

from megatron_evomoe.config.resume import Fixed, Free, Said
from megatron_evomoe.config.types import (
    Bool,
    Coefficient,
    Count,
    Decay,
    Epsilon,
    Few,
    Float,
    Int,
    Minutes,
    PositiveCount,
    Rate,
    Seed,
    Share,
    ShortText,
    Size,
    Text,
    WandbName,
)


def _split(value: Any) -> Any:
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


Names = Annotated[list[Text], BeforeValidator(_split)]
"""A list, or one text with commas."""
Part = Literal["vision", "projector", "language", "first_expert", "experts", "router"]
"""Parts of the model that a stage can train (config/recipe.py)."""
Recomputed = Literal["core_attn", "moe", "mlp", "layernorm", "moe_act"]


@dataclass(kw_only=True)
class DataConfig:
    """Where samples come from and what they become."""

    train_data: Said[list[Text]] = field(default_factory=list)
    """Shard sets: paths with brace ranges (``shards-{00000..00127}.tar``), globs, or folders of tars."""
    eval_data: Said[list[Text]] = field(default_factory=list)
    """Held-out shard sets for `evaluate` and the end of a run."""
    tokenizer: Said[Optional[Text]] = None
    """A sentencepiece ``.model`` file or a Hugging Face tokenizer directory."""
    conversation_template: Fixed[Literal["plain", "v1", "phi", "qwen", "stablelm"]] = "v1"
    """How turns become text (data/conversation.py)."""
    seq_length: Fixed[Size] = 2048
    """Longest sequence in tokens, image tokens included."""
    pad_to_seq_length: Said[Bool] = False
    """Pad every batch to `seq_length`; otherwise to the longest of the step (less work, shapes vary)."""
    long_samples: Fixed[Literal["skip", "truncate"]] = "skip"
    """A sample longer than `seq_length` is counted and skipped, or cut at the end (refused when it would cut
    the whole answer).
    """
    image_aspect_ratio: Fixed[Literal["pad", "square"]] = "pad"
    """`pad` pads to a square with the mean colour, `square` resizes and crops as CLIP does (LLaVA's
    names).
    """
    max_image_pixels: Fixed[PositiveCount] = 50_000_000
    """Larger images are refused from their header, before decoding."""
    cache_vision_features: Said[Bool] = False
    """Run a frozen vision tower over each training image once, keep its features as files, and train from
    those (docs/data.md).
    """
    feature_cache_dir: Free[Optional[Text]] = None
    """Where those files are; none means SAVE/vision_features."""
    num_workers: Free[Annotated[Int, Field(ge=0, le=512)]] = 2
    """Decoding processes per reading rank; 0 decodes in the training process."""
    prefetch_factor: Free[Annotated[Int, Field(ge=1, le=1024)]] = 4
    """Batches each worker keeps ready."""
    max_bad_sample_rate: Free[Share] = 0.01
    """Training stops when a larger share of the samples read (at least 100) was unusable; too long ones are
    not among them.
    """
    max_long_sample_rate: Free[Share] = 0.5
    """Training stops when a larger share of the samples read (at least 100) was left out for its length."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Degrees; data parallelism is what is left of the world."""

    tensor_model_parallel_size: Said[Few] = 1
    """TP."""
    pipeline_model_parallel_size: Said[Few] = 1
    """PP."""
    num_layers_per_virtual_pipeline_stage: Said[Optional[Few]] = None
    """Layers per chunk for the interleaved schedule; none is not interleaved."""
    context_parallel_size: Said[Few] = 1
    """CP; only 1 so far."""
    expert_model_parallel_size: Said[Few] = 1
    """EP."""
    expert_tensor_parallel_size: Said[Few] = 1
    """TP inside the experts."""
    sequence_parallel: Said[Optional[Bool]] = None
    """Split activations along the sequence between TP ranks; none means: when TP > 1."""
    use_distributed_optimizer: Said[Bool] = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: Said[Bool] = False
    """Reduce gradients while the backward runs."""
    overlap_param_gather: Said[Bool] = False
    """Gather updated weights while the forward runs."""
    distributed_timeout_minutes: Free[Minutes] = 10
    """A collective that takes longer is an error."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule; defaults are the paper's and MoE-LLaVA's."""

    lr: Said[Rate] = 2e-5
    """Peak learning rate."""
    min_lr: Said[Rate] = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Said[Literal["cosine", "linear", "constant", "inverse-square-root"]] = "cosine"
    """Shape of the decay."""
    lr_decay_iters: Said[Optional[PositiveCount]] = None
    """Step at which the rate would arrive at `min_lr`; none means `train_iters`. More ends the stage at a
    higher rate, fewer stays at `min_lr` from there (docs/stages.md).
    """
    lr_warmup_fraction: Said[Share] = 0.03
    """Share of those steps over which the rate rises from 0."""
    weight_decay: Said[Rate] = 0.0
    """Decoupled weight decay."""
    adam_beta1: Said[Decay] = 0.9
    """First moment's decay."""
    adam_beta2: Said[Decay] = 0.999
    """Second moment's decay."""
    adam_eps: Said[Epsilon] = 1e-8
    """Adam's epsilon."""
    clip_grad: Said[Coefficient] = 1.0
    """Largest global gradient norm; 0 never clips."""
    override_opt_param_scheduler: Free[Bool] = False
    """On a resume the schedule follows the configuration, whatever the checkpoint's was: the default, said on
    purpose.
    """
    use_checkpoint_opt_param_scheduler: Free[Bool] = False
    """On a resume the checkpoint's schedule goes on, whatever the configuration says of it; refused where it
    would end early.
    """


@dataclass(kw_only=True)
class TrainConfig:
    """The loop."""

    train_iters: Said[PositiveCount] = 100
    """Optimizer steps."""
    micro_batch_size: Said[PositiveCount] = 1
    """Samples per forward and data-parallel rank."""
    global_batch_size: Fixed[PositiveCount] = 1
    """Samples per optimizer step over all ranks."""
    seed: Fixed[Seed] = 1234
    """Seeds weights, sample order and evolution's draws."""
    bf16: Said[Bool] = False
    """Train in bfloat16 with fp32 master weights."""
    transformer_impl: Said[Literal["auto", "local", "transformer_engine"]] = "auto"
    """Layer implementation; `auto` takes Transformer Engine where it imports and a GPU is there."""
    recompute_granularity: Said[Optional[Literal["full", "selective"]]] = None
    """Activation recompute: none, whole layers, or the modules in `recompute_modules`."""
    recompute_modules: Said[list[Recomputed]] = field(default_factory=lambda: ["core_attn"])
    """For `selective`: any of core_attn, moe, mlp, layernorm, moe_act."""
    recompute_num_layers: Said[Few] = 1
    """For `full`: layers per recomputed block."""
    eval_samples: Said[Count] = 0
    """Held-out questions asked when a stage ends; 0 asks everything in `eval_data`."""
    eval_batch_size: Free[PositiveCount] = 64
    """Questions decoded together on each replica."""
    eval_shuffles: Said[Count] = 0
    """Times a routed stage is measured again with shuffled routing (the paper's test for alike experts)."""
    deterministic_mode: Said[Bool] = False
    """Only deterministic kernels (CUDA; the CPU path always is)."""
    trainable: Fixed[list[Part]] = field(default_factory=list)
    """Parts to train; empty takes the stage kind's (config/recipe.py)."""
    exit_signal_handler: Free[Bool] = True
    """On SIGTERM or SIGUSR1 in any rank: finish the step, save, exit with status 0."""
    exit_duration_in_mins: Free[Optional[Annotated[Float, Field(gt=0)]]] = None
    """Save and exit with status 0 once the run is this old, in minutes; none never."""
    exit_interval: Free[Optional[PositiveCount]] = None
    """Save and exit with status 0 after a step that is a multiple of this; none never."""
    profile: Free[Bool] = False
    """Write a trace and a table of what some steps take to SAVE/profile/ (docs/gpu.md)."""
    profile_step_start: Free[PositiveCount] = 10
    """First step of each stage that is profiled."""
    profile_step_end: Free[PositiveCount] = 12
    """First step that is not profiled any more."""
    profile_ranks: Free[list[Count]] = field(default_factory=lambda: [0])
    """Ranks that are profiled."""


@dataclass(kw_only=True)
class GpuConfig:
    """FP8 and fused kernels: Transformer Engine on a GPU only (docs/gpu.md)."""

    fp8_format: Said[Optional[Literal["e4m3", "hybrid"]]] = None
    """Linear layers of the decoder in FP8: `hybrid` has e4m3 forward and e5m2 gradients, `e4m3` both; none is
    bf16.
    """
    fp8_recipe: Said[Literal["delayed", "tensorwise", "blockwise", "mxfp8"]] = "delayed"
    """How FP8 numbers are scaled: by earlier steps' largest, by the tensor's own, or by blocks (`mxfp8`:
    Blackwell).
    """
    fp8_margin: Said[Annotated[Int, Field(ge=0, le=64)]] = 0
    """For `delayed`: powers of two left above the largest number seen."""
    fp8_amax_history_len: Said[Annotated[Int, Field(ge=1, le=65536)]] = 1
    """For `delayed`: steps whose largest numbers are remembered."""
    fp8_amax_compute_algo: Said[Literal["most_recent", "max"]] = "most_recent"
    """For `delayed`: which of the remembered counts."""
    first_last_layers_bf16: Said[Bool] = False
    """Leave the first and the last layers in bf16 (not with `delayed`)."""
    num_layers_at_start_in_bf16: Said[Count] = 1
    """How many of the first, with `first_last_layers_bf16`."""
    num_layers_at_end_in_bf16: Said[Count] = 1
    """How many of the last, with `first_last_layers_bf16`."""
    moe_router_padding_for_fp8: Said[Bool] = False
    """Send experts some more tokens, of weight 0, up to what FP8 needs, in place of padding each expert's
    input.
    """
    apply_rope_fusion: Said[Optional[Bool]] = None
    """RoPE in one kernel; none means: with Transformer Engine."""
    moe_permute_fusion: Said[Optional[Bool]] = None
    """Tokens sorted by expert in one kernel; none means: with Transformer Engine."""
    cross_entropy_loss_fusion: Said[Optional[Bool]] = None
    """Cross-entropy in fused kernels, its gradient in bf16; none means: with Transformer Engine and bf16."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Where a run leaves its state."""

    save: Free[Optional[Text]] = None
    """Output directory; each stage gets a folder of its name in it. None saves nothing."""
    save_interval: Free[Count] = 0
    """Steps between checkpoints; 0 saves only when a stage ends."""
    keep: Free[Count] = 2
    """Checkpoints kept per stage, newest first; 0 keeps all."""
    keep_every: Free[Count] = 0
    """Steps whose multiples are kept besides, for good; 0 none."""
    pretrained_checkpoint: Said[Optional[Text]] = None
    """Where the first stage takes its weights from; parts it lacks start fresh and are named."""
    load: Free[Optional[Text]] = None
    """Where to look for what `save` has not: a run's directory (its stages' checkpoints are resumed), or
    weights for the first stage.
    """
    async_save: Free[Bool] = False
    """Write checkpoints in the background; a checkpoint counts once all of it is on disk."""
    ckpt_step: Free[Optional[Count]] = None
    """Resume from this step rather than the newest."""
    allow_changed: Free[Names] = field(default_factory=list)
    """Fields that may differ from the checkpoint's although they must equal, by their flags' names:
    ``seed,rotary_base``.
    """
    allow_changed_data: Free[Bool] = False
    """Go on where the training samples are others than the checkpoint's; the log says which repeat and which
    are left out.
    """


@dataclass(kw_only=True)
class LogConfig:
    """What is reported, and where."""

    log_interval: Free[PositiveCount] = 10
    """Steps between log lines."""
    tensorboard_dir: Free[Optional[Text]] = None
    """TensorBoard event files; none writes none."""
    wandb_project: Free[Optional[WandbName]] = None
    """Setting it turns wandb on (WANDB_MODE=offline works)."""
    wandb_entity: Free[Optional[WandbName]] = None
    """wandb team or user."""
    wandb_exp_name: Free[Optional[ShortText]] = None
    """wandb run name."""
    log_params_norm: Free[Bool] = False
    """Log the L2 norm of all weights with every log line (a pass over them, and a reduction)."""
    moe_metrics_interval: Free[PositiveCount] = 10
    """Steps between routing metrics (shares by modality, aux loss per layer)."""
