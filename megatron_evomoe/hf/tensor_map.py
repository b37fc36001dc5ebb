"""The one map between a checkpoint's tensors and a Hugging Face directory's, for both directions.

An `Entry` pairs one tensor of a `torch_dist` checkpoint (or one expert of a tensor that stacks them) with the
HF tensors that hold the same numbers, and knows how the numbers are arranged in both. A `NameMap` is the list
of all entries of one model; it says what either side must hold, so that a missing, surplus or misshapen
tensor is named before anything is written.

HF names are those of transformers 4.x LLaVA files (``language_model.model.…``,
``vision_tower.vision_model.…``, ``multi_modal_projector.…``); `hf/from_hf/canonical_names.py` brings other
names to them. Dtypes do not matter here.

Shape legend: C width, F FFN width, V vocabulary, H heads, G key/value groups, D head size, N experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import ConfigError, RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import MODULES

"""Top-level parts of a checkpoint."""

Shape = tuple[int, ...]
_NO_WEIGHT = re.compile(r"^(optimizer|rng)\.|\._extra_state(/|$)")
EVOLVING = re.compile(r"\.mlp\.(experts|evolution)\.")
"""Keys that an evolving model holds beside the dense one it computes with."""
_EVOLVING_STATE = re.compile(
    r"\.mlp\.(linear_fc[12]\.(weight|bias)$|evolution\.)"
)  # the first expert is there twice


class Arrangement(Protocol):
    """How the numbers of one core tensor are arranged in HF's tensors."""

    def split(self, core: Tensor) -> list[Tensor]:
        """Core tensor to HF tensors, in the entry's order; views where possible."""

    def join(self, hf: list[Tensor]) -> list[Tensor]:
        """HF tensors to pieces that, one after the other along axis 0, are the core tensor; views where
        possible.
        """


@dataclass(frozen=True)
class Same:
    """One tensor each, of the same shape but for axes of size 1."""

    core_shape: Shape
    hf_shape: Shape

    def split(self, core: Tensor) -> list[Tensor]:
        return [core.reshape(self.hf_shape)]

    def join(self, hf: list[Tensor]) -> list[Tensor]:
        return [hf[0].reshape(self.core_shape)]


@dataclass(frozen=True)
class Rows:
    """HF's tensors below each other (gate above up)."""

    def split(self, core: Tensor) -> list[Tensor]:
        return list(core.chunk(2))

    def join(self, hf: list[Tensor]) -> list[Tensor]:
        return hf


@dataclass(frozen=True)
class Qkv:
    """HF's q, k, v; the core's rows go by key/value group: its queries, its key, its value."""

    groups: int
    queries: int
    """Rows of the queries of one group, H/G·D."""
    head: int

    def split(self, core: Tensor) -> list[Tensor]:
        by_group = core.reshape(self.groups, self.queries + 2 * self.head, *core.shape[1:])
        parts = by_group.split([self.queries, self.head, self.head], dim=1)
        return [p.reshape(-1, *core.shape[1:]) for p in parts]

    def join(self, hf: list[Tensor]) -> list[Tensor]:
        by_group = [p.reshape(self.groups, -1, *p.shape[1:]) for p in hf]
        return [torch.cat(by_group, dim=1).reshape(-1, *hf[0].shape[1:])]


@dataclass(frozen=True)
class Vocabulary:
    """HF holds the true vocabulary; the core's rows are padded with zeros, how far depends on the layout that
    saved.
    """

    rows: int
    padded: int

    def split(self, core: Tensor) -> list[Tensor]:
        return [core[: self.rows]]

    def join(self, hf: list[Tensor]) -> list[Tensor]:
        padding = hf[0].new_zeros(self.padded - self.rows, *hf[0].shape[1:])
        return [hf[0], padding] if len(padding) else [hf[0]]


@dataclass(frozen=True)
class Entry:
    """One core tensor, or one expert of one, and the HF tensors of the same numbers."""

    core: str
    """Key in the checkpoint."""
    shape: Shape
    """Of the core tensor, without the expert axis; for `Vocabulary` as padded on one rank."""
    hf: dict[str, Shape]
    """HF key -> shape, in the order of `arrangement`."""
    arrangement: Arrangement
    expert: int | None = None
    """Place on the core tensor's leading axis; none where it has no expert axis."""

    def to_hf(self, core: Tensor) -> dict[str, Tensor]:
        """The HF tensors of a core tensor of `shape` (a vocabulary may have any number of padding rows)."""
        if core.shape[1:] != self.shape[1:] or (
            len(core) != self.shape[0] and not isinstance(self.arrangement, Vocabulary)
        ):
            raise CheckpointError(f"{self.core} has shape {tuple(core.shape)}, {self.shape} is expected")
        return dict(zip(self.hf, self.arrangement.split(core), strict=True))

    def to_core(self, hf: Mapping[str, Tensor]) -> list[Tensor]:
        """Pieces that, one after the other along axis 0, are the core tensor."""
        for name, shape in self.hf.items():
            if tuple(hf[name].shape) != shape:
                raise CheckpointError(f"{name} has shape {tuple(hf[name].shape)}, {shape} is expected")
        return self.arrangement.join([hf[name] for name in self.hf])


class NameMap:
    """All tensors of one model, in the order in which they are read and written.

    Args:
        config: resolved for its stage; the sections `language`, `vision` and `moe` are read.
        kind: stage kind, or `pretrained`: designated layers are mixtures for `route` and dense FFNs for
            everything else (an `evolve` checkpoint's experts are left aside; it computes with its first one,
            the dense FFN).
        parts: of `MODULES`, those the checkpoint has.
        all_experts: of an `evolve` checkpoint map all experts rather than the dense FFN, which is the first
            of them.

    Raises:
        ConfigError: no vocabulary size is set.
    """

    def __init__(
        self, config: RunConfig, kind: str, parts: Sequence[str] = MODULES, *, all_experts: bool = False
    ) -> None:
        self.kind, self.parts = kind, tuple(parts)
        evolved = kind == StageKind.EVOLVE and all_experts
        self._aside = _EVOLVING_STATE if evolved else EVOLVING if kind == StageKind.EVOLVE else None
        makers: dict[str, Callable[[], Iterator[Entry]]] = {
            "vision_model": lambda: _vision(config),
            "vision_projection": lambda: _projector(config),
            "language_model": lambda: _language(
                config, mixtures=kind == StageKind.ROUTE or evolved, routed=kind == StageKind.ROUTE
            ),
        }
        self.num_experts = config.moe.num_experts
        self.entries = [entry for part in MODULES if part in self.parts for entry in makers[part]()]
        self._dense = {e.core for e in self.entries if e.expert is None}
        self._flexible = {
            e.core: e.arrangement.rows for e in self.entries if isinstance(e.arrangement, Vocabulary)
        }

    def core_shapes(self) -> dict[str, Shape]:
        """Core key -> global shape, expert axis included."""
        return {e.core: e.shape if e.expert is None else (self.num_experts, *e.shape) for e in self.entries}

    def hf_shapes(self) -> dict[str, Shape]:
        """HF key -> shape."""
        return {name: shape for e in self.entries for name, shape in e.hf.items()}

    def is_weight(self, key: str) -> bool:
        """Whether a checkpoint's key belongs to the model an export shows, rather than to training
        (optimizer, generators, FP8 history, experts still evolving) or to a part that was not asked for.
        """
        if _NO_WEIGHT.search(key) or (self._aside and self._aside.search(key) and key not in self._dense):
            return False
        part = key.split(".")[0]
        return part in self.parts or part not in MODULES

    def check_core(self, found: Mapping[str, Sequence[int]], where: object) -> None:
        """Compare a checkpoint's keys and global shapes with the map.

        Raises:
            CheckpointError: something is missing, surplus or of another shape; the message names all of it.
        """
        weights = {k: tuple(s) for k, s in found.items() if self.is_weight(k)}
        wanted = self.core_shapes()
        for key, rows in self._flexible.items():  # any padding will do
            if key in weights and weights[key][:1] >= (rows,):
                wanted[key] = (weights[key][0], *wanted[key][1:])
        _compare(weights, wanted, f"checkpoint {where}")

    def check_hf(self, found: Mapping[str, Sequence[int]], where: object) -> None:
        """As `check_core`, for HF keys by their canonical names."""
        _compare({k: tuple(s) for k, s in found.items()}, self.hf_shapes(), str(where))


def _compare(found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str) -> None:
    problems = [f"{key} is missing" for key in wanted if key not in found]
    problems += [f"{key} is there and this model has no such tensor" for key in found if key not in wanted]
    problems += [
        f"{key} has shape {found[key]}, the configuration says {shape}"
        for key, shape in wanted.items()
        if key in found and found[key] != shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{where} does not hold the model that its configuration describes: {shown}")


def _vision(config: RunConfig) -> Iterator[Entry]:
    vision = config.vision
    ours, theirs = "vision_model", "vision_tower.vision_model"
    C, F, P = vision.hidden_size, vision.ffn_hidden_size, vision.patch_size
    clip = vision.model_type == "clip"
    positions = (vision.image_size // P) ** 2 + int(clip)
    heads = vision.num_attention_heads
    if clip:
        yield _same(f"{ours}.class_token", (1, 1, C), f"{theirs}.embeddings.class_embedding", (C,))
        yield from _norm(f"{ours}.ln_pre.", f"{theirs}.pre_layrnorm", C, bias=True)
    yield _same(f"{ours}.conv1.weight", (C, 3, P, P), f"{theirs}.embeddings.patch_embedding.weight")
    if not clip:
        yield _same(f"{ours}.conv1.bias", (C,), f"{theirs}.embeddings.patch_embedding.bias")
    yield _same(
        f"{ours}.position_embeddings.weight", (positions, C), f"{theirs}.embeddings.position_embedding.weight"
    )
    for i in range(vision.num_layers_used):
        our, their = f"{ours}.decoder.layers.{i}", f"{theirs}.encoder.layers.{i}"
        yield from _norm(f"{our}.self_attention.linear_qkv.layer_norm_", f"{their}.layer_norm1", C, bias=True)
        yield from _qkv(
            f"{our}.self_attention.linear_qkv",
            f"{their}.self_attn",
            C,
            heads,
            C // heads,
            C // heads,
            bias=True,
        )
        yield from _linear(
            f"{our}.self_attention.linear_proj", f"{their}.self_attn.out_proj", (C, C), bias=True
        )
        yield from _norm(f"{our}.mlp.linear_fc1.layer_norm_", f"{their}.layer_norm2", C, bias=True)
        yield from _linear(f"{our}.mlp.linear_fc1", f"{their}.mlp.fc1", (F, C), bias=True)
        yield from _linear(f"{our}.mlp.linear_fc2", f"{their}.mlp.fc2", (C, F), bias=True)


def _projector(config: RunConfig) -> Iterator[Entry]:
    C, Cv = config.language.hidden_size, config.vision.hidden_size
    for i, columns in ((1, Cv), (2, C)):
        yield from _linear(
            f"vision_projection.encoder.linear_fc{i}",
            f"multi_modal_projector.linear_{i}",
            (C, columns),
            bias=True,
        )


def _language(config: RunConfig, *, mixtures: bool, routed: bool) -> Iterator[Entry]:
    lm = config.language
    if lm.vocab_size is None:
        raise ConfigError("language.vocab_size is not set; set it to the true size of the vocabulary")
    ours, theirs, C = "language_model", "language_model.model", lm.hidden_size
    norm_bias = lm.normalization == "LayerNorm"
    yield _vocabulary(f"{ours}.embedding.word_embeddings.weight", f"{theirs}.embed_tokens.weight", config, C)
    for i in range(lm.num_layers):
        yield from _decoder_layer(config, i, mixtures, routed)
    yield from _norm(
        f"{ours}.decoder.final_layernorm.",
        f"{theirs}.{'final_layernorm' if lm.parallel_residual else 'norm'}",
        C,
        bias=norm_bias,
    )
    if not lm.tie_word_embeddings:
        yield _vocabulary(f"{ours}.output_layer.weight", "language_model.lm_head.weight", config, C)
    if lm.lm_head_bias:
        yield _vocabulary(f"{ours}.output_layer.bias", "language_model.lm_head.bias", config)


def _decoder_layer(config: RunConfig, i: int, mixtures: bool, routed: bool) -> Iterator[Entry]:
    lm, designated = config.language, config.moe.is_moe_layer(i)
    our, their, C = f"language_model.decoder.layers.{i}", f"language_model.model.layers.{i}", lm.hidden_size
    norm_bias, fused = lm.normalization == "LayerNorm", not lm.parallel_residual
    groups = lm.query_groups
    head = lm.head_size
    norm = "self_attention.linear_qkv.layer_norm_" if fused else "input_layernorm."
    yield from _norm(f"{our}.{norm}", f"{their}.input_layernorm", C, bias=norm_bias)
    yield from _qkv(
        f"{our}.self_attention.linear_qkv",
        f"{their}.self_attn",
        C,
        groups,
        head * lm.num_attention_heads // groups,
        head,
        bias=lm.add_qkv_bias or lm.add_bias_linear,
    )
    yield from _linear(
        f"{our}.self_attention.linear_proj",
        f"{their}.self_attn.{'o_proj' if fused else 'dense'}",
        (C, head * lm.num_attention_heads),
        bias=lm.add_bias_linear,
    )
    if lm.qk_layernorm:
        for x in "qk":
            yield from _norm(
                f"{our}.self_attention.{x}_layernorm.", f"{their}.self_attn.{x}_norm", head, bias=norm_bias
            )
    if fused:
        norm = "pre_mlp_layernorm." if designated else "mlp.linear_fc1.layer_norm_"
        yield from _norm(f"{our}.{norm}", f"{their}.post_attention_layernorm", C, bias=norm_bias)
    if mixtures and designated:
        if routed:
            yield from _router(config, f"{our}.mlp.router", f"{their}.mlp.router")
        for expert in range(config.moe.num_experts):
            yield from _ffn(config, f"{our}.mlp.experts.experts", f"{their}.mlp.experts.{expert}", expert)
    else:
        yield from _ffn(config, f"{our}.mlp", f"{their}.mlp")


def _ffn(config: RunConfig, our: str, their: str, expert: int | None = None) -> Iterator[Entry]:
    lm = config.language
    C, F, biased = lm.hidden_size, lm.ffn_hidden_size, lm.add_bias_linear
    if not lm.gated_linear_unit:
        yield from _linear(f"{our}.linear_fc1", f"{their}.fc1", (F, C), bias=biased, expert=expert)
        yield from _linear(f"{our}.linear_fc2", f"{their}.fc2", (C, F), bias=biased, expert=expert)
        return
    for kind, shape in (("weight", (F, C)), *((("bias", (F,)),) if biased else ())):
        names = {f"{their}.{x}_proj.{kind}": shape for x in ("gate", "up")}
        yield Entry(f"{our}.linear_fc1.{kind}", (2 * F, *shape[1:]), names, Rows(), expert)
    yield from _linear(f"{our}.linear_fc2", f"{their}.down_proj", (C, F), bias=biased, expert=expert)


def _router(config: RunConfig, our: str, their: str) -> Iterator[Entry]:
    moe, C = config.moe, config.language.hidden_size
    N, h, r = moe.num_experts, moe.dtr_hidden_size, moe.dtr_rank
    if moe.router == "linear":
        # the core's router, which has a bias where all linear layers have one
        yield from _linear(our, their, (N, C), bias=config.language.add_bias_linear)
    elif moe.router == "modality-linear":
        for modality in ("text", "vision"):
            yield _same(f"{our}.weight_{modality}", (N, C), f"{their}.{modality}.weight")
    else:
        yield _same(f"{our}.phi", (N, C), f"{their}.phi.weight")
        hyper = {
            "weight1": (h, C),
            "bias1": (h,),
            "weight2_down": (h + 1, 2 * r, C),
            "weight2_up": (h + 1, r, C),
        }
        for modality in ("text", "vision"):
            for name, shape in hyper.items():
                yield _same(f"{our}.{modality}.{name}", shape, f"{their}.{modality}.{name}")


def _same(
    ours: str, shape: Shape, theirs: str, their_shape: Shape | None = None, expert: int | None = None
) -> Entry:
    their_shape = their_shape or shape
    return Entry(ours, shape, {theirs: their_shape}, Same(shape, their_shape), expert)


def _norm(our_prefix: str, theirs: str, width: int, *, bias: bool) -> Iterator[Entry]:
    for kind in ("weight", "bias") if bias else ("weight",):
        yield _same(f"{our_prefix}{kind}", (width,), f"{theirs}.{kind}")


def _linear(
    ours: str, theirs: str, shape: Shape, *, bias: bool, expert: int | None = None
) -> Iterator[Entry]:
    yield _same(f"{ours}.weight", shape, f"{theirs}.weight", expert=expert)
    if bias:
        yield _same(f"{ours}.bias", shape[:1], f"{theirs}.bias", expert=expert)


def _qkv(
    ours: str, theirs: str, columns: int, groups: int, queries: int, head: int, *, bias: bool
) -> Iterator[Entry]:
    """`queries`: rows of one group's queries."""
    arrangement = Qkv(groups, queries, head)
    for kind, rest in (("weight", (columns,)), *((("bias", ()),) if bias else ())):
        rows = {"q": groups * queries, "k": groups * head, "v": groups * head}
        yield Entry(
            f"{ours}.{kind}",
            (sum(rows.values()), *rest),
            {f"{theirs}.{x}_proj.{kind}": (n, *rest) for x, n in rows.items()},
            arrangement,
        )


def _vocabulary(ours: str, theirs: str, config: RunConfig, *rest: int) -> Entry:
    rows, multiple = config.language.vocab_size, config.language.make_vocab_size_divisible_by
    assert rows is not None
    padded = -(-rows // multiple) * multiple
    return Entry(ours, (padded, *rest), {theirs: (rows, *rest)}, Vocabulary(rows, padded))
