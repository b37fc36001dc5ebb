"""Maps a checkpoint's tensors to those of a Hugging Face directory, for exports and imports.

An `Entry` pairs one tensor of a `torch_dist` checkpoint (or one expert of a tensor that stacks experts)
with the HF tensors that hold the same numbers, and knows how the numbers are arranged on both sides. A
`NameMap` has all entries of one model. It states what either side must hold, so that a missing, surplus or
misshapen tensor is named before anything is written. The checkpoint's keys and shapes come from the
inventory (`model/inventory.py`).

HF names are those of LLaVA files of transformers 4.x (``language_model.model.…``,
``vision_tower.vision_model.…``, ``multi_modal_projector.…``); `hf/from_hf/canonical_names.py` renames
others to these. Dtypes do not matter here.

Shape legend: H heads · G key/value groups · D head size · N experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import ParallelConfig, RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import MODULES
from megatron_evomoe.model import inventory
from megatron_evomoe.moe.router import router_tensors

Shape = tuple[int, ...]
_NO_WEIGHT = re.compile(r"^(optimizer|rng)\.|\._extra_state(/|$)")
EVOLVING = re.compile(r"\.mlp\.(experts|evolution)\.")
"""Keys that an evolving model holds beside those of the dense model with which it computes."""
_EVOLVING_STATE = re.compile(r"\.mlp\.(linear_fc[12]\.(weight|bias)$|evolution\.)")
"""Keys of an evolving model to leave aside if all its experts are mapped; its first expert is there twice."""


class Arrangement(Protocol):
    """How the numbers of one core tensor are arranged in HF's tensors."""

    def split(self, core: Tensor) -> list[Tensor]:
        """HF tensors of a core tensor, in the entry's order; views if possible."""

    def join(self, hf: list[Tensor]) -> list[Tensor]:
        """Pieces of the core tensor, to be joined along axis 0, from HF tensors; views if possible."""


@dataclass(frozen=True)
class Same:
    """One tensor on either side; their shapes differ at most in axes of size 1."""

    core_shape: Shape
    hf_shape: Shape

    def split(self, core: Tensor) -> list[Tensor]:
        return [core.reshape(self.hf_shape)]

    def join(self, hf: list[Tensor]) -> list[Tensor]:
        return [hf[0].reshape(self.core_shape)]


@dataclass(frozen=True)
class Rows:
    """HF's two tensors one above the other, gate above up."""

    def split(self, core: Tensor) -> list[Tensor]:
        return list(core.chunk(2))

    def join(self, hf: list[Tensor]) -> list[Tensor]:
        return hf


@dataclass(frozen=True)
class Qkv:
    """HF's q, k and v; the core's rows are ordered by key/value group: its queries, its key, its value."""

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
    """HF holds the true vocabulary; the core's rows are padded with zeros, as the saving layout needed."""

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
    """Shape of the core tensor without the expert axis; a vocabulary is padded as for one rank."""
    hf: dict[str, Shape]
    """HF key -> shape, in the order of `arrangement`."""
    arrangement: Arrangement
    expert: int | None = None
    """Place on the core tensor's first axis; None if it has no expert axis."""

    def to_hf(self, core: Tensor) -> dict[str, Tensor]:
        """The HF tensors of a core tensor of `shape`; a vocabulary may have any number of padding rows.

        Raises:
            CheckpointError: the tensor has another shape.
        """
        if core.shape[1:] != self.shape[1:] or (
            len(core) != self.shape[0] and not isinstance(self.arrangement, Vocabulary)
        ):
            raise CheckpointError(f"{self.core} has shape {tuple(core.shape)}, {self.shape} is expected")
        return dict(zip(self.hf, self.arrangement.split(core), strict=True))

    def to_core(self, hf: Mapping[str, Tensor]) -> list[Tensor]:
        """Pieces of the core tensor, to be joined along axis 0.

        Raises:
            CheckpointError: an HF tensor has another shape.
        """
        for name, shape in self.hf.items():
            if tuple(hf[name].shape) != shape:
                raise CheckpointError(f"{name} has shape {tuple(hf[name].shape)}, {shape} is expected")
        return self.arrangement.join([hf[name] for name in self.hf])


class NameMap:
    """All entries of one model, in the order in which they are read and written.

    Args:
        config: resolved for its stage; the sections `language`, `vision` and `moe` are read.
        kind: stage kind, or `pretrained`. Designated layers are mixtures in `route` and dense FFNs in all
            other kinds; of an `evolve` checkpoint the dense FFN is its first expert, with which it
            computes.
        parts: those of `MODULES` that the checkpoint has.
        all_experts: whether to map all experts of an `evolve` checkpoint, and not the dense FFN.

    Raises:
        ConfigError: no vocabulary size is set.
    """

    def __init__(
        self, config: RunConfig, kind: str, parts: Sequence[str] = MODULES, *, all_experts: bool = False
    ) -> None:
        self.kind, self.parts = kind, tuple(parts)
        evolved = kind == StageKind.EVOLVE and all_experts
        self._aside = _EVOLVING_STATE if evolved else EVOLVING if kind == StageKind.EVOLVE else None
        config = replace(config, parallel=ParallelConfig())  # the vocabulary is padded as for one rank
        makers: dict[str, Callable[[], Iterator[Entry]]] = {
            "vision_model": lambda: _vision_model(config),
            "vision_projection": lambda: _vision_projection(config),
            "language_model": lambda: _all_experts(config) if evolved else _language_model(config, kind),
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
        """Whether a checkpoint's key belongs to the mapped model.

        Others belong to training (optimizer, generators, FP8 history, evolving experts) or to other parts.
        """
        if _NO_WEIGHT.search(key) or (self._aside and self._aside.search(key) and key not in self._dense):
            return False
        part = key.split(".")[0]
        return part in self.parts or part not in MODULES

    def check_core(self, found: Mapping[str, Sequence[int]], where: object) -> None:
        """Compare a checkpoint's keys and global shapes with the map.

        Raises:
            CheckpointError: tensors are missing, surplus or of another shape; the message names them.
        """
        weights = {k: tuple(s) for k, s in found.items() if self.is_weight(k)}
        wanted = self.core_shapes()
        for key, rows in self._flexible.items():  # any padding is accepted
            if key in weights and weights[key][:1] >= (rows,):
                wanted[key] = (weights[key][0], *wanted[key][1:])
        _compare(weights, wanted, f"checkpoint {where}")

    def check_hf(self, found: Mapping[str, Sequence[int]], where: object) -> None:
        """Compare HF keys, by their canonical names, and shapes with the map; raises as `check_core`."""
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


def _vocabulary(config: RunConfig, tensor: inventory.Tensor, name: str) -> Entry:
    """HF's tensor has no padding rows."""
    rows, padded = config.language.vocab_size, tensor.shape[0]
    assert rows is not None, "the vocabulary's size is known once a model is described"
    return Entry(tensor.key, tensor.shape, {name: (rows, *tensor.shape[1:])}, Vocabulary(rows, padded))


def _qkv(tensor: inventory.Tensor, module: str, heads: int, groups: int, head: int) -> Entry:
    leaf, rest = tensor.name.rpartition(".")[2], tensor.shape[1:]
    rows = {"q": heads * head, "k": groups * head, "v": groups * head}
    names = {f"{module}.{x}_proj.{leaf}": (n, *rest) for x, n in rows.items()}
    return Entry(tensor.key, tensor.shape, names, Qkv(groups, heads // groups * head, head))


def _gate_and_up(tensor: inventory.Tensor, module: str) -> Entry:
    leaf, half = tensor.name.rpartition(".")[2], (tensor.shape[0] // 2, *tensor.shape[1:])
    names = {f"{module}.{x}_proj.{leaf}": half for x in ("gate", "up")}
    return Entry(tensor.key, tensor.shape, names, Rows(), tensor.expert)


def _same(tensor: inventory.Tensor, name: str, shape: Shape | None = None) -> Entry:
    """One HF tensor; its shape is the core's unless it is given."""
    shape = shape or tensor.shape
    return Entry(tensor.key, tensor.shape, {name: shape}, Same(tensor.shape, shape), tensor.expert)


def _attention_order(tensors: Iterable[inventory.Tensor]) -> Iterator[inventory.Tensor]:
    """Queries, keys and values before the output projection, as files of this package have always been."""
    waiting: list[inventory.Tensor] = []
    for tensor in tensors:
        if ".linear_proj." in tensor.name:
            waiting.append(tensor)
            continue
        if waiting and ".linear_qkv." not in tensor.name:
            yield from waiting
            waiting = []
        yield tensor


_TOWER = {
    "class_token": "embeddings.class_embedding",
    "ln_pre": "pre_layrnorm",
    "conv1": "embeddings.patch_embedding",
    "position_embeddings": "embeddings.position_embedding",
    "input_layernorm": "layer_norm1",
    "self_attention.linear_qkv": "self_attn",
    "self_attention.linear_proj": "self_attn.out_proj",
    "pre_mlp_layernorm": "layer_norm2",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
}
"""The tower's modules, below the model or below one layer: ours -> transformers'."""

_DECODER = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv": "self_attn",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "pre_mlp_layernorm": "post_attention_layernorm",
}
"""As `_TOWER`, for a decoder layer outside its FFN. Phi calls the output projection otherwise."""

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def _vision_model(config: RunConfig) -> Iterator[Entry]:
    vision = config.vision
    heads, head = vision.num_attention_heads, vision.hidden_size // vision.num_attention_heads
    for tensor in _attention_order(inventory.vision_model(config)):
        name = tensor.name.removeprefix("vision_model.")
        layer = _LAYER.match(name)
        module, leaf = _module_and_leaf(name[layer.end() :] if layer else name)
        their = f"vision_tower.vision_model.{f'encoder.layers.{layer[1]}.' if layer else ''}{_TOWER[module]}"
        if module == "self_attention.linear_qkv":
            yield _qkv(tensor, their, heads, heads, head)
        elif module == "class_token":
            yield _same(tensor, their, tensor.shape[-1:])
        else:
            yield _same(tensor, f"{their}.{leaf}")


def _vision_projection(config: RunConfig) -> Iterator[Entry]:
    for tensor in inventory.vision_projection(config):
        yield _same(
            tensor,
            tensor.name.replace("vision_projection.encoder.linear_fc", "multi_modal_projector.linear_"),
        )


def _language_model(config: RunConfig, kind: str) -> Iterator[Entry]:
    norm = "final_layernorm" if config.language.parallel_residual else "norm"
    for tensor in _attention_order(inventory.language_model(config, kind)):
        name = tensor.name.removeprefix("language_model.")
        module, leaf = _module_and_leaf(name)
        if tensor.layer is not None:
            yield _decoder_layer(config, tensor, _LAYER.sub("", name))
        elif module == "embedding.word_embeddings":
            yield _vocabulary(config, tensor, f"language_model.model.embed_tokens.{leaf}")
        elif module == "output_layer":
            yield _vocabulary(config, tensor, f"language_model.lm_head.{leaf}")
        else:
            yield _same(tensor, f"language_model.model.{norm}.{leaf}")


def _all_experts(config: RunConfig) -> Iterator[Entry]:
    """An evolving model's language model with all of its experts: a mixture that has no router yet."""
    return (e for e in _language_model(config, StageKind.ROUTE) if ".mlp.router." not in e.core)


def _decoder_layer(config: RunConfig, tensor: inventory.Tensor, name: str) -> Entry:
    """`name` is the tensor's below its layer."""
    lm, their = config.language, f"language_model.model.layers.{tensor.layer}"
    module, leaf = _module_and_leaf(name)
    if tensor.part == "router":
        exported = {t.name: t.exported for t in router_tensors(config.moe, lm)}
        return _same(tensor, f"{their}.mlp.router.{exported[name.removeprefix('mlp.router.')]}")
    if module == "self_attention.linear_qkv":
        return _qkv(tensor, f"{their}.self_attn", lm.num_attention_heads, lm.query_groups, lm.head_size)
    if module in _DECODER:
        dense = lm.parallel_residual and module == "self_attention.linear_proj"
        return _same(tensor, f"{their}.{'self_attn.dense' if dense else _DECODER[module]}.{leaf}")
    ffn = f"{their}.mlp" if tensor.expert is None else f"{their}.mlp.experts.{tensor.expert}"
    if module.endswith("linear_fc1"):
        return _gate_and_up(tensor, ffn) if lm.gated_linear_unit else _same(tensor, f"{ffn}.fc1.{leaf}")
    return _same(tensor, f"{ffn}.{'down_proj' if lm.gated_linear_unit else 'fc2'}.{leaf}")


def _module_and_leaf(name: str) -> tuple[str, str]:
    """A parameter's module and its own name in it; a parameter of the model itself counts as a module."""
    module, _, leaf = name.rpartition(".")
    return module or leaf, leaf
