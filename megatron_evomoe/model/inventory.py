"""Every tensor of the model: its name, shape, split over ranks, part, and place in the pipeline.

This is arithmetic on a `RunConfig`: no model is built, and neither torch nor megatron-core is imported. The
plan counts with it, freezing and the stage report take parts and sizes from it, and the map to Hugging
Face's files takes names and shapes from it. Which tensors there are depends on the stage kind, the
designated layers, the router, the biases, the kind of norm, tied embeddings and the type of tower;
`tests/unit/model/test_inventory.py` compares all of that with built models.

Names and order are those of `LlavaModel.named_parameters()` with local layers. Transformer Engine renames
norms and experts and changes no shape.

Shape legend: C width · F width of the FFN · V padded vocabulary · N experts · P side of a patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from megatron_evomoe.config import ConfigError, ParallelConfig, RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import is_trained, trained_parts
from megatron_evomoe.moe.router import router_tensors

Shape = tuple[int, ...]
Place = Literal["first", "layer", "last"]

_LAYERS = "language_model.decoder.layers."
_LAYER = re.compile(r"^language_model\.decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


class Tensor(NamedTuple):
    """One tensor of the whole model."""

    name: str
    """Name in `named_parameters()`, with the global numbers of layer and expert, both from 0."""
    shape: Shape
    """Shape of the whole tensor; the vocabulary is padded."""
    split: int | None
    """The dimension that is divided over TP ranks, for an expert over expert-TP ranks; None if none is."""
    part: str
    """The part of the model that the tensor is trained or frozen with, one of `config.recipe.PARTS`."""
    place: Place
    """The pipeline stage that holds the tensor: the first, that of its layer, or the last."""
    key: str
    """Name in a checkpoint. A mixture's experts share one key and are stacked along a first axis."""
    layer: int | None = None
    """The decoder layer; None for tensors outside of the layers."""
    expert: int | None = None
    """The expert of that layer, if it belongs to one; experts are divided over the EP ranks."""

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def sums_over_tp(self) -> bool:
        """Whether sequence parallelism gives each TP rank only its own positions' share of the gradient.

        Such parameters bear megatron-core's mark ``sequence_parallel``, by which the shares are summed.
        """
        return self.split is None and self.name.startswith("language_model.decoder.")

    def local_shape(self, parallel: ParallelConfig) -> Shape:
        """The shape that one rank holds."""
        if self.split is None:
            return self.shape
        over_experts = self.expert is not None
        ranks = parallel.expert_tensor_parallel_size if over_experts else parallel.tensor_model_parallel_size
        before, n, behind = self.shape[: self.split], self.shape[self.split], self.shape[self.split + 1 :]
        return (*before, n // ranks, *behind)

    def local_name(self, first_layer: int, first_expert: int = 0) -> str:
        """The name on a rank whose first layer and first expert have these global numbers."""
        if self.layer is None:
            return self.name
        name = self.name.removeprefix(f"{_LAYERS}{self.layer}.")
        if self.expert is not None and first_expert:
            name = _EXPERT.sub(f".local_experts.{self.expert - first_expert}.", name)
        return f"{_LAYERS}{self.layer - first_layer}.{name}"


class Counts(NamedTuple):
    """Elements of the whole model, each counted once whatever the layout."""

    parameters: int
    trainable: int
    active: int
    """What one token meets: of each mixture's experts only the chosen K."""


def count(config: RunConfig, kind: StageKind) -> Counts:
    """Count the model of stage `kind`, padding of the vocabulary included."""
    parts, experts, topk = trained_parts(config, kind), config.moe.num_experts, config.moe.moe_router_topk
    every = list(tensors(config, kind))
    total = sum(t.numel for t in every)
    idle = sum(t.numel for t in every if t.expert is not None) * (experts - topk) // experts
    return Counts(total, sum(t.numel for t in every if is_trained(t.part, parts)), total - idle)


def tensors(
    config: RunConfig,
    kind: str,
    layers: Iterable[int] | None = None,
    *,
    first: bool = True,
    last: bool = True,
) -> Iterator[Tensor]:
    """The tensors of a pipeline chunk, or of the whole model.

    Args:
        kind: designated layers are mixtures in `route` and hold one dense FFN in every other kind.
        layers: decoder layers of the chunk, from 0; none means all.
        first, last: whether the chunk has what stands before and behind the layers.

    Raises:
        ConfigError: no vocabulary size is set.
    """
    if first:
        yield from vision_model(config)
        yield from vision_projection(config)
    yield from language_model(config, kind, layers, first=first, last=last)


def language_model(
    config: RunConfig,
    kind: str,
    layers: Iterable[int] | None = None,
    *,
    first: bool = True,
    last: bool = True,
) -> Iterator[Tensor]:
    """Embedding, decoder layers, last norm and output layer; arguments as of `tensors`."""
    lm = config.language
    V, C = padded_vocab_size(config), lm.hidden_size
    if first:
        yield _outside("language_model.embedding.word_embeddings.weight", (V, C), 0, "first")
    templates: dict[bool, list[_Template]] = {}
    for layer in range(lm.num_layers) if layers is None else layers:
        designated = config.moe.is_moe_layer(layer)
        if designated not in templates:
            templates[designated] = list(_layer(config, kind, designated))
        yield from _placed(templates[designated], layer)
    if last:
        for norm in _norm("language_model.decoder.final_layernorm", C, lm.normalization):
            yield _outside(*norm, "last")
        if not (lm.tie_word_embeddings and first):  # a last stage of its own holds a copy of the tied matrix
            yield _outside("language_model.output_layer.weight", (V, C), 0, "last")
        if lm.lm_head_bias:
            yield _outside("language_model.output_layer.bias", (V,), 0, "last")


def decoder_layer(config: RunConfig, kind: str, layer: int) -> Iterator[Tensor]:
    """One decoder layer, counted from 0."""
    yield from _placed(_layer(config, kind, config.moe.is_moe_layer(layer)), layer)


def vision_model(config: RunConfig) -> Iterator[Tensor]:
    """The tower up to its feature layer. TP divides its layers, not its embeddings."""
    for piece in _tower(config):
        name = f"vision_model.{piece.name}"
        yield Tensor(
            name, piece.shape, piece.split, "vision", "first", _with_fused_norms(name, ffn_norm=True)
        )


def vision_projection(config: RunConfig) -> Iterator[Tensor]:
    """The projector: linear, GELU, linear, with biases."""
    C = config.language.hidden_size
    pieces = (
        *_column("encoder.linear_fc1", C, config.vision.hidden_size, bias=True),
        *_row("encoder.linear_fc2", C, C, bias=True),
    )
    for piece in pieces:
        name = f"vision_projection.{piece.name}"
        yield Tensor(name, piece.shape, piece.split, "projector", "first", name)


def part_of(name: str, config: RunConfig, kind: str, first_layer: int = 0) -> str:
    """The part that a parameter belongs to; Transformer Engine's names are understood too.

    Args:
        name: as in `LlavaModel.named_parameters()`.
        first_layer: global number of the first layer of the pipeline chunk in which it has this name.
    """
    for prefix, part in (("vision_model.", "vision"), ("vision_projection.", "projector")):
        if name.startswith(prefix):
            return part
    layer = _LAYER.match(name)
    if layer is None:
        return "language"
    return _part_in_layer(layer[2], kind, config.moe.is_moe_layer(int(layer[1]) + first_layer))


def _part_in_layer(name: str, kind: str, designated: bool) -> str:
    """`part_of` for a parameter of a decoder layer, by its name in the layer."""
    if designated and name.startswith("mlp."):
        if kind == StageKind.ROUTE:
            return "router" if name.startswith("mlp.router.") else "experts"
        if kind == StageKind.EVOLVE:
            return "first_expert"
    return "language"


def padded_vocab_size(config: RunConfig) -> int:
    """Rows of the embedding: `vocab_size` rounded up, so that all TP ranks hold the same, aligned number.

    Raises:
        ConfigError: no vocabulary size is set.
    """
    size = config.language.vocab_size
    if size is None:
        raise ConfigError("language.vocab_size is not set; set it, or data.tokenizer to take it from there")
    multiple = config.language.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size
    return -(-size // multiple) * multiple


class _Piece(NamedTuple):
    name: str
    shape: Shape
    split: int | None


def _outside(name: str, shape: Shape, split: int | None, place: Place) -> Tensor:
    """A tensor of the language model that belongs to no layer."""
    return Tensor(name, shape, split, "language", place, name)


class _Template(NamedTuple):
    """A tensor of any layer of one form; names and keys are those in the layer."""

    name: str
    shape: Shape
    split: int | None
    part: str
    key: str
    expert: int | None


def _placed(templates: Iterable[_Template], layer: int) -> Iterator[Tensor]:
    prefix = f"{_LAYERS}{layer}."
    for name, shape, split, part, key, expert in templates:
        yield Tensor(prefix + name, shape, split, part, "layer", prefix + key, layer, expert)


def _layer(config: RunConfig, kind: str, designated: bool) -> Iterator[_Template]:
    """The tensors of a decoder layer that is, or will become, a mixture, or of one that does not."""
    lm, moe = config.language, config.moe
    pieces = [*_attention(config)]
    if not lm.parallel_residual:
        pieces += _norm("pre_mlp_layernorm", lm.hidden_size, lm.normalization)
    mixture = designated and kind == StageKind.ROUTE
    if mixture:
        pieces += [_Piece(f"mlp.router.{t.name}", t.shape, None) for t in router_tensors(moe, lm)]
    else:
        pieces += [_Piece(f"mlp.{name}", shape, split) for name, shape, split in _ffn(config)]
    for name, shape, split in pieces:
        key = name if lm.parallel_residual else _with_fused_norms(name, ffn_norm=not designated)
        yield _Template(name, shape, split, _part_in_layer(name, kind, designated), key, None)
    for expert in range(moe.num_experts) if mixture else ():
        for name, shape, split in _ffn(config):
            yield _Template(
                f"mlp.experts.local_experts.{expert}.{name}",
                shape,
                split,
                "experts",
                f"mlp.experts.experts.{name}",
                expert,
            )


def _with_fused_norms(name: str, *, ffn_norm: bool) -> str:
    """A norm's name in a checkpoint: Transformer Engine's, which fuses it into the linear layer behind it."""
    key = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_") if ffn_norm else key


def _attention(config: RunConfig) -> Iterator[_Piece]:
    lm = config.language
    C, queries = lm.hidden_size, lm.num_attention_heads * lm.head_size
    rows = queries + 2 * lm.query_groups * lm.head_size
    yield from _norm("input_layernorm", C, lm.normalization)
    yield from _row("self_attention.linear_proj", C, queries, bias=lm.add_bias_linear)
    yield from _column("self_attention.linear_qkv", rows, C, bias=lm.add_bias_linear or lm.add_qkv_bias)
    if lm.qk_layernorm:
        for which in ("q", "k"):
            yield from _norm(f"self_attention.{which}_layernorm", lm.head_size, lm.normalization)


def _ffn(config: RunConfig) -> Iterator[_Piece]:
    """One FFN, dense or expert; gate and value are one matrix."""
    lm = config.language
    C, F = lm.hidden_size, lm.ffn_hidden_size
    yield from _column("linear_fc1", 2 * F if lm.gated_linear_unit else F, C, bias=lm.add_bias_linear)
    yield from _row("linear_fc2", C, F, bias=lm.add_bias_linear)


def _tower(config: RunConfig) -> Iterator[_Piece]:
    v = config.vision
    C, F, P, clip = v.hidden_size, v.ffn_hidden_size, v.patch_size, v.model_type == "clip"
    if clip:
        yield _Piece("class_token", (1, 1, C), None)
        yield from _norm("ln_pre", C, "LayerNorm")
    yield _Piece("conv1.weight", (C, 3, P, P), None)
    if not clip:
        yield _Piece("conv1.bias", (C,), None)
    yield _Piece("position_embeddings.weight", ((v.image_size // P) ** 2 + int(clip), C), None)
    for i in range(v.num_layers_used):
        layer = f"decoder.layers.{i}"
        yield from _norm(f"{layer}.input_layernorm", C, "LayerNorm")
        yield from _row(f"{layer}.self_attention.linear_proj", C, C, bias=True)
        yield from _column(f"{layer}.self_attention.linear_qkv", 3 * C, C, bias=True)
        yield from _norm(f"{layer}.pre_mlp_layernorm", C, "LayerNorm")
        yield from _column(f"{layer}.mlp.linear_fc1", F, C, bias=True)
        yield from _row(f"{layer}.mlp.linear_fc2", C, F, bias=True)


def _norm(name: str, width: int, kind: str) -> Iterator[_Piece]:
    yield _Piece(f"{name}.weight", (width,), None)
    if kind == "LayerNorm":
        yield _Piece(f"{name}.bias", (width,), None)


def _column(name: str, outputs: int, inputs: int, *, bias: bool) -> Iterator[_Piece]:
    """A linear layer that is split along its outputs."""
    yield _Piece(f"{name}.weight", (outputs, inputs), 0)
    if bias:
        yield _Piece(f"{name}.bias", (outputs,), 0)


def _row(name: str, outputs: int, inputs: int, *, bias: bool) -> Iterator[_Piece]:
    """A linear layer that is split along its inputs; its bias is added once, behind the sum over ranks."""
    yield _Piece(f"{name}.weight", (outputs, inputs), 1)
    if bias:
        yield _Piece(f"{name}.bias", (outputs,), None)
