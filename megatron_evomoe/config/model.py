"""What the model is: decoder, vision tower, experts and router.

`Fixed` and `Logged` declare what a resume does where a value differs from that of the checkpoint
(config/resume.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Optional

from pydantic import Field

from megatron_evomoe.config.resume import Fixed, Logged
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
    """The decoder. The names are megatron-core's; the default sizes are those of the `tiny` preset."""

    num_layers: Fixed[Few] = 4
    """Transformer layers of the decoder."""
    hidden_size: Fixed[Size] = 128
    """The width C of the residual stream, in channels."""
    ffn_hidden_size: Fixed[Size] = 352
    """The inner width of each FFN, of a dense one as of an expert."""
    num_attention_heads: Fixed[Size] = 4
    """Query heads of each layer."""
    num_query_groups: Fixed[Optional[Size]] = None
    """Key/value heads of each layer. None means as many as query heads."""
    kv_channels: Fixed[Optional[Size]] = None
    """Channels of one head. None means hidden_size / num_attention_heads."""
    vocab_size: Fixed[Optional[Size]] = None
    """Rows of the embedding, before it is padded for tensor parallelism. None means the size of the
    tokenizer.
    """
    make_vocab_size_divisible_by: Logged[Size] = 8
    """The rows of the embedding are padded to a multiple of this number times the tensor-parallel size."""
    max_position_embeddings: Logged[Size] = 2048
    """The longest sequence, in tokens, for which the model is built, counting the tokens of images."""
    normalization: Fixed[Literal["RMSNorm", "LayerNorm"]] = "RMSNorm"
    """The kind of norm."""
    norm_epsilon: Fixed[Epsilon] = 1e-6
    """The number that a norm adds to the variance."""
    activation: Fixed[Literal["silu", "gelu", "gelu_tanh"]] = "silu"
    """The activation of the FFN."""
    gated_linear_unit: Fixed[Bool] = True
    """Whether the FFN is gated, as in SwiGLU."""
    add_qkv_bias: Fixed[Bool] = False
    """Add a bias to the input projection of attention only (Qwen)."""
    add_bias_linear: Fixed[Bool] = False
    """Add a bias to every linear layer (Phi)."""
    qk_layernorm: Fixed[Bool] = False
    """Normalise queries and keys (Qwen3)."""
    parallel_residual: Fixed[Bool] = False
    """Attention and FFN read the output of one shared norm, and both results are added to the residual stream
    (Phi-2).
    """
    lm_head_bias: Fixed[Bool] = False
    """Add a bias to the output layer (Phi-2). It needs untied embeddings."""
    rotary_base: Fixed[Annotated[Int, Field(ge=1, le=10**12)]] = 10000
    """The base of the RoPE frequencies."""
    rotary_percent: Fixed[PositiveShare] = 1.0
    """The share of the channels of each head that RoPE rotates."""
    rope_scaling_type: Fixed[Optional[Literal["linear", "llama3"]]] = None
    """How RoPE is stretched to longer sequences: `linear` divides all positions by the factor, `llama3`
    divides low frequencies only. None does not stretch it.
    """
    rope_scaling_factor: Fixed[Annotated[Float, Field(ge=1, le=1e6)]] = 1.0
    """The factor by which `rope_scaling_type` stretches RoPE."""
    window_size: Fixed[Optional[Size]] = None
    """The width of the sliding attention window, in tokens (Mistral). None attends to all earlier tokens."""
    tie_word_embeddings: Fixed[Bool] = True
    """Use one matrix for the input embedding and for the output layer."""
    init_method_std: Fixed[Deviation] = 0.02
    """The standard deviation of new weights of the decoder and the projector. The default is Megatron's;
    narrow models learn faster with more.
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
    """The vision tower; its flags begin with ``--vision-``."""

    model_type: Fixed[Literal["clip", "siglip"]] = "clip"
    """The architecture: `clip` has a class token, a norm before the layers and quick GELU; `siglip` has
    neither token nor norm, and tanh GELU.
    """
    image_size: Fixed[Size] = 32
    """The side of the square input image, in pixels."""
    patch_size: Fixed[Size] = 8
    """The side of a patch, in pixels."""
    hidden_size: Fixed[Size] = 64
    """The width of the residual stream of the tower, in channels."""
    num_layers: Fixed[Few] = 3
    """Layers of the published tower. Layers above `feature_layer` are not built."""
    num_attention_heads: Fixed[Size] = 4
    """Attention heads of each layer."""
    ffn_hidden_size: Fixed[Size] = 256
    """The inner width of the FFN of each layer."""
    norm_epsilon: Fixed[Epsilon] = 1e-5
    """The number that a norm adds to the variance."""
    feature_layer: Fixed[Annotated[Int, Field(ge=-4096, le=4096)]] = -2
    """The hidden state that is taken as the feature: −1 is the output of the last layer, −2 that of the one
    before (LLaVA's mm_vision_select_layer); positive numbers count from the first layer, which is 1.
    """
    feature_select: Fixed[Literal["patch", "cls_patch"]] = "patch"
    """The positions that are taken (LLaVA's names): `patch` drops the class token, `cls_patch` keeps it.
    SigLIP has no class token.
    """
    init_method_std: Fixed[Deviation] = 0.02
    """The standard deviation of new weights of the tower. A tower is usually loaded, not trained from new
    weights.
    """

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
    """N: the experts of each MoE layer."""
    moe_layer_freq: Fixed[Few | list[ZeroOrOne]] = 2
    """Which layers are MoE layers: a number k makes every k-th layer one (layers k − 1, 2k − 1, … counted
    from 0); a list holds one 0 or 1 for each layer.
    """
    moe_router_topk: Fixed[Few] = 1
    """K: the experts to which each token is sent."""
    router: Fixed[Literal["linear", "modality-linear", "dtr", "cosine"]] = "dtr"
    """The router: `linear` is one linear map, `modality-linear` one for each modality, `dtr` the paper's
    hypernetworks, `cosine` the cosine between a token and each expert's centroid.
    """
    dtr_hidden_size: Fixed[Size] = 16
    """h: the inner width of the hypernetworks of `dtr`. The paper does not state it; with h·r near 10³ the
    parameter counts are the paper's.
    """
    dtr_rank: Fixed[Size] = 16
    """r: the rank of the router that the hypernetworks of `dtr` generate."""
    dtr_init_std: Fixed[Deviation] = 0.02
    """The standard deviation of φ of a new `dtr`. New hypernetworks are scaled by their fan-in
    (docs/router.md).
    """
    dtr_activation: Fixed[Literal["none", "gelu", "silu"]] = "none"
    """The activation between the two maps of a hypernetwork. Equation 5 of the paper has none."""
    dtr_kernel: Logged[Literal["torch", "triton"]] = "torch"
    """What computes the DTR: `torch`, or `triton` kernels on a GPU; no GPU has compared them yet."""
    router_gate: Fixed[Literal["prob", "straight_through"]] = "straight_through"
    """The factor of an expert's output: `prob` is the router's probability; `straight_through` is 1 with the
    gradient of the probability.
    """
    moe_aux_loss_coeff: Logged[Coefficient] = 0.001
    """α: the coefficient of the load-balancing loss (0.001 in the paper)."""
    moe_z_loss_coeff: Logged[Optional[Coefficient]] = None
    """The coefficient of the router's z-loss. None leaves the loss out."""
    moe_expert_capacity_factor: Fixed[Optional[Factor]] = None
    """In training, an expert takes at most this multiple of an even share of the tokens of a microbatch; the
    others are dropped. None drops nothing.
    """
    moe_token_dispatcher_type: Logged[Literal["alltoall", "allgather", "flex"]] = "alltoall"
    """megatron-core's token dispatcher."""
    moe_grouped_gemm: Logged[Bool] = False
    """Compute the experts of a rank in grouped matrix products (needs Transformer Engine)."""
    expert_init: Fixed[Literal["evolve", "replicate", "noise"]] = "evolve"
    """What a routed stage makes its experts of when it starts from a dense checkpoint: `evolve` refuses one,
    because it expects evolved experts; `replicate` copies the FFN; `noise` copies it and adds noise.
    """
    expert_init_noise: Fixed[Coefficient] = 0.01
    """For `noise`: the standard deviation of the noise, in multiples of that of each weight matrix."""
    evolution_rule: Fixed[Text] = "delta"
    """How experts 2…N are updated from expert 1: delta, ema, printed, or a rule that an extension registers
    (docs/stages.md).
    """
    evolution_beta: Fixed[Optional[list[Range]]] = None
    """The range [low, high) of β for each of the experts 2…N. None means the paper's ranges for N = 4, and
    interpolated ones for other N (docs/stages.md).
    """

    @property
    def evolution_ranges(self) -> list[tuple[float, float]]:
        """The range [low, high) of β for each of the experts 2…N.

        Without `evolution_beta`, [0.7, 1) is divided into N − 1 pieces, the highest first.

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
