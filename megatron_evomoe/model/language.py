"""The decoder: megatron-core's `GPTModel` with our layer specs.

Shape legend: b rows · s positions · C width · V padded vocabulary. Activations are [s, b, C].
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.utils import make_viewless_tensor

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.model.attention import PackedSegments, SdpaAttention
from megatron_evomoe.model.inventory import padded_vocab_size
from megatron_evomoe.model.mlp import allow_expert_biases, dense_mlp_spec
from megatron_evomoe.model.norm import TorchNorm
from megatron_evomoe.model.transformer_config import language_transformer_config, resolve_transformer_impl
from megatron_evomoe.moe.evolving_mlp import evolving_mlp_spec
from megatron_evomoe.moe.layer import moe_layer_spec
from megatron_evomoe.parallel import rng, topology


class Decoder(GPTModel):
    """A `GPTModel` whose local layers rotate each position of a packed row by its place in its segment.

    The rotations are gathered once for all layers. megatron-core would rather cut the row into segments in
    each layer, once for queries and once for keys, and read their lengths from the device each time. That is
    what it does under Transformer Engine with `apply_rope_fusion` off; with it on, which is the default
    there, a kernel restarts the positions.
    """

    def _preprocess(
        self, input_ids: Any, position_ids: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> tuple:
        prepared = super()._preprocess(
            input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        if not isinstance(packed_seq_params, PackedSegments) or packed_seq_params.qkv_format == "thd":
            return prepared
        decoder_input, rotary, *others = prepared
        return decoder_input, rotary.index_select(0, position_ids[0]), *others


class DecoderLayer(TransformerLayer):
    """A layer whose initial weights depend on the seed and on its place in the decoder, not on the rank."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        place = layer_number + get_transformer_layer_offset(config, vp_stage=kwargs.get("vp_stage"))
        with rng.derived(f"language_model.layer.{place}"):
            super().__init__(config, submodules, layer_number, *args, **kwargs)


class ParallelResidualLayer(DecoderLayer):
    """Phi-2's layer, x + attention(norm(x)) + FFN(norm(x)), which megatron-core does not have."""

    # Those of a block's arguments that the attention takes; they vary with megatron-core's version.
    _ATTENTION_ARGUMENTS = (
        "rotary_pos_emb",
        "rotary_pos_cos",
        "rotary_pos_sin",
        "rotary_pos_cos_sin",
        "attention_bias",
        "inference_context",
        "packed_seq_params",
        "sequence_len_offset",
    )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        *,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[s, b, C] to [s, b, C], and `context` unchanged; called as `TransformerLayer.forward` is."""
        normed = self.input_layernorm(hidden_states)
        passed = {k: v for k, v in kwargs.items() if k in self._ATTENTION_ARGUMENTS}
        attended = _with_bias(self.self_attention(normed, attention_mask=attention_mask, **passed))
        if self.recompute_mlp:
            # The bias is added inside, because autograd would recurse through a parameter that leaves a
            # checkpointed function.
            fed = tensor_parallel.checkpoint(
                lambda x: _with_bias(self.mlp(x, padding_mask=padding_mask)), False, normed
            )
        else:
            fed = _with_bias(self.mlp(normed, padding_mask=padding_mask))
        total = hidden_states + attended + fed
        return make_viewless_tensor(inp=total, requires_grad=total.requires_grad, keep_graph=True), context


def _with_bias(output_and_bias: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    output, bias = output_and_bias
    return output if bias is None else output + bias


def build_language_model(
    config: RunConfig,
    *,
    stage_kind: StageKind,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> Decoder:
    """This pipeline stage's part of the decoder.

    Layers that ``config.moe`` designates hold a dense FFN in the kinds align, warmup and dense, the
    evolving FFN in `evolve` and the mixture in `route`. All other parameters have the same names in all
    kinds.

    The model expects `decoder_input` scattered for sequence parallelism, because images are spliced in
    before.

    Raises:
        ConfigError: as `language_transformer_config` and `padded_vocab_size`.
    """
    lm = config.language
    logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(_is_news)
    transformer_config = language_transformer_config(config)
    with rng.derived("language_model.embedding"):
        model = Decoder(
            config=transformer_config,
            transformer_layer_spec=language_block_spec(config, transformer_config, stage_kind, vp_stage),
            vocab_size=padded_vocab_size(config),
            max_sequence_length=lm.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=lm.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_percent=lm.rotary_percent,
            rotary_base=lm.rotary_base,
            seq_len_interpolation_factor=lm.rope_scaling_factor if lm.rope_scaling_type == "linear" else None,
            rope_scaling=lm.rope_scaling_type == "llama3",
            rope_scaling_factor=lm.rope_scaling_factor,
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
    if post_process and not lm.tie_word_embeddings and transformer_config.perform_initialization:
        _draw_output_layer(model)
    if lm.lm_head_bias and post_process:
        _add_output_bias(model)
    return model


def _draw_output_layer(model: GPTModel) -> None:
    """Draw the whole output matrix again and keep this rank's rows.

    megatron-core draws it after the embedding if one stage holds both, and first if not, so its values would
    depend on the layout.
    """
    weight = model.output_layer.weight
    with rng.derived("language_model.output_layer"), torch.no_grad():
        whole = weight.new_empty(model.output_layer.output_size, weight.shape[1])
        model.config.init_method(whole)
        weight.copy_(whole.chunk(model.config.tensor_model_parallel_size)[topology.current().tensor.rank])


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to log a record: not megatron-core's warning of each FFN that is a subclass, as ours is."""
    return not record.getMessage().startswith("Unknown MLP type")


def language_block_spec(
    config: RunConfig,
    transformer_config: TransformerConfig,
    stage_kind: StageKind,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The specs of the layers of this pipeline rank and chunk, and of the norm behind the last layer."""
    pattern = config.moe.layer_pattern(config.language.num_layers)
    specs = {bool(moe): _layer_spec(config, stage_kind, bool(moe)) for moe in set(pattern)}
    first = get_transformer_layer_offset(transformer_config, vp_stage=vp_stage)
    count = get_num_layers_to_build(transformer_config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[specs[bool(moe)] for moe in pattern[first : first + count]],
        layer_norm=_norm(resolve_transformer_impl(config) == "transformer_engine"),
    )


def _layer_spec(config: RunConfig, stage_kind: StageKind, designated: bool) -> ModuleSpec:
    """The spec of one layer.

    Transformer Engine can fuse a norm into the linear layer behind it, and then renames the norm's weights.
    Designated layers keep the norm before the FFN unfused in every stage kind, because a mixture has no
    linear layer behind it; a norm that attention and FFN share is not fused either.

    Args:
        designated: whether the layer is, or will become, a mixture.
    """
    lm = config.language
    use_te = resolve_transformer_impl(config) == "transformer_engine"
    backend, norm = _backend(use_te), _norm(use_te)
    fuse_attention_norm = use_te and not lm.parallel_residual
    fuse_ffn_norm = fuse_attention_norm and not designated
    fused, unfused = backend.column_parallel_layer_norm_linear(), backend.column_parallel_linear()
    qk_norm = norm if lm.qk_layernorm else IdentityOp
    renamed = {}  # to Transformer Engine's names, so that both implementations read the same checkpoints
    if not use_te and not lm.parallel_residual:
        renamed["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
        if not designated:
            renamed["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=ParallelResidualLayer if lm.parallel_residual else DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fuse_attention_norm else norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=fused if fuse_attention_norm else unfused,
                    core_attention=backend.core_attention() if use_te else SdpaAttention,
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if fuse_ffn_norm or lm.parallel_residual else norm,
            mlp=_ffn_spec(
                config,
                stage_kind if designated else StageKind.DENSE,
                use_te,
                fused if fuse_ffn_norm else unfused,
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=renamed,
        ),
    )


def _ffn_spec(config: RunConfig, stage_kind: StageKind, use_te: bool, linear_fc1: type) -> Any:
    """The spec of a layer's FFN, which is dense in every kind but `evolve` and `route`."""
    if stage_kind == StageKind.ROUTE:
        spec = moe_layer_spec(config.moe, use_te)
        return allow_expert_biases(spec) if config.language.add_bias_linear and not use_te else spec
    dense = dense_mlp_spec(linear_fc1, _backend(use_te).row_parallel_linear())
    if stage_kind == StageKind.EVOLVE:
        return evolving_mlp_spec(dense, config.moe)
    return dense


def _backend(use_te: bool) -> Any:
    if not use_te:
        return LocalSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _norm(use_te: bool) -> type:
    return _backend(use_te).layer_norm() if use_te else TorchNorm


def _add_output_bias(model: GPTModel) -> None:
    """Give the output layer a bias [V / TP] of zeros, as Phi-2 has; `GPTModel` has no argument for it."""
    layer = model.output_layer
    layer.bias = torch.nn.Parameter(torch.zeros_like(layer.weight[:, 0]))
    set_tensor_model_parallel_attributes(layer.bias, True, 0, 1)
    layer.bias.allreduce = True  # its gradient is reduced over all data-parallel ranks, as the weight's is
