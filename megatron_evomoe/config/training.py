"""How it is trained: data, layout, optimizer, loop, kernels, checkpoints, logs.

`Fixed`, `Said` and `Free` say what a resume does where the value differs from the checkpoint's (config/resume.py). Paths are
`Said`, never `Fixed`: the same samples may lie elsewhere today; what a path leads to is compared by fingerprints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional

import pydantic

from megatron_evomoe.config.resume import Fixed, Free, Said


def _split(value: Any) -> Any:
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


Names = Annotated[list[str], pydantic.BeforeValidator(_split)]
"""A list, or one text with commas."""


@dataclass(kw_only=True)
class DataConfig:
    """Where samples come from and what they become."""

    train_data: Said[list[str]] = field(default_factory=list)
    """Shard sets: paths with brace ranges (``shards-{00000..00127}.tar``), globs, or folders of tars."""
    eval_data: Said[list[str]] = field(default_factory=list)
    """Held-out shard sets for `evaluate` and the end of a run."""
    tokenizer: Said[Optional[str]] = None
    """A sentencepiece ``.model`` file or a Hugging Face tokenizer directory."""
    conversation_template: Fixed[Literal["plain", "v1", "phi", "qwen", "stablelm"]] = "v1"
    """How turns become text (data/conversation.py)."""
    seq_length: Fixed[int] = 2048
    """Longest sequence in tokens, image tokens included."""
    pad_to_seq_length: Said[bool] = False
    """Pad every batch to `seq_length`; otherwise to the longest of the step (less work, shapes vary)."""
    long_samples: Fixed[Literal["skip", "truncate"]] = "skip"
    """A sample longer than `seq_length` is counted and skipped, or cut at the end (refused when it would cut the whole answer)."""
    image_aspect_ratio: Fixed[Literal["pad", "square"]] = "pad"
    """`pad` pads to a square with the mean colour, `square` resizes and crops as CLIP does (LLaVA's names)."""
    max_image_pixels: Fixed[int] = 50_000_000
    """Larger images are refused from their header, before decoding."""
    cache_vision_features: Said[bool] = False
    """Run a frozen vision tower over each training image once, keep its features as files, and train from those (docs/data.md)."""
    feature_cache_dir: Free[Optional[str]] = None
    """Where those files are; none means SAVE/vision_features."""
    num_workers: Free[int] = 2
    """Decoding processes per reading rank; 0 decodes in the training process."""
    prefetch_factor: Free[int] = 4
    """Batches each worker keeps ready."""
    max_bad_sample_rate: Free[float] = 0.01
    """Training stops when a larger share of the samples read (at least 100) was unusable."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Degrees; data parallelism is what is left of the world."""

    tensor_model_parallel_size: Said[int] = 1
    """TP."""
    pipeline_model_parallel_size: Said[int] = 1
    """PP."""
    num_layers_per_virtual_pipeline_stage: Said[Optional[int]] = None
    """Layers per chunk for the interleaved schedule; none is not interleaved."""
    context_parallel_size: Said[int] = 1
    """CP (needs Transformer Engine)."""
    expert_model_parallel_size: Said[int] = 1
    """EP."""
    expert_tensor_parallel_size: Said[int] = 1
    """TP inside the experts."""
    sequence_parallel: Said[Optional[bool]] = None
    """Split activations along the sequence between TP ranks; none means: when TP > 1."""
    use_distributed_optimizer: Said[bool] = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: Said[bool] = False
    """Reduce gradients while the backward runs."""
    overlap_param_gather: Said[bool] = False
    """Gather updated weights while the forward runs."""
    distributed_timeout_minutes: Free[float] = 10
    """A collective that takes longer is an error."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule; defaults are the paper's and MoE-LLaVA's."""

    lr: Said[float] = 2e-5
    """Peak learning rate."""
    min_lr: Said[float] = 0.0
    """Learning rate at the end."""
    lr_decay_style: Said[Literal["cosine", "linear", "constant", "inverse-square-root"]] = "cosine"
    """Shape of the decay."""
    lr_warmup_fraction: Said[float] = 0.03
    """Share of `train_iters` over which the rate rises from 0."""
    weight_decay: Said[float] = 0.0
    """Decoupled weight decay."""
    adam_beta1: Said[float] = 0.9
    """First moment's decay."""
    adam_beta2: Said[float] = 0.999
    """Second moment's decay."""
    adam_eps: Said[float] = 1e-8
    """Adam's epsilon."""
    clip_grad: Said[float] = 1.0
    """Largest global gradient norm; 0 never clips."""
    override_opt_param_scheduler: Free[bool] = False
    """On a resume the schedule follows the configuration, whatever the checkpoint's was: the default, said on purpose."""
    use_checkpoint_opt_param_scheduler: Free[bool] = False
    """On a resume the checkpoint's schedule goes on, whatever the configuration says of it; refused where it would end early."""


@dataclass(kw_only=True)
class TrainConfig:
    """The loop."""

    train_iters: Said[int] = 100
    """Optimizer steps."""
    micro_batch_size: Said[int] = 1
    """Samples per forward and data-parallel rank."""
    global_batch_size: Fixed[int] = 1
    """Samples per optimizer step over all ranks."""
    seed: Fixed[int] = 1234
    """Seeds weights, sample order and evolution's draws."""
    bf16: Said[bool] = False
    """Train in bfloat16 with fp32 master weights."""
    transformer_impl: Said[Literal["auto", "local", "transformer_engine"]] = "auto"
    """Layer implementation; `auto` takes Transformer Engine where it imports and a GPU is there."""
    recompute_granularity: Said[Optional[Literal["full", "selective"]]] = None
    """Activation recompute: none, whole layers, or the modules in `recompute_modules`."""
    recompute_modules: Said[list[str]] = field(default_factory=lambda: ["core_attn"])
    """For `selective`: any of core_attn, moe, mlp, layernorm, moe_act."""
    recompute_num_layers: Said[int] = 1
    """For `full`: layers per recomputed block."""
    eval_samples: Said[int] = 0
    """Held-out questions asked when a stage ends; 0 asks everything in `eval_data`."""
    eval_batch_size: Free[int] = 64
    """Questions decoded together on each replica."""
    eval_shuffles: Said[int] = 0
    """Times a routed stage is measured again with shuffled routing (the paper's test for alike experts)."""
    deterministic_mode: Said[bool] = False
    """Only deterministic kernels (CUDA; the CPU path always is)."""
    trainable: Fixed[list[str]] = field(default_factory=list)
    """Parts to train; empty takes the stage kind's (train/stages.py)."""
    exit_signal_handler: Free[bool] = True
    """On SIGTERM or SIGUSR1 in any rank: finish the step, save, exit with status 0."""
    exit_duration_in_mins: Free[Optional[float]] = None
    """Save and exit with status 0 once the run is this old, in minutes; none never."""
    exit_interval: Free[Optional[int]] = None
    """Save and exit with status 0 after a step that is a multiple of this; none never."""
    profile: Free[bool] = False
    """Write a trace and a table of what some steps take to SAVE/profile/ (docs/gpu.md)."""
    profile_step_start: Free[int] = 10
    """First step of each stage that is profiled."""
    profile_step_end: Free[int] = 12
    """First step that is not profiled any more."""
    profile_ranks: Free[list[int]] = field(default_factory=lambda: [0])
    """Ranks that are profiled."""


@dataclass(kw_only=True)
class GpuConfig:
    """FP8 and fused kernels: Transformer Engine on a GPU only (docs/gpu.md)."""

    fp8_format: Said[Optional[Literal["e4m3", "hybrid"]]] = None
    """Linear layers of the decoder in FP8: `hybrid` has e4m3 forward and e5m2 gradients, `e4m3` both; none is bf16."""
    fp8_recipe: Said[Literal["delayed", "tensorwise", "blockwise", "mxfp8"]] = "delayed"
    """How FP8 numbers are scaled: by earlier steps' largest, by the tensor's own, or by blocks (`mxfp8`: Blackwell)."""
    fp8_margin: Said[int] = 0
    """For `delayed`: powers of two left above the largest number seen."""
    fp8_amax_history_len: Said[int] = 1
    """For `delayed`: steps whose largest numbers are remembered."""
    fp8_amax_compute_algo: Said[Literal["most_recent", "max"]] = "most_recent"
    """For `delayed`: which of the remembered counts."""
    first_last_layers_bf16: Said[bool] = False
    """Leave the first and the last layers in bf16 (not with `delayed`)."""
    num_layers_at_start_in_bf16: Said[int] = 1
    """How many of the first, with `first_last_layers_bf16`."""
    num_layers_at_end_in_bf16: Said[int] = 1
    """How many of the last, with `first_last_layers_bf16`."""
    moe_router_padding_for_fp8: Said[bool] = False
    """Send experts some more tokens, of weight 0, up to what FP8 needs, in place of padding each expert's input."""
    apply_rope_fusion: Said[Optional[bool]] = None
    """RoPE in one kernel; none means: with Transformer Engine."""
    moe_permute_fusion: Said[Optional[bool]] = None
    """Tokens sorted by expert in one kernel; none means: with Transformer Engine."""
    cross_entropy_loss_fusion: Said[Optional[bool]] = None
    """Cross-entropy in fused kernels, its gradient in bf16; none means: with Transformer Engine and bf16."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Where a run leaves its state."""

    save: Free[Optional[str]] = None
    """Output directory; each stage gets a folder of its name in it. None saves nothing."""
    save_interval: Free[int] = 0
    """Steps between checkpoints; 0 saves only when a stage ends."""
    keep: Free[int] = 2
    """Checkpoints kept per stage, newest first; 0 keeps all."""
    keep_every: Free[int] = 0
    """Steps whose multiples are kept besides, for good; 0 none."""
    pretrained_checkpoint: Said[Optional[str]] = None
    """Where the first stage takes its weights from; parts it lacks start fresh and are named."""
    load: Free[Optional[str]] = None
    """Where to look for what `save` has not: a run's directory (its stages' checkpoints are resumed), or weights for the
    first stage."""
    async_save: Free[bool] = False
    """Write checkpoints in the background; a checkpoint counts once all of it is on disk."""
    ckpt_step: Free[Optional[int]] = None
    """Resume from this step rather than the newest."""
    allow_changed: Free[Names] = field(default_factory=list)
    """Fields that may differ from the checkpoint's although they must equal, by their flags' names: ``seed,rotary_base``."""
    allow_changed_data: Free[bool] = False
    """Go on where the training samples are others than the checkpoint's; the log says which repeat and which are left out."""


@dataclass(kw_only=True)
class LogConfig:
    """What is reported, and where."""

    log_interval: Free[int] = 10
    """Steps between log lines."""
    tensorboard_dir: Free[Optional[str]] = None
    """TensorBoard event files; none writes none."""
    wandb_project: Free[Optional[str]] = None
    """Setting it turns wandb on (WANDB_MODE=offline works)."""
    wandb_entity: Free[Optional[str]] = None
    """wandb team or user."""
    wandb_exp_name: Free[Optional[str]] = None
    """wandb run name."""
    log_params_norm: Free[bool] = False
    """Log the L2 norm of all weights with every log line (a pass over them, and a reduction)."""
    moe_metrics_interval: Free[int] = 10
    """Steps between routing metrics (shares by modality, aux loss per layer)."""
