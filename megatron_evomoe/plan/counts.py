"""Every parameter of one model chunk on one rank: its name and size, without building anything. Exact.

The list follows `LlavaModel.named_parameters()` (local layers) in names and order;
`tests/unit/plan/test_counts.py` compares them. Transformer Engine renames norms and experts and changes no
size.

Shapes: C width · F width of the FFN · V padded vocabulary · N experts · h, r the hypernetwork's inner width
and rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import is_trained, part_of, trained_parts
from megatron_evomoe.model.language import padded_vocab_size
from megatron_evomoe.parallel.degrees import virtual_stages

Named = Iterator[tuple[str, int]]


class Tensor(NamedTuple):
    """One parameter as this rank holds it."""

    name: str
    numel: int
    part: str
    """As in `config.recipe.PARTS`."""
    trains: bool
    layer: int
    """Decoder layer, global, from 0; −1 outside the decoder's layers."""
    expert_parallel: bool = False
    """Reduced over the ranks that hold the same experts, rather than over all replicas."""
    own_bucket: bool = False
    """The tied matrix under PP: the core gives it a gradient bucket of its own, so that both copies shard
    alike.
    """


def chunk_layers(config: RunConfig, pp_rank: int, chunk: int) -> range:
    """Decoder layers of a chunk, global, from 0: chunks go round robin over the pipeline ranks."""
    pp = config.parallel.pipeline_model_parallel_size
    count = config.language.num_layers // (pp * chunks(config))
    first = (chunk * pp + pp_rank) * count
    return range(first, first + count)


def chunks(config: RunConfig) -> int:
    """Model chunks per pipeline rank."""
    return virtual_stages(config) or 1


def is_first(pp_rank: int, chunk: int) -> bool:
    """Whether the chunk embeds: it has the vision tower, the projector and the embedding."""
    return pp_rank == 0 and chunk == 0


def is_last(config: RunConfig, pp_rank: int, chunk: int) -> bool:
    """Whether the chunk computes the loss: it has the last norm and the output layer."""
    return pp_rank == config.parallel.pipeline_model_parallel_size - 1 and chunk == chunks(config) - 1


def chunk_tensors(config: RunConfig, kind: StageKind, pp_rank: int, chunk: int = 0) -> list[Tensor]:
    """The parameters of one chunk, in the model's order; `config` has the layout and the stage's overrides
    applied.
    """
    parts = trained_parts(config, kind)
    moe_layers = {
        i for i, is_moe in enumerate(config.moe.layer_pattern(config.language.num_layers)) if is_moe
    }
    layers = chunk_layers(config, pp_rank, chunk)
    expert_parallel = experts_reduced_apart(config)
    tied_apart = config.language.tie_word_embeddings and config.parallel.pipeline_model_parallel_size > 1
    found = []
    for layer, name, numel in _named(config, kind, pp_rank, chunk):
        part = part_of(name, kind, moe_layers, layers.start)
        found.append(
            Tensor(
                name,
                numel,
                part,
                trains=is_trained(part, parts),
                layer=layer,
                expert_parallel=part == "experts" and expert_parallel,
                own_bucket=tied_apart and name.endswith(("word_embeddings.weight", "output_layer.weight")),
            )
        )
    return found


def experts_reduced_apart(config: RunConfig) -> bool:
    """Whether experts are reduced over the ranks that hold the same ones, rather than like everything else
    (moe/layer.py).
    """
    p = config.parallel
    return p.expert_model_parallel_size > 1 or p.expert_tensor_parallel_size != p.tensor_model_parallel_size


def _named(config: RunConfig, kind: StageKind, pp_rank: int, chunk: int) -> Iterator[tuple[int, str, int]]:
    """(layer or −1, name, size)."""
    lm = config.language
    C, rows = lm.hidden_size, _vocabulary_rows(config)
    if is_first(pp_rank, chunk):
        yield from ((-1, f"vision_model.{n}", s) for n, s in vision_tower(config))
        yield from ((-1, f"vision_projection.encoder.{n}", s) for n, s in projector(config))
        yield -1, "language_model.embedding.word_embeddings.weight", rows * C
    for i, layer in enumerate(chunk_layers(config, pp_rank, chunk)):
        for name, size in decoder_layer(config, kind, config.moe.is_moe_layer(layer)):
            yield layer, f"language_model.decoder.layers.{i}.{name}", size
    if is_last(config, pp_rank, chunk):
        yield from (
            (-1, f"language_model.decoder.{n}", s) for n, s in _norm("final_layernorm", C, lm.normalization)
        )
        if not (lm.tie_word_embeddings and is_first(pp_rank, chunk)):
            yield -1, "language_model.output_layer.weight", rows * C
        if lm.lm_head_bias:
            yield -1, "language_model.output_layer.bias", rows


def _vocabulary_rows(config: RunConfig) -> int:
    return padded_vocab_size(config) // config.parallel.tensor_model_parallel_size


def decoder_layer(config: RunConfig, kind: StageKind, designated: bool) -> Named:
    """One layer; `designated` ones are a mixture in `route` and hold one dense FFN before."""
    lm, tp = config.language, config.parallel.tensor_model_parallel_size
    C, norm = lm.hidden_size, lm.normalization
    heads, groups, head = lm.num_attention_heads, lm.query_groups, lm.head_size
    yield from _norm("input_layernorm", C, norm)
    attention = "self_attention."
    yield f"{attention}linear_proj.weight", heads * head // tp * C
    if lm.add_bias_linear:
        yield f"{attention}linear_proj.bias", C
    yield f"{attention}linear_qkv.weight", (heads + 2 * groups) * head // tp * C
    if lm.add_bias_linear or lm.add_qkv_bias:
        yield f"{attention}linear_qkv.bias", (heads + 2 * groups) * head // tp
    if lm.qk_layernorm:
        yield from _norm(f"{attention}q_layernorm", head, norm)
        yield from _norm(f"{attention}k_layernorm", head, norm)
    if not lm.parallel_residual:
        yield from _norm("pre_mlp_layernorm", C, norm)
    if designated and kind == StageKind.ROUTE:
        yield from ((f"mlp.router.{n}", s) for n, s in router(config))
        for i in range(config.moe.num_experts // config.parallel.expert_model_parallel_size):
            expert = ffn(config, config.parallel.expert_tensor_parallel_size)
            yield from ((f"mlp.experts.local_experts.{i}.{n}", s) for n, s in expert)
    else:
        yield from ((f"mlp.{n}", s) for n, s in ffn(config, tp))


def ffn(config: RunConfig, tp: int) -> Named:
    """One FFN (dense or expert) split over `tp` ranks; gate and value are one matrix."""
    lm = config.language
    rows = lm.ffn_hidden_size * (2 if lm.gated_linear_unit else 1) // tp
    yield "linear_fc1.weight", rows * lm.hidden_size
    if lm.add_bias_linear:
        yield "linear_fc1.bias", rows
    yield "linear_fc2.weight", lm.ffn_hidden_size // tp * lm.hidden_size
    if lm.add_bias_linear:
        yield "linear_fc2.bias", lm.hidden_size


def router(config: RunConfig) -> Named:
    """Replicated on every rank."""
    moe, C = config.moe, config.language.hidden_size
    h, r = moe.dtr_hidden_size, moe.dtr_rank
    if moe.router == "linear":
        yield "weight", moe.num_experts * C
        if config.language.add_bias_linear:
            yield "bias", moe.num_experts
    elif moe.router == "modality-linear":
        yield from ((f"weight_{modality}", moe.num_experts * C) for modality in ("text", "vision"))
    else:
        yield "phi", moe.num_experts * C
        for modality in ("text", "vision"):
            sizes = {
                "weight1": h * C,
                "bias1": h,
                "weight2_down": (h + 1) * 2 * r * C,
                "weight2_up": (h + 1) * r * C,
            }
            yield from ((f"{modality}.{name}", size) for name, size in sizes.items())


def vision_tower(config: RunConfig) -> Named:
    """The tower up to the feature layer; its layers are split over TP, its embeddings are not."""
    v, tp = config.vision, config.parallel.tensor_model_parallel_size
    C, clip = v.hidden_size, v.model_type == "clip"
    if clip:
        yield "class_token", C
        yield from _norm("ln_pre", C, "LayerNorm")
    yield "conv1.weight", C * 3 * v.patch_size**2
    if not clip:
        yield "conv1.bias", C
    yield "position_embeddings.weight", ((v.image_size // v.patch_size) ** 2 + int(clip)) * C
    for i in range(v.num_layers_used):
        layer = f"decoder.layers.{i}."
        yield from _norm(f"{layer}input_layernorm", C, "LayerNorm")
        yield f"{layer}self_attention.linear_proj.weight", C * C // tp
        yield f"{layer}self_attention.linear_proj.bias", C
        yield f"{layer}self_attention.linear_qkv.weight", 3 * C * C // tp
        yield f"{layer}self_attention.linear_qkv.bias", 3 * C // tp
        yield from _norm(f"{layer}pre_mlp_layernorm", C, "LayerNorm")
        yield from ((f"{layer}mlp.{n}", s) for n, s in _two_linears(C, v.ffn_hidden_size, C, tp))


def projector(config: RunConfig) -> Named:
    """Linear, GELU, Linear, with biases."""
    return _two_linears(
        config.vision.hidden_size,
        config.language.hidden_size,
        config.language.hidden_size,
        config.parallel.tensor_model_parallel_size,
    )


def _two_linears(inputs: int, inner: int, outputs: int, tp: int) -> Named:
    yield "linear_fc1.weight", inner // tp * inputs
    yield "linear_fc1.bias", inner // tp
    yield "linear_fc2.weight", inner // tp * outputs
    yield "linear_fc2.bias", outputs


def _norm(name: str, width: int, kind: str) -> Named:
    yield f"{name}.weight", width
    if kind == "LayerNorm":
        yield f"{name}.bias", width
