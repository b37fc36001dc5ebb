"""What the model is: decoder, image encoder, experts and router. `Fixed` and `Said` are classes of
config/resume.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Optional

from pydantic import Field

from megatron_evomoe.config.resume import Fixed, Said
from megatron_evomoe.config.types import (
    Bool,
    Coefficient,
    Deviation,
    Epsilon,
    Factor,
    Few,
    Float,
    Int,
    PositiveShare,
    Range,
    Size,
    Text,
    ZeroOrOne,
)


@dataclass(kw_only=True)
class LanguageConfig:
    """The decoder. Names are megatron-core's; sizes default to the `tiny` preset."""

    num_layers: Fixed[Few] = 4
    """Transformer layers."""
    hidden_size: Fixed[Size] = 128
    """Width C of the residual stream."""
    ffn_hidden_size: Fixed[Size] = 352
    """Width of each FFN, dense or expert."""
    num_attention_heads: Fixed[Size] = 4
    """Query heads."""
    num_query_groups: Fixed[Optional[Size]] = None
    """Key/value heads; none means one per query head."""
    kv_channels: Fixed[Optional[Size]] = None
    """Size of one head; none means hidden_size / num_attention_heads."""
    vocab_size: Fixed[Optional[Size]] = None
    """Rows of the embedding before padding for tensor parallelism; none takes the tokenizer's size."""
    make_vocab_size_divisible_by: Said[Size] = 8
    """The embedding is padded to a multiple of this times the tensor-parallel size."""
    max_position_embeddings: Said[Size] = 2048
    """Longest sequence the model is built for, in tokens (image tokens included)."""
    normalization: Fixed[Literal["RMSNorm", "LayerNorm"]] = "RMSNorm"
    """Kind of norm."""
    norm_epsilon: Fixed[Epsilon] = 1e-6
    """Epsilon inside the norm."""
    activation: Fixed[Literal["silu", "gelu", "gelu_tanh"]] = "silu"
    """FFN activation."""
    gated_linear_unit: Fixed[Bool] = True
    """Whether the FFN is gated (SwiGLU and relatives)."""
    add_qkv_bias: Fixed[Bool] = False
    """Bias on the attention's input projection only (Qwen)."""
    add_bias_linear: Fixed[Bool] = False
    """Bias on every linear layer (Phi)."""
    qk_layernorm: Fixed[Bool] = False
    """Norm on queries and keys (Qwen3)."""
    parallel_residual: Fixed[Bool] = False
    """Attention and FFN read one shared norm and add to the stream together (Phi-2)."""
    lm_head_bias: Fixed[Bool] = False
    """Bias on the output layer (Phi-2)."""
    rotary_base: Fixed[Annotated[Int, Field(ge=1, le=10**12)]] = 10000
    """RoPE base period."""
    rotary_percent: Fixed[PositiveShare] = 1.0
    """Share of each head that is rotated."""
    rope_scaling_type: Fixed[Optional[Literal["linear", "llama3"]]] = None
    """How RoPE is stretched to longer sequences: `linear` divides all positions, `llama3` only low
    frequencies; none does not.
    """
    rope_scaling_factor: Fixed[Annotated[Float, Field(ge=1, le=1e6)]] = 1.0
    """By how much."""
    window_size: Fixed[Optional[Size]] = None
    """Sliding attention window in tokens (Mistral); none attends to everything before."""
    tie_word_embeddings: Fixed[Bool] = True
    """One matrix for input and output embeddings."""
    init_method_std: Fixed[Deviation] = 0.02
    """Standard deviation of fresh weights, projector included (Megatron's default; small widths learn faster
    from more).
    """

    @property
    def query_groups(self) -> int:
        """Key/value heads: `num_query_groups`, or one per query head."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Channels of one attention head: `kv_channels`, or an equal share of `hidden_size`."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads


@dataclass(kw_only=True)
class VisionConfig:
    """The image encoder; flags are prefixed with ``--vision-``."""

    model_type: Fixed[Literal["clip", "siglip"]] = "clip"
    """CLIP (class token, norm before the layers, quick GELU) or SigLIP (neither; tanh GELU)."""
    image_size: Fixed[Size] = 32
    """Side of the square input, pixels."""
    patch_size: Fixed[Size] = 8
    """Side of a patch, pixels."""
    hidden_size: Fixed[Size] = 64
    """Width."""
    num_layers: Fixed[Few] = 3
    """Layers of the published tower; layers above `feature_layer` are never built."""
    num_attention_heads: Fixed[Size] = 4
    """Heads."""
    ffn_hidden_size: Fixed[Size] = 256
    """Width of the MLP."""
    norm_epsilon: Fixed[Epsilon] = 1e-5
    """Epsilon inside the norms."""
    feature_layer: Fixed[Annotated[Int, Field(ge=-4096, le=4096)]] = -2
    """Which hidden state is the feature: −1 the last layer's, −2 the one before (LLaVA's
    mm_vision_select_layer).
    """
    feature_select: Fixed[Literal["patch", "cls_patch"]] = "patch"
    """`patch` drops the class token, `cls_patch` keeps it (LLaVA's names; SigLIP has none to drop)."""
    init_method_std: Fixed[Deviation] = 0.02
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

    num_experts: Fixed[Few] = 4
    """Experts per MoE layer, N."""
    moe_layer_freq: Fixed[Few | list[ZeroOrOne]] = 2
    """k: every k-th layer is MoE, counted so that layers 1, 1+k, … (from 0) are; or a list of 0/1, one per
    layer.
    """
    moe_router_topk: Fixed[Few] = 1
    """Experts per token, K."""
    router: Fixed[Literal["linear", "modality-linear", "dtr"]] = "dtr"
    """One linear map, one per modality, or the paper's hypernetworks."""
    dtr_hidden_size: Fixed[Size] = 16
    """h, the hypernetwork's inner width (the paper gives none; h·r of order 10³ fits its parameter
    counts).
    """
    dtr_rank: Fixed[Size] = 16
    """r, width of the generated router."""
    dtr_init_std: Fixed[Deviation] = 0.02
    """Standard deviation of φ at the start; the hypernetworks are scaled by fan-in (docs/router.md)."""
    dtr_activation: Fixed[Literal["none", "gelu", "silu"]] = "none"
    """Activation between the two maps of a hypernetwork; the paper's Eq. 5 has none."""
    dtr_kernel: Said[Literal["auto", "torch", "triton"]] = "auto"
    """What computes the DTR: `torch`, or `triton` kernels on a GPU. `auto` is torch until a GPU has shown
    which is faster.
    """
    router_gate: Fixed[Literal["prob", "straight_through"]] = "straight_through"
    """What scales an expert's output: its probability, or 1 with the probability's gradient."""
    moe_aux_loss_coeff: Said[Coefficient] = 0.001
    """α of the load-balancing loss (paper: 0.001)."""
    moe_z_loss_coeff: Said[Optional[Coefficient]] = None
    """Coefficient of the router z-loss; none leaves it out."""
    moe_expert_capacity_factor: Fixed[Optional[Factor]] = None
    """In training, tokens beyond this multiple of an even share of the microbatch are dropped; none drops
    nothing.
    """
    moe_token_dispatcher_type: Said[Literal["alltoall", "allgather", "flex"]] = "alltoall"
    """megatron-core's token dispatcher."""
    moe_grouped_gemm: Said[Bool] = False
    """Grouped expert GEMMs (needs Transformer Engine)."""
    expert_init: Fixed[Literal["evolve", "replicate", "noise"]] = "evolve"
    """Where the experts of a routed stage come from when it starts from a dense checkpoint. `evolve` expects
    an evolved one.
    """
    expert_init_noise: Fixed[Coefficient] = 0.01
    """For `noise`: standard deviation, in units of each weight matrix's own."""
    evolution_rule: Fixed[Text] = "delta"
    """How experts 2…N follow expert 1: delta, ema, printed, or a rule of your own (docs/stages.md)."""
    evolution_beta: Fixed[Optional[list[Range]]] = None
    """[low, high) of β for experts 2…N, one pair each; none means the paper's for N = 4, interpolated for
    others (docs/stages.md).
    """

    @property
    def evolution_ranges(self) -> list[tuple[float, float]]:
        """[low, high) of β for experts 2…N: `evolution_beta`, or else [0.7, 1) cut into N − 1 pieces, highest
        first.

        Each range is the lower 90 % of a piece, so that ranges do not touch. N = 4 gives the paper's [0.9,
        0.99], [0.8, 0.89] and [0.7, 0.79] exactly.
        """
        if self.evolution_beta is not None:
            return self.evolution_beta
        pieces = self.num_experts - 1
        lows = [1 - 0.3 * piece / pieces for piece in range(1, self.num_experts)]
        return [(round(low, 12), round(low + 0.27 / pieces, 12)) for low in lows]

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) is a mixture."""
        if isinstance(self.moe_layer_freq, list):
            return bool(self.moe_layer_freq[layer])
        return layer % self.moe_layer_freq == self.moe_layer_freq - 1

    def layer_pattern(self, num_layers: int) -> list[int]:
        """0/1 per decoder layer."""
        return [int(self.is_moe_layer(i)) for i in range(num_layers)]
