"""How it is trained: data, layout, optimizer, loop, kernels, checkpoints, logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional


@dataclass(kw_only=True)
class DataConfig:
    """Where samples come from and what they become."""

    train_data: list[str] = field(default_factory=list)
    """Shard sets: paths with brace ranges (``shards-{00000..00127}.tar``), globs, or folders of tars."""
    eval_data: list[str] = field(default_factory=list)
    """Held-out shard sets for `evaluate` and the end of a run."""
    tokenizer: Optional[str] = None
    """A sentencepiece ``.model`` file or a Hugging Face tokenizer directory."""
    conversation_template: Literal["plain", "v1", "phi", "qwen", "stablelm"] = "v1"
    """How turns become text (data/conversation.py)."""
    seq_length: int = 2048
    """Longest sequence in tokens, image tokens included."""
    pad_to_seq_length: bool = False
    """Pad every batch to `seq_length`; otherwise to the longest of the step (less work, shapes vary)."""
    long_samples: Literal["skip", "truncate"] = "skip"
    """A sample longer than `seq_length` is counted and skipped, or cut at the end (refused when it would cut the whole answer)."""
    image_aspect_ratio: Literal["pad", "square"] = "pad"
    """`pad` pads to a square with the mean colour, `square` resizes and crops as CLIP does (LLaVA's names)."""
    max_image_pixels: int = 50_000_000
    """Larger images are refused from their header, before decoding."""
    cache_vision_features: bool = False
    """Run a frozen vision tower over each training image once, keep its features as files, and train from those (docs/data.md)."""
    feature_cache_dir: Optional[str] = None
    """Where those files are; none means SAVE/vision_features."""
    num_workers: int = 2
    """Decoding processes per reading rank; 0 decodes in the training process."""
    prefetch_factor: int = 4
    """Batches each worker keeps ready."""
    max_bad_sample_rate: float = 0.01
    """Training stops when a larger share of the samples read (at least 100) was unusable."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Degrees; data parallelism is what is left of the world."""

    tensor_model_parallel_size: int = 1
    """TP."""
    pipeline_model_parallel_size: int = 1
    """PP."""
    num_layers_per_virtual_pipeline_stage: Optional[int] = None
    """Layers per chunk for the interleaved schedule; none is not interleaved."""
    context_parallel_size: int = 1
    """CP (needs Transformer Engine)."""
    expert_model_parallel_size: int = 1
    """EP."""
    expert_tensor_parallel_size: int = 1
    """TP inside the experts."""
    sequence_parallel: Optional[bool] = None
    """Split activations along the sequence between TP ranks; none means: when TP > 1."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the forward runs."""
    distributed_timeout_minutes: float = 10
    """A collective that takes longer is an error."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule; defaults are the paper's and MoE-LLaVA's."""

    lr: float = 2e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root"] = "cosine"
    """Shape of the decay."""
    lr_warmup_fraction: float = 0.03
    """Share of `train_iters` over which the rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """First moment's decay."""
    adam_beta2: float = 0.999
    """Second moment's decay."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 never clips."""


@dataclass(kw_only=True)
class TrainConfig:
    """The loop."""

    train_iters: int = 100
    """Optimizer steps."""
    micro_batch_size: int = 1
    """Samples per forward and data-parallel rank."""
    global_batch_size: int = 1
    """Samples per optimizer step over all ranks."""
    seed: int = 1234
    """Seeds weights, sample order and evolution's draws."""
    bf16: bool = False
    """Train in bfloat16 with fp32 master weights."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; `auto` takes Transformer Engine where it imports and a GPU is there."""
    recompute_granularity: Optional[Literal["full", "selective"]] = None
    """Activation recompute: none, whole layers, or the modules in `recompute_modules`."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """For `selective`: any of core_attn, moe, mlp, layernorm, moe_act."""
    recompute_num_layers: int = 1
    """For `full`: layers per recomputed block."""
    eval_samples: int = 0
    """Held-out questions asked when a stage ends; 0 asks everything in `eval_data`."""
    eval_batch_size: int = 64
    """Questions decoded together on each replica."""
    eval_shuffles: int = 0
    """Times a routed stage is measured again with shuffled routing (the paper's test for alike experts)."""
    deterministic_mode: bool = False
    """Only deterministic kernels (CUDA; the CPU path always is)."""
    trainable: list[str] = field(default_factory=list)
    """Parts to train; empty takes the stage kind's (train/stages.py)."""
    exit_signal_handler: bool = True
    """On SIGTERM or SIGUSR1 in any rank: finish the step, save, exit with status 0."""
    exit_duration_in_mins: Optional[float] = None
    """Save and exit with status 0 once the run is this old, in minutes; none never."""
    exit_interval: Optional[int] = None
    """Save and exit with status 0 after a step that is a multiple of this; none never."""
    profile: bool = False
    """Write a trace and a table of what some steps take to SAVE/profile/ (docs/gpu.md)."""
    profile_step_start: int = 10
    """First step of each stage that is profiled."""
    profile_step_end: int = 12
    """First step that is not profiled any more."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are profiled."""


@dataclass(kw_only=True)
class GpuConfig:
    """FP8 and fused kernels: Transformer Engine on a GPU only (docs/gpu.md)."""

    fp8_format: Optional[Literal["e4m3", "hybrid"]] = None
    """Linear layers of the decoder in FP8: `hybrid` has e4m3 forward and e5m2 gradients, `e4m3` both; none is bf16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """How FP8 numbers are scaled: by earlier steps' largest, by the tensor's own, or by blocks (`mxfp8`: Blackwell)."""
    fp8_margin: int = 0
    """For `delayed`: powers of two left above the largest number seen."""
    fp8_amax_history_len: int = 1
    """For `delayed`: steps whose largest numbers are remembered."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """For `delayed`: which of the remembered counts."""
    first_last_layers_bf16: bool = False
    """Leave the first and the last layers in bf16 (not with `delayed`)."""
    num_layers_at_start_in_bf16: int = 1
    """How many of the first, with `first_last_layers_bf16`."""
    num_layers_at_end_in_bf16: int = 1
    """How many of the last, with `first_last_layers_bf16`."""
    moe_router_padding_for_fp8: bool = False
    """Send experts some more tokens, of weight 0, up to what FP8 needs, in place of padding each expert's input."""
    apply_rope_fusion: Optional[bool] = None
    """RoPE in one kernel; none means: with Transformer Engine."""
    moe_permute_fusion: Optional[bool] = None
    """Tokens sorted by expert in one kernel; none means: with Transformer Engine."""
    cross_entropy_loss_fusion: Optional[bool] = None
    """Cross-entropy in fused kernels, its gradient in bf16; none means: with Transformer Engine and bf16."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Where a run leaves its state."""

    save: Optional[str] = None
    """Output directory; each stage gets a folder of its name in it. None saves nothing."""
    save_interval: int = 0
    """Steps between checkpoints; 0 saves only when a stage ends."""
    keep: int = 2
    """Checkpoints kept per stage, newest first; 0 keeps all."""
    keep_every: int = 0
    """Steps whose multiples are kept besides, for good; 0 none."""
    pretrained_checkpoint: Optional[str] = None
    """Where the first stage takes its weights from; parts it lacks start fresh and are named."""
    load: Optional[str] = None
    """Where to look for what `save` has not: a run's directory (its stages' checkpoints are resumed), or weights for the
    first stage."""
    async_save: bool = False
    """Write checkpoints in the background; a checkpoint counts once all of it is on disk."""
    ckpt_step: Optional[int] = None
    """Resume from this step rather than the newest."""


@dataclass(kw_only=True)
class LogConfig:
    """What is reported, and where."""

    log_interval: int = 10
    """Steps between log lines."""
    tensorboard_dir: Optional[str] = None
    """TensorBoard event files; none writes none."""
    wandb_project: Optional[str] = None
    """Setting it turns wandb on (WANDB_MODE=offline works)."""
    wandb_entity: Optional[str] = None
    """wandb team or user."""
    wandb_exp_name: Optional[str] = None
    """wandb run name."""
    log_params_norm: bool = False
    """Log the L2 norm of all weights with every log line (a pass over them, and a reduction)."""
    moe_metrics_interval: int = 10
    """Steps between routing metrics (shares by modality, aux loss per layer)."""
