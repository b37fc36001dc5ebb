"""What a run is made of: one keyword-only dataclass per concern, and the way from YAML and flags to them.

A YAML file has one mapping per section (``language:``, ``vision:``, ``moe:``, ``data:`` …) and a list of ``stages:``.
Every field is also a command-line flag in Megatron's spelling: ``optimizer.clip_grad`` is ``--clip-grad``; the vision
tower's are prefixed (``--vision-hidden-size``). Flags win over the file. A stage may override any flat field of the
sections `STAGE_SECTIONS`, so each stage says only what is special about it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import os
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Optional

import pydantic
import yaml

from megatron_evomoe.presets import PRESETS


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the value, the rule and the remedy."""


@dataclass(kw_only=True)
class LanguageConfig:
    """The decoder. Names are megatron-core's; sizes default to the `tiny` preset."""

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 128
    """Width C of the residual stream."""
    ffn_hidden_size: int = 352
    """Width of each FFN, dense or expert."""
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: Optional[int] = None
    """Key/value heads; none means one per query head."""
    kv_channels: Optional[int] = None
    """Size of one head; none means hidden_size / num_attention_heads."""
    vocab_size: Optional[int] = None
    """Rows of the embedding before padding for tensor parallelism; none takes the tokenizer's size."""
    make_vocab_size_divisible_by: int = 8
    """The embedding is padded to a multiple of this times the tensor-parallel size."""
    max_position_embeddings: int = 2048
    """Longest sequence the model is built for, in tokens (image tokens included)."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Kind of norm."""
    norm_epsilon: float = 1e-6
    """Epsilon inside the norm."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """FFN activation."""
    gated_linear_unit: bool = True
    """Whether the FFN is gated (SwiGLU and relatives)."""
    add_qkv_bias: bool = False
    """Bias on the attention's input projection only (Qwen)."""
    add_bias_linear: bool = False
    """Bias on every linear layer (Phi)."""
    qk_layernorm: bool = False
    """Norm on queries and keys (Qwen3)."""
    parallel_residual: bool = False
    """Attention and FFN read one shared norm and add to the stream together (Phi-2)."""
    lm_head_bias: bool = False
    """Bias on the output layer (Phi-2)."""
    rotary_base: int = 10000
    """RoPE base period."""
    rotary_percent: float = 1.0
    """Share of each head that is rotated."""
    rope_scaling_type: Optional[Literal["linear", "llama3"]] = None
    """How RoPE is stretched to longer sequences: `linear` divides all positions, `llama3` only low frequencies; none does not."""
    rope_scaling_factor: float = 1.0
    """By how much."""
    window_size: Optional[int] = None
    """Sliding attention window in tokens (Mistral); none attends to everything before."""
    tie_word_embeddings: bool = True
    """One matrix for input and output embeddings."""
    init_method_std: float = 0.02
    """Standard deviation of fresh weights, projector included (Megatron's default; small widths learn faster from more)."""


@dataclass(kw_only=True)
class VisionConfig:
    """The image encoder; flags are prefixed with ``--vision-``."""

    model_type: Literal["clip", "siglip"] = "clip"
    """CLIP (class token, norm before the layers, quick GELU) or SigLIP (neither; tanh GELU)."""
    image_size: int = 32
    """Side of the square input, pixels."""
    patch_size: int = 8
    """Side of a patch, pixels."""
    hidden_size: int = 64
    """Width."""
    num_layers: int = 3
    """Layers of the published tower; layers above `feature_layer` are never built."""
    num_attention_heads: int = 4
    """Heads."""
    ffn_hidden_size: int = 256
    """Width of the MLP."""
    norm_epsilon: float = 1e-5
    """Epsilon inside the norms."""
    feature_layer: int = -2
    """Which hidden state is the feature: −1 the last layer's, −2 the one before (LLaVA's mm_vision_select_layer)."""
    feature_select: Literal["patch", "cls_patch"] = "patch"
    """`patch` drops the class token, `cls_patch` keeps it (LLaVA's names; SigLIP has none to drop)."""
    init_method_std: float = 0.02
    """Standard deviation of fresh weights (a tower is usually loaded, not trained from scratch)."""

    @property
    def num_layers_used(self) -> int:
        """Layers that are built and run."""
        return self.num_layers + 1 + self.feature_layer if self.feature_layer < 0 else self.feature_layer

    @property
    def tokens_per_image(self) -> int:
        """Positions one image takes in the language model's sequence."""
        keeps_class_token = self.model_type == "clip" and self.feature_select == "cls_patch"
        return (self.image_size // self.patch_size) ** 2 + int(keeps_class_token)


@dataclass(kw_only=True)
class MoEConfig:
    """Experts, router and evolution."""

    num_experts: int = 4
    """Experts per MoE layer, N."""
    moe_layer_freq: int | list[int] = 2
    """k: every k-th layer is MoE, counted so that layers 1, 1+k, … (from 0) are; or a list of 0/1, one per layer."""
    moe_router_topk: int = 1
    """Experts per token, K."""
    router: Literal["linear", "modality-linear", "dtr"] = "dtr"
    """One linear map, one per modality, or the paper's hypernetworks."""
    dtr_hidden_size: int = 16
    """h, the hypernetwork's inner width (the paper gives none; h·r of order 10³ fits its parameter counts)."""
    dtr_rank: int = 16
    """r, width of the generated router."""
    dtr_init_std: float = 0.02
    """Standard deviation of φ at the start; the hypernetworks are scaled by fan-in (docs/router.md)."""
    dtr_activation: Literal["none", "gelu", "silu"] = "none"
    """Activation between the two maps of a hypernetwork; the paper's Eq. 5 has none."""
    dtr_kernel: Literal["auto", "torch", "triton"] = "auto"
    """What computes the DTR: `torch`, or `triton` kernels on a GPU. `auto` is torch until a GPU has shown which is faster."""
    router_gate: Literal["prob", "straight_through"] = "straight_through"
    """What scales an expert's output: its probability, or 1 with the probability's gradient."""
    moe_aux_loss_coeff: float = 0.001
    """α of the load-balancing loss (paper: 0.001)."""
    moe_z_loss_coeff: Optional[float] = None
    """Coefficient of the router z-loss; none leaves it out."""
    moe_expert_capacity_factor: Optional[float] = None
    """Tokens beyond this multiple of an even share are dropped; none drops nothing."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """megatron-core's token dispatcher."""
    moe_grouped_gemm: bool = False
    """Grouped expert GEMMs (needs Transformer Engine)."""
    expert_init: Literal["evolve", "replicate", "noise"] = "evolve"
    """Where the experts of a routed stage come from when it starts from a dense checkpoint. `evolve` expects an evolved one."""
    expert_init_noise: float = 0.01
    """For `noise`: standard deviation, in units of each weight matrix's own."""
    evolution_rule: str = "delta"
    """How experts 2…N follow expert 1: delta, ema, printed, or a rule of your own (docs/stages.md)."""
    evolution_beta: list[tuple[float, float]] = field(default_factory=lambda: [(0.9, 0.99), (0.8, 0.89), (0.7, 0.79)])
    """[low, high) of β for experts 2…N; one pair each (the paper's, for N = 4)."""

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) is a mixture."""
        if isinstance(self.moe_layer_freq, list):
            return bool(self.moe_layer_freq[layer])
        return layer % self.moe_layer_freq == self.moe_layer_freq - 1

    def layer_pattern(self, num_layers: int) -> list[int]:
        """0/1 per decoder layer."""
        return [int(self.is_moe_layer(i)) for i in range(num_layers)]


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
    moe_metrics_interval: int = 10
    """Steps between routing metrics (shares by modality, aux loss per layer)."""


_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}")
STAGE_KINDS = ("align", "warmup", "dense", "evolve", "route")
STAGE_SECTIONS = ("moe", "data", "optimizer", "train", "gpu", "log")
MODEL_SECTIONS = ("language", "vision", "moe")


@dataclass(kw_only=True)
class StageConfig:
    """One stage of the recipe; every other key of its mapping overrides a field of `STAGE_SECTIONS`."""

    name: str
    """Folder and log name; unique."""
    kind: Literal["align", "warmup", "dense", "evolve", "route"]
    """What the stage does (train/stages.py); defaults to the name."""
    load: Optional[str] = None
    """Checkpoint directory it starts from; none means the stage before it in the list."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Flat field name -> value."""


@dataclass(kw_only=True)
class RunConfig:
    """Everything one run needs. Build it with `load_config` or `from_mapping`."""

    preset: Optional[str] = None
    """Named model shape, or a YAML file of `language`, `vision` and `moe` (as the importer writes); its values come before the
    file's own."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    stages: list[StageConfig] = field(default_factory=list)

    def for_stage(self, name: str) -> RunConfig:
        """A copy with stage `name`'s overrides applied and checked."""
        stage = next((s for s in self.stages if s.name == name), None)
        if stage is None:
            raise ConfigError(f"no stage {name!r}; this run has {', '.join(s.name for s in self.stages) or 'none'}")
        config = replace(self)
        for key, value in stage.overrides.items():
            section, field_name = _FLAT[key]
            setattr(config, section, replace(getattr(config, section), **{field_name: value}))
        check(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_mapping` takes back."""
        out = dataclasses.asdict(self)
        out["stages"] = [
            {"name": s.name, "kind": s.kind, **({"load": s.load} if s.load else {}), **s.overrides} for s in self.stages
        ]
        return yaml.safe_load(yaml.safe_dump(_plain(out)))

    def to_yaml(self) -> str:
        """The resolved configuration as a file that `load_config` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


SECTIONS: dict[str, type] = {
    "language": LanguageConfig,
    "vision": VisionConfig,
    "moe": MoEConfig,
    "data": DataConfig,
    "parallel": ParallelConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "gpu": GpuConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}


def _flat_name(section: str, name: str) -> str:
    return f"vision_{name}" if section == "vision" else name


# flat name -> (section, field): what a flag or a stage override may say
_FLAT: dict[str, tuple[str, str]] = {}
for _section, _cls in SECTIONS.items():
    for _f in fields(_cls):
        _key = _flat_name(_section, _f.name)
        assert _key not in _FLAT, f"two sections share the flag --{_key}"
        _FLAT[_key] = (_section, _f.name)


def load_config(path: str | Path | None, flags: dict[str, Any] | None = None) -> RunConfig:
    """Read a YAML file, put `flags` (flat names) over it, and check the result.

    Raises:
        ConfigError: the file is missing or no mapping, a key is unknown (names the nearest), a value has the wrong
            type, or fields contradict each other.
    """
    return from_mapping(_read_yaml(path) if path is not None else {}, flags)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(_expand_environment(Path(path).read_text(), path)) or {}
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {path} holds a {type(raw).__name__}; a mapping of sections is expected")
    return raw


def _expand_environment(text: str, path: str | Path) -> str:
    """``${NAME}`` and ``${NAME:-default}`` replaced by the environment's values, outside comments."""

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if name not in os.environ and default is None:
            raise ConfigError(f"config file {path} uses ${{{name}}}, which the environment does not set; export {name}=…")
        return os.environ.get(name) or default or ""

    lines = text.splitlines(keepends=True)
    return "".join(line if line.lstrip().startswith("#") else _VARIABLE.sub(value, line) for line in lines)


def from_mapping(raw: dict[str, Any], flags: dict[str, Any] | None = None) -> RunConfig:
    """Sections (and `preset`, `stages`) plus flat flags to a checked `RunConfig`."""
    _refuse_unknown(raw, {*SECTIONS, "preset", "stages"}, "section")
    flags = dict(flags or {})
    preset = flags.pop("preset", raw.get("preset"))
    layers: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    if preset is not None:
        for section, values in _preset(preset).items():
            layers[section].update(values)
        preset = preset if preset in PRESETS else None  # a file may be gone when this configuration is read again
    for section in SECTIONS:
        values = raw.get(section) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"section {section!r} must be a mapping, got {values!r}")
        _refuse_unknown(values, {f.name for f in fields(SECTIONS[section])}, f"key in section {section!r}:")
        layers[section].update(values)
    _refuse_unknown(flags, _FLAT, "flag")
    for key, value in flags.items():
        section, name = _FLAT[key]
        layers[section][name] = value
    sections = {name: _build(name, values) for name, values in layers.items()}
    stages = [_build_stage(entry) for entry in raw.get("stages") or []]
    for stage in stages:  # a flag on the command line wins over a stage's own value too
        stage.overrides = {k: v for k, v in stage.overrides.items() if k not in flags}
    config = RunConfig(preset=preset, stages=stages, **sections)
    names = [s.name for s in stages]
    if len(set(names)) != len(names):
        raise ConfigError(f"stage names must be unique, got {names}")
    check(config)
    for stage in stages:
        config.for_stage(stage.name)
    return config


def _preset(name: str) -> dict[str, dict[str, Any]]:
    """Sections of a named preset, or of a YAML file that holds the sections of a model alone."""
    if name in PRESETS:
        return PRESETS[name]
    if not str(name).endswith((".yaml", ".yml")):
        raise ConfigError(f"unknown preset {name!r}{_nearest(name, PRESETS)}; known: {', '.join(PRESETS)}, or a YAML file")
    raw = _read_yaml(name)
    _refuse_unknown(raw, MODEL_SECTIONS, f"section in the preset file {name}:")
    for section, values in raw.items():
        _refuse_unknown(values, {f.name for f in fields(SECTIONS[section])}, f"key in section {section!r} of {name}:")
    return raw


def _build(section: str, values: dict[str, Any]) -> Any:
    return SECTIONS[section](**{name: _coerce(section, name, value) for name, value in values.items()})


def _build_stage(entry: Any) -> StageConfig:
    if not isinstance(entry, dict) or "name" not in entry:
        raise ConfigError(f"each entry of stages must be a mapping with a name, got {entry!r}")
    entry = dict(entry)
    name, load = str(entry.pop("name")), entry.pop("load", None)
    kind = entry.pop("kind", name)
    if kind not in STAGE_KINDS:
        raise ConfigError(f"stage {name!r} has kind {kind!r}{_nearest(kind, STAGE_KINDS)}; known: {', '.join(STAGE_KINDS)}")
    allowed = {key for key, (section, _) in _FLAT.items() if section in STAGE_SECTIONS}
    _refuse_unknown(entry, allowed, f"key in stage {name!r}:")
    overrides = {key: _coerce(*_FLAT[key], value) for key, value in entry.items()}
    return StageConfig(name=name, kind=kind, load=load, overrides=overrides)


def _coerce(section: str, name: str, value: Any) -> Any:
    kind = typing.get_type_hints(SECTIONS[section])[name]
    try:
        return pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.ValidationError as error:
        what = error.errors()[0]["msg"]
        raise ConfigError(f"{section}.{name} = {value!r}: {what}") from None


def _refuse_unknown(given: Any, known: Any, what: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown {what} {key!r}{_nearest(str(key), known)}")


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def check(config: RunConfig) -> None:
    """What one field alone cannot know. Raises `ConfigError`."""
    lm, vision, moe, train = config.language, config.vision, config.moe, config.train

    def rule(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    rule(vision.image_size % vision.patch_size == 0,
         f"vision image_size {vision.image_size} is not a multiple of patch_size {vision.patch_size}")
    rule(1 <= vision.num_layers_used <= vision.num_layers,
         f"vision feature_layer {vision.feature_layer} needs a layer the tower's {vision.num_layers} do not have")
    if isinstance(moe.moe_layer_freq, list):
        rule(len(moe.moe_layer_freq) == lm.num_layers,
             f"moe_layer_freq lists {len(moe.moe_layer_freq)} layers, the model has {lm.num_layers}")
    else:
        rule(1 <= moe.moe_layer_freq <= lm.num_layers,
             f"moe_layer_freq {moe.moe_layer_freq} leaves no MoE layer among {lm.num_layers}; use 1 to {lm.num_layers}")
    rule(1 <= moe.moe_router_topk <= moe.num_experts,
         f"moe_router_topk {moe.moe_router_topk} must lie between 1 and num_experts {moe.num_experts}")
    rule(moe.dtr_kernel != "triton" or moe.router == "dtr",
         f"dtr_kernel triton is for router dtr, and this router is {moe.router}; leave dtr_kernel out")
    for low, high in moe.evolution_beta:
        rule(0.0 <= low <= high <= 1.0, f"evolution_beta range [{low}, {high}] must satisfy 0 <= low <= high <= 1")
    rule(train.micro_batch_size >= 1 and train.global_batch_size >= 1,
         f"batch sizes must be positive, got micro {train.micro_batch_size} and global {train.global_batch_size}")
    rule(not train.profile or 1 <= train.profile_step_start < train.profile_step_end,
         f"profile_step_start {train.profile_step_start} must be at least 1 and below profile_step_end {train.profile_step_end}")
    rule(vision.tokens_per_image < config.data.seq_length,
         f"one image takes {vision.tokens_per_image} tokens and does not fit seq_length {config.data.seq_length}")
    rule(config.data.seq_length <= lm.max_position_embeddings,
         f"seq_length {config.data.seq_length} exceeds max_position_embeddings {lm.max_position_embeddings}")
    rule(not (lm.tie_word_embeddings and lm.lm_head_bias), "lm_head_bias needs untied embeddings")
    rule(lm.rope_scaling_factor >= 1.0, f"rope_scaling_factor {lm.rope_scaling_factor} must be at least 1")
    rule(train.bf16 or not config.gpu.cross_entropy_loss_fusion,
         "cross_entropy_loss_fusion rounds the gradient to bf16, and this run is fp32; set bf16, or leave it out")
    _check_fp8(config, rule)


def _check_fp8(config: RunConfig, rule: Callable[[bool, str], None]) -> None:
    gpu, lm, parallel = config.gpu, config.language, config.parallel
    if gpu.fp8_format is None:
        rule(not gpu.moe_router_padding_for_fp8, "moe_router_padding_for_fp8 pads for FP8, and there is none; set fp8_format")
        return
    rule(config.train.bf16, f"fp8_format {gpu.fp8_format} keeps everything but linear layers in bf16; set train.bf16 too")
    rule(gpu.fp8_amax_history_len >= 1, f"fp8_amax_history_len {gpu.fp8_amax_history_len} must be at least 1")
    rule(not (gpu.moe_router_padding_for_fp8 and config.moe.moe_token_dispatcher_type == "allgather"),
         "moe_router_padding_for_fp8 does nothing for moe_token_dispatcher_type allgather; use alltoall or flex")
    if gpu.first_last_layers_bf16:
        start, end = gpu.num_layers_at_start_in_bf16, gpu.num_layers_at_end_in_bf16
        rule(gpu.fp8_recipe != "delayed", "first_last_layers_bf16 cannot be had with fp8_recipe delayed; use tensorwise")
        rule(min(start, end) >= 0 and start + end < lm.num_layers,
             f"{start} first and {end} last layers in bf16 leave none of {lm.num_layers} in FP8; lower num_layers_at_start_in_bf16 "
             "or num_layers_at_end_in_bf16")
    heads = lm.num_attention_heads * (lm.kv_channels or lm.hidden_size // lm.num_attention_heads)
    tp, etp = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    for name, width in {"hidden_size": lm.hidden_size, "ffn_hidden_size / tensor_model_parallel_size": lm.ffn_hidden_size / tp,
                        "ffn_hidden_size / expert_tensor_parallel_size": lm.ffn_hidden_size / etp,
                        "attention heads' width / tensor_model_parallel_size": heads / tp}.items():
        rule(width % 16 == 0, f"{name} is {width:g}, and FP8 needs multiples of 16; leave fp8_format out, or change the size")


def add_flags(parser: Any) -> None:
    """One flag per field, with the field's own words as help. Values stay text; `_coerce` reads them as YAML would."""
    for key, (section, name) in _FLAT.items():
        parser.add_argument(f"--{key.replace('_', '-')}", dest=f"cfg_{key}", metavar="VALUE", nargs="?",
                            const="true", help=_field_docs(SECTIONS[section]).get(name), default=None)


def flags_from(args: Any) -> dict[str, Any]:
    """The flags that were given, as flat names to values."""
    given = {k[4:]: v for k, v in vars(args).items() if k.startswith("cfg_") and v is not None}
    return {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in given.items()}


def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field, read from the source."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[statement.target.id] = ast.literal_eval(following.value).replace("%", "%%")  # type: ignore[union-attr]
    return docs
