"""How a model is trained: data, parallelism, optimizer, loop, kernels, checkpoints, logs.

`Fixed`, `Logged` and `Free` declare what a resume does where a value differs from that of the checkpoint
(config/resume.py). Paths are `Logged` and never `Fixed`, because the same samples may have moved to another
directory; the contents of a path are compared by their fingerprints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional

from pydantic import BeforeValidator, Field

from megatron_evomoe.config.resume import Fixed, Free, Logged
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
"""A list of names, or one text in which commas separate them."""
Part = Literal["vision", "projector", "language", "first_expert", "experts", "router"]
"""The parts of the model that a stage can train (config/recipe.py)."""
Recomputed = Literal["core_attn", "moe", "mlp", "layernorm", "moe_act"]


@dataclass(kw_only=True)
class DataConfig:
    """Where the samples come from, and what they are turned into."""

    train_data: Logged[list[Text]] = field(default_factory=list)
    """Shards to train on: paths, which may have brace ranges (``shards-{00000..00127}.tar``), glob patterns,
    or directories that hold ``.tar`` files.
    """
    continue_data: Fixed[Bool] = False
    """Go on in the data where the stage before ended, in the same order, so that no sample is met again
    before all have been. Otherwise each stage takes the samples from the first on, in an order of its own.
    """
    eval_data: Logged[list[Text]] = field(default_factory=list)
    """Held-out shards, given as `train_data` is. Their questions are asked when a stage ends."""
    tokenizer: Logged[Optional[Text]] = None
    """The tokenizer: a sentencepiece ``.model`` file or the directory of a Hugging Face tokenizer. Training
    needs one; a configuration without it can still be planned.
    """
    conversation_template: Fixed[Literal["plain", "v1", "phi", "qwen", "stablelm"]] = "v1"
    """The template that writes the turns of a conversation as one text (data/conversation.py)."""
    seq_length: Fixed[Size] = 2048
    """The longest sequence in tokens, counting the tokens of images."""
    pad_to_seq_length: Logged[Bool] = False
    """Pad every batch to `seq_length`. Otherwise each step is padded to its own longest sequence, which is
    less work, but gives tensors of varying shapes.
    """
    packing: Logged[Literal["none", "sort", "pack"]] = "none"
    """How the samples of a step become microbatches (docs/data.md). `none` takes them in their order and pads
    them to the longest of the step; `sort` puts samples of like length together; `pack` puts several samples
    into one row of at most `seq_length` positions, with attention within each sample alone.
    """
    packing_replicas: Logged[Optional[Few]] = None
    """For `pack`: the microbatches of a step are a multiple of this number. With a common multiple of all
    data-parallel sizes that a run may have, the same samples share a microbatch under all of them, and so do
    auxiliary losses and capacity. None means the data-parallel size.
    """
    long_samples: Fixed[Literal["skip", "truncate"]] = "skip"
    """What happens to a sample longer than `seq_length`: `skip` leaves it out and counts it; `truncate` cuts
    its end off, or leaves it out if no answer would remain.
    """
    image_aspect_ratio: Fixed[Literal["pad", "square"]] = "pad"
    """How an image becomes a square (LLaVA's names): `pad` pads the shorter side with the mean colour,
    `square` resizes the shorter side and crops the longer one, as CLIP does.
    """
    max_image_pixels: Fixed[PositiveCount] = 50_000_000
    """Images with more pixels than this are refused. The header of the file tells their size, so they are not
    decoded.
    """
    cache_vision_features: Logged[Bool] = False
    """Run a frozen vision tower over each training image once, keep the features in files, and train from
    these (docs/data.md).
    """
    feature_cache_dir: Free[Optional[Text]] = None
    """Directory of the features that `cache_vision_features` keeps. None means ``vision_features`` in the
    output directory `save`.
    """
    num_workers: Free[Annotated[Int, Field(ge=0, le=512)]] = 2
    """Processes that decode samples, on each rank that reads data. 0 decodes in the training process."""
    prefetch_factor: Free[Annotated[Int, Field(ge=1, le=1024)]] = 4
    """Batches that each worker process prepares ahead."""
    max_bad_sample_rate: Free[Share] = 0.01
    """The share of the samples read (of at least 100) that may be unusable; with more, training stops.
    Samples that are too long do not count.
    """
    max_long_sample_rate: Free[Share] = 0.5
    """The share of the samples read (of at least 100) that may be left out for their length; with more,
    training stops.
    """


@dataclass(kw_only=True)
class ParallelConfig:
    """Degrees of parallelism; the data-parallel size is the number of ranks divided by their product."""

    tensor_model_parallel_size: Logged[Few] = 1
    """TP: ranks that share the matrices of each layer."""
    pipeline_model_parallel_size: Logged[Few] = 1
    """PP: pipeline stages among which the layers are divided."""
    num_layers_per_virtual_pipeline_stage: Logged[Optional[Few]] = None
    """Layers in each chunk of the interleaved pipeline schedule. None means one chunk per pipeline stage,
    without interleaving.
    """
    context_parallel_size: Logged[Few] = 1
    """CP: ranks that share each sequence. Only 1 is supported so far."""
    expert_model_parallel_size: Logged[Few] = 1
    """EP: ranks among which the experts of a layer are divided."""
    expert_tensor_parallel_size: Logged[Few] = 1
    """TP inside the experts: ranks that share the matrices of each expert."""
    sequence_parallel: Logged[Optional[Bool]] = None
    """Divide activations along the sequence among the TP ranks. None means that it is on where TP is larger
    than 1.
    """
    use_distributed_optimizer: Logged[Bool] = True
    """Divide the state of the optimizer among the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: Logged[Bool] = False
    """Reduce gradients over the data-parallel ranks while the backward pass still runs."""
    overlap_param_gather: Logged[Bool] = False
    """Gather updated weights from the data-parallel ranks while the next forward pass runs."""
    distributed_timeout_minutes: Free[Minutes] = 10
    """Minutes after which a collective operation that has not finished is an error."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule; the defaults are those of the paper and of MoE-LLaVA."""

    lr: Logged[Rate] = 2e-5
    """The peak learning rate."""
    min_lr: Logged[Rate] = 0.0
    """The learning rate at the end of the decay."""
    lr_decay_style: Logged[Literal["cosine", "linear", "constant", "inverse-square-root"]] = "cosine"
    """The shape of the decay from `lr` to `min_lr`."""
    lr_decay_iters: Logged[Optional[PositiveCount]] = None
    """The optimizer step at which the learning rate reaches `min_lr`. None means `train_iters`. With a larger
    number the stage ends at a higher rate; with a smaller one the rate stays at `min_lr` from that step on
    (docs/stages.md).
    """
    lr_warmup_fraction: Logged[Share] = 0.03
    """The share of the decay's steps over which the learning rate first rises from 0 to `lr`."""
    weight_decay: Logged[Rate] = 0.0
    """The coefficient of decoupled weight decay."""
    adam_beta1: Logged[Decay] = 0.9
    """The decay rate of Adam's first moment."""
    adam_beta2: Logged[Decay] = 0.999
    """The decay rate of Adam's second moment."""
    adam_eps: Logged[Epsilon] = 1e-8
    """The number that Adam adds to the denominator of an update."""
    clip_grad: Logged[Coefficient] = 1.0
    """The largest norm of the gradient of the whole model; a larger gradient is scaled down to it. 0 turns
    clipping off.
    """
    override_opt_param_scheduler: Free[Bool] = False
    """On a resume, follow the schedule of the configuration and not that of the checkpoint. That is the
    default too; the flag states it explicitly, as in Megatron-LM.
    """
    use_checkpoint_opt_param_scheduler: Free[Bool] = False
    """On a resume, continue the schedule of the checkpoint whatever the configuration says. This is refused
    where that schedule ends before `train_iters`.
    """


@dataclass(kw_only=True)
class TrainConfig:
    """The training loop."""

    train_iters: Logged[PositiveCount] = 100
    """Optimizer steps of a stage."""
    micro_batch_size: Logged[PositiveCount] = 1
    """Samples in one forward pass on each data-parallel replica."""
    global_batch_size: Fixed[PositiveCount] = 1
    """Samples in one optimizer step over all replicas."""
    vision_batch_size: Logged[Optional[PositiveCount]] = None
    """Images that the vision tower computes at a time; it runs once a step, over the images of all
    microbatches. A trained tower keeps the activations of one such batch and computes those of the others
    again. None means 32, and 8 where the tower trains.
    """
    seed: Fixed[Seed] = 1234
    """The seed of new weights, of the order of samples and of the random numbers that evolution draws."""
    bf16: Logged[Bool] = False
    """Train in bfloat16, with master weights in float32. Otherwise everything is float32."""
    transformer_impl: Logged[Literal["auto", "local", "transformer_engine"]] = "auto"
    """The implementation of the layers. `auto` takes Transformer Engine where it can be imported and there is
    a GPU, and megatron-core's local layers elsewhere.
    """
    recompute_granularity: Logged[Optional[Literal["full", "selective"]]] = None
    """What the backward pass computes again to save memory: `full` whole layers, `selective` the modules of
    `recompute_modules`. None means nothing.
    """
    recompute_modules: Logged[list[Recomputed]] = field(default_factory=lambda: ["core_attn"])
    """The modules that `recompute_granularity` `selective` computes again."""
    recompute_num_layers: Logged[Few] = 1
    """The layers in each block that `recompute_granularity` `full` computes again."""
    eval_samples: Logged[Count] = 0
    """Held-out questions that are asked when a stage ends. 0 means all of `eval_data`."""
    eval_batch_size: Free[PositiveCount] = 64
    """Held-out questions that each replica decodes together."""
    eval_shuffles: Logged[Count] = 0
    """How often a routed stage is evaluated again with shuffled routing, which is the paper's test of whether
    the experts are interchangeable. 0 skips the test.
    """
    deterministic_mode: Logged[Bool] = False
    """Use only deterministic kernels on a GPU; the environment variables of its libraries are set for that
    (docs/gpu.md). On a CPU they always are.
    """
    trainable: Fixed[list[Part]] = field(default_factory=list)
    """The parts of the model to train. An empty list means those of the stage's kind (config/recipe.py)."""
    exit_signal_handler: Free[Bool] = True
    """Where any rank receives SIGTERM or SIGUSR1, finish the step, save and exit with status 0."""
    exit_duration_in_mins: Free[Optional[Annotated[Float, Field(gt=0)]]] = None
    """Save and exit with status 0 once the run has lasted this many minutes. None means that it does not end
    for its duration.
    """
    exit_interval: Free[Optional[PositiveCount]] = None
    """Save and exit with status 0 after a step that is a multiple of this. None means after none."""
    profile: Free[Bool] = False
    """Write a trace, and a table of the time that each operation takes, of some steps to the directory
    ``profile`` in `save` (docs/gpu.md).
    """
    profile_step_start: Free[PositiveCount] = 10
    """The first step of each stage that is profiled."""
    profile_step_end: Free[PositiveCount] = 12
    """The first step that is no longer profiled."""
    profile_ranks: Free[list[Count]] = field(default_factory=lambda: [0])
    """The ranks that are profiled."""


@dataclass(kw_only=True)
class GpuConfig:
    """FP8 and fused kernels; they need a GPU with Transformer Engine (docs/gpu.md)."""

    fp8_format: Logged[Optional[Literal["e4m3", "hybrid"]]] = None
    """Compute the linear layers of the decoder in FP8: `e4m3` for everything, `hybrid` with e5m2 for
    gradients. None computes them in bfloat16.
    """
    fp8_recipe: Logged[Literal["delayed", "tensorwise", "blockwise", "mxfp8"]] = "delayed"
    """How FP8 tensors are scaled: `delayed` by the largest values of earlier steps, `tensorwise` by the
    tensor's own largest value, `blockwise` and `mxfp8` by those of blocks (`mxfp8` needs Blackwell).
    """
    fp8_margin: Logged[Annotated[Int, Field(ge=0, le=64)]] = 0
    """For `delayed`: the powers of two that are left free above the largest value."""
    fp8_amax_history_len: Logged[Annotated[Int, Field(ge=1, le=65536)]] = 1
    """For `delayed`: the number of steps whose largest values are kept."""
    fp8_amax_compute_algo: Logged[Literal["most_recent", "max"]] = "most_recent"
    """For `delayed`: whether the largest or the most recent of the kept values decides."""
    first_last_layers_bf16: Logged[Bool] = False
    """Compute the first and the last layers of the decoder in bfloat16 (not with `delayed`)."""
    num_layers_at_start_in_bf16: Logged[Count] = 1
    """The number of first layers that `first_last_layers_bf16` leaves in bfloat16."""
    num_layers_at_end_in_bf16: Logged[Count] = 1
    """The number of last layers that `first_last_layers_bf16` leaves in bfloat16."""
    moe_router_padding_for_fp8: Logged[Bool] = False
    """Send each expert additional tokens, of weight 0, up to a number of tokens that FP8 can compute, in
    place of padding the expert's input.
    """
    apply_rope_fusion: Logged[Optional[Bool]] = None
    """Compute RoPE in one kernel. None means that it is on with Transformer Engine."""
    moe_permute_fusion: Logged[Optional[Bool]] = None
    """Sort tokens by expert in one kernel. None means that it is on with Transformer Engine."""
    cross_entropy_loss_fusion: Logged[Optional[Bool]] = None
    """Compute the cross-entropy in fused kernels, whose gradient is bfloat16. None means that it is on with
    Transformer Engine and `bf16`.
    """


@dataclass(kw_only=True)
class CheckpointConfig:
    """Where a run saves its state, and what it starts from."""

    save: Free[Optional[Text]] = None
    """The output directory; each stage saves in a subdirectory of its own name. None saves nothing."""
    save_interval: Free[Count] = 0
    """Optimizer steps between two checkpoints. 0 saves only at the end of a stage."""
    keep: Free[Count] = 2
    """How many checkpoints of each stage are kept, the newest ones. 0 keeps all."""
    keep_every: Free[Count] = 0
    """Checkpoints of steps that are a multiple of this are kept as well, for good. 0 means none."""
    pretrained_checkpoint: Logged[Optional[Text]] = None
    """The checkpoint from which the first stage takes its weights. Modules that it lacks start with new
    weights, and the log names them. None means new weights,
    unless `load` holds some.
    """
    load: Free[Optional[Text]] = None
    """Where to look for what `save` does not hold yet: the directory of a run, whose stages are resumed, or
    weights for the first stage.
    """
    async_save: Free[Bool] = False
    """Write checkpoints in the background. A checkpoint is published once all of it is on disk."""
    ckpt_step: Free[Optional[Count]] = None
    """Resume from the checkpoint of this step. None means from the newest one."""
    allow_changed: Free[Names] = field(default_factory=list)
    """Fields that may differ from the checkpoint's on a resume although they would have to be equal, by the
    names of their flags: ``seed,rotary_base``.
    """
    allow_changed_data: Free[Bool] = False
    """Resume although the training samples are not those of the checkpoint. The log tells which samples
    repeat and which are left out.
    """


@dataclass(kw_only=True)
class LogConfig:
    """What is logged, and where."""

    log_interval: Free[PositiveCount] = 10
    """Optimizer steps between two log lines."""
    tensorboard_dir: Free[Optional[Text]] = None
    """Directory of TensorBoard's event files. None writes none."""
    wandb_project: Free[Optional[WandbName]] = None
    """The wandb project; setting it turns wandb on (also with WANDB_MODE=offline). None logs nothing to
    wandb.
    """
    wandb_entity: Free[Optional[WandbName]] = None
    """The wandb team or user. None means the default of the account."""
    wandb_exp_name: Free[Optional[ShortText]] = None
    """The name of the wandb run. None lets wandb choose one."""
    log_params_norm: Free[Bool] = False
    """Log the L2 norm of all weights with every log line; this reads them all and reduces over ranks."""
    moe_metrics_interval: Free[PositiveCount] = 10
    """Optimizer steps between two measurements of routing: the shares of each expert by modality, and the
    auxiliary loss of each layer.
    """
