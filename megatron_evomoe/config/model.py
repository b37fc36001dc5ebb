"""What the model is: decoder, image encoder, experts and router. `Fixed` and `Said` are classes of config/resume.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from megatron_evomoe.config.resume import Fixed, Said


@dataclass(kw_only=True)
class LanguageConfig:
    """The decoder. Names are megatron-core's; sizes default to the `tiny` preset."""

    num_layers: Fixed[int] = 4
    """Transformer layers."""
    hidden_size: Fixed[int] = 128
    """Width C of the residual stream."""
    ffn_hidden_size: Fixed[int] = 352
    """Width of each FFN, dense or expert."""
    num_attention_heads: Fixed[int] = 4
    """Query heads."""
    num_query_groups: Fixed[Optional[int]] = None
    """Key/value heads; none means one per query head."""
    kv_channels: Fixed[Optional[int]] = None
    """Size of one head; none means hidden_size / num_attention_heads."""
    vocab_size: Fixed[Optional[int]] = None
    """Rows of the embedding before padding for tensor parallelism; none takes the tokenizer's size."""
    make_vocab_size_divisible_by: Said[int] = 8
    """The embedding is padded to a multiple of this times the tensor-parallel size."""
    max_position_embeddings: Said[int] = 2048
    """Longest sequence the model is built for, in tokens (image tokens included)."""
    normalization: Fixed[Literal["RMSNorm", "LayerNorm"]] = "RMSNorm"
    """Kind of norm."""
    norm_epsilon: Fixed[float] = 1e-6
    """Epsilon inside the norm."""
    activation: Fixed[Literal["silu", "gelu", "gelu_tanh"]] = "silu"
    """FFN activation."""
    gated_linear_unit: Fixed[bool] = True
    """Whether the FFN is gated (SwiGLU and relatives)."""
    add_qkv_bias: Fixed[bool] = False
    """Bias on the attention's input projection only (Qwen)."""
    add_bias_linear: Fixed[bool] = False
    """Bias on every linear layer (Phi)."""
    qk_layernorm: Fixed[bool] = False
    """Norm on queries and keys (Qwen3)."""
    parallel_residual: Fixed[bool] = False
    """Attention and FFN read one shared norm and add to the stream together (Phi-2)."""
    lm_head_bias: Fixed[bool] = False
    """Bias on the output layer (Phi-2)."""
    rotary_base: Fixed[int] = 10000
    """RoPE base period."""
    rotary_percent: Fixed[float] = 1.0
    """Share of each head that is rotated."""
    rope_scaling_type: Fixed[Optional[Literal["linear", "llama3"]]] = None
    """How RoPE is stretched to longer sequences: `linear` divides all positions, `llama3` only low frequencies; none does not."""
    rope_scaling_factor: Fixed[float] = 1.0
    """By how much."""
    window_size: Fixed[Optional[int]] = None
    """Sliding attention window in tokens (Mistral); none attends to everything before."""
    tie_word_embeddings: Fixed[bool] = True
    """One matrix for input and output embeddings."""
    init_method_std: Fixed[float] = 0.02
    """Standard deviation of fresh weights, projector included (Megatron's default; small widths learn faster from more)."""


@dataclass(kw_only=True)
class VisionConfig:
    """The image encoder; flags are prefixed with ``--vision-``."""

    model_type: Fixed[Literal["clip", "siglip"]] = "clip"
    """CLIP (class token, norm before the layers, quick GELU) or SigLIP (neither; tanh GELU)."""
    image_size: Fixed[int] = 32
    """Side of the square input, pixels."""
    patch_size: Fixed[int] = 8
    """Side of a patch, pixels."""
    hidden_size: Fixed[int] = 64
    """Width."""
    num_layers: Fixed[int] = 3
    """Layers of the published tower; layers above `feature_layer` are never built."""
    num_attention_heads: Fixed[int] = 4
    """Heads."""
    ffn_hidden_size: Fixed[int] = 256
    """Width of the MLP."""
    norm_epsilon: Fixed[float] = 1e-5
    """Epsilon inside the norms."""
    feature_layer: Fixed[int] = -2
    """Which hidden state is the feature: −1 the last layer's, −2 the one before (LLaVA's mm_vision_select_layer)."""
    feature_select: Fixed[Literal["patch", "cls_patch"]] = "patch"
    """`patch` drops the class token, `cls_patch` keeps it (LLaVA's names; SigLIP has none to drop)."""
    init_method_std: Fixed[float] = 0.02
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

    num_experts: Fixed[int] = 4
    """Experts per MoE layer, N."""
    moe_layer_freq: Fixed[int | list[int]] = 2
    """k: every k-th layer is MoE, counted so that layers 1, 1+k, … (from 0) are; or a list of 0/1, one per layer."""
    moe_router_topk: Fixed[int] = 1
    """Experts per token, K."""
    router: Fixed[Literal["linear", "modality-linear", "dtr"]] = "dtr"
    """One linear map, one per modality, or the paper's hypernetworks."""
    dtr_hidden_size: Fixed[int] = 16
    """h, the hypernetwork's inner width (the paper gives none; h·r of order 10³ fits its parameter counts)."""
    dtr_rank: Fixed[int] = 16
    """r, width of the generated router."""
    dtr_init_std: Fixed[float] = 0.02
    """Standard deviation of φ at the start; the hypernetworks are scaled by fan-in (docs/router.md)."""
    dtr_activation: Fixed[Literal["none", "gelu", "silu"]] = "none"
    """Activation between the two maps of a hypernetwork; the paper's Eq. 5 has none."""
    dtr_kernel: Said[Literal["auto", "torch", "triton"]] = "auto"
    """What computes the DTR: `torch`, or `triton` kernels on a GPU. `auto` is torch until a GPU has shown which is faster."""
    router_gate: Fixed[Literal["prob", "straight_through"]] = "straight_through"
    """What scales an expert's output: its probability, or 1 with the probability's gradient."""
    moe_aux_loss_coeff: Said[float] = 0.001
    """α of the load-balancing loss (paper: 0.001)."""
    moe_z_loss_coeff: Said[Optional[float]] = None
    """Coefficient of the router z-loss; none leaves it out."""
    moe_expert_capacity_factor: Fixed[Optional[float]] = None
    """Tokens beyond this multiple of an even share are dropped; none drops nothing."""
    moe_token_dispatcher_type: Said[Literal["alltoall", "allgather", "flex"]] = "alltoall"
    """megatron-core's token dispatcher."""
    moe_grouped_gemm: Said[bool] = False
    """Grouped expert GEMMs (needs Transformer Engine)."""
    expert_init: Fixed[Literal["evolve", "replicate", "noise"]] = "evolve"
    """Where the experts of a routed stage come from when it starts from a dense checkpoint. `evolve` expects an evolved one."""
    expert_init_noise: Fixed[float] = 0.01
    """For `noise`: standard deviation, in units of each weight matrix's own."""
    evolution_rule: Fixed[str] = "delta"
    """How experts 2…N follow expert 1: delta, ema, printed, or a rule of your own (docs/stages.md)."""
    evolution_beta: Fixed[list[tuple[float, float]]] = field(default_factory=lambda: [(0.9, 0.99), (0.8, 0.89), (0.7, 0.79)])
    """[low, high) of β for experts 2…N; one pair each (the paper's, for N = 4)."""

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) is a mixture."""
        if isinstance(self.moe_layer_freq, list):
            return bool(self.moe_layer_freq[layer])
        return layer % self.moe_layer_freq == self.moe_layer_freq - 1

    def layer_pattern(self, num_layers: int) -> list[int]:
        """0/1 per decoder layer."""
        return [int(self.is_moe_layer(i)) for i in range(num_layers)]
