"""Converts a Hugging Face model to a checkpoint that ``train --load`` reads under any layout.

Tensors are read and written one by one. The output directory gets

    OUTPUT/latest_checkpointed_iteration.txt
    OUTPUT/iter_0000000/…   the checkpoint
    OUTPUT/model.yaml       the model's sections of a configuration, for ``train --preset``
    OUTPUT/tokenizer/…      copied from the source
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import yaml
from torch import Tensor

from megatron_evomoe.checkpoint.record import Record
from megatron_evomoe.checkpoint.stream import CheckpointWriter
from megatron_evomoe.config import ConfigError, MoEConfig, RunConfig, from_mapping
from megatron_evomoe.config.kinds import MIXTURE_KINDS, PRETRAINED, StageKind
from megatron_evomoe.hf.dtypes import DTYPES
from megatron_evomoe.hf.from_hf import sources, tokenizer_copy
from megatron_evomoe.hf.from_hf.finite import converted
from megatron_evomoe.hf.output_directory import output_directory, require_room
from megatron_evomoe.hf.tensor_map import Entry, NameMap
from megatron_evomoe.moe import initial_draws

CONVERSIONS = {
    "keep": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    **{name: getattr(torch, name) for name in DTYPES},
}
"""Values of ``--dtype``; `keep` writes each tensor in the type in which the source stores it."""
_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(kw_only=True)
class Request:
    """An import that is asked for: the source models, the target directory and the form."""

    output: str
    model: Optional[str] = None
    language_model: Optional[str] = None
    vision_model: Optional[str] = None
    allow_remote_code: bool = False
    dtype: str = "keep"
    expert_init: Literal["none", "replicate", "noise"] = "none"
    resize_embeddings: bool = False
    """Whether to add rows to the embedding for token ids that have none."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that replace what the source says: flat name -> value."""


@dataclass
class Imported:
    """What was written."""

    output: Path
    checkpoint: Path
    config: RunConfig
    kind: str
    parts: list[str]
    tensors: int
    """Number of tensors read from the source."""
    parameters: int
    left_out: list[str]
    """Tensors of the source that LLaVA does not use."""
    tokenizer: str | None
    """Path for ``data.tokenizer``; None if there is no tokenizer that can be read."""
    notes: list[str]
    """Lines of the report about the tokenizer and about rows added to the embedding."""


def import_model(request: Request) -> Imported:
    """Write the directory `request.output`. After an error nothing is there.

    Raises:
        ConfigError: megatron-core cannot compute the model, the request contradicts itself, or the tokenizer
            has more ids than the embedding has rows.
        CheckpointError: tensors are missing, unexpected, of a wrong shape or damaged, or hold values that are
            not finite; the output is not empty; or the disk has too little room.
    """
    output = Path(request.output).expanduser()
    with output_directory(output) as pending:
        source = _open_source(request)
        tokenizer = tokenizer_copy.copy_tokenizer(source.tokenizer, pending / "tokenizer")
        notes = _fit_vocabulary(source, tokenizer, request)
        config, left_out = _checked(source, request)
        target = _target(source, config, request)
        require_room(output, target.size(target.dtypes(source, request)))
        if tokenizer.path is not None:
            path = output.absolute() / "tokenizer" / tokenizer.path
            config = replace(config, data=replace(config.data, tokenizer=str(path)))
        checkpoint = _write(pending, source, config, target, request)
        (pending / "model.yaml").write_text(model_yaml(config, target.kind, source.parts))
    return Imported(
        output=output,
        checkpoint=output / checkpoint.name,
        config=config,
        kind=target.kind,
        parts=source.parts,
        tensors=len(source.tensors),
        parameters=target.parameters,
        left_out=left_out,
        tokenizer=config.data.tokenizer if tokenizer.path is not None else None,
        notes=notes,
    )


def open_target(request: Request, config: RunConfig) -> tuple[sources.Source, Target]:
    """Open the source of a finished import again, and describe what was written; for ``--verify``."""
    source = _open_source(request)
    if "language_model" in source.parts and config.language.vocab_size:
        source.grow(config.language.vocab_size)
    _checked(source, request)
    return source, _target(source, config, request)


def _open_source(request: Request) -> sources.Source:
    return sources.open_source(
        request.model,
        request.language_model,
        request.vision_model,
        allow_remote_code=request.allow_remote_code,
    )


def _fit_vocabulary(
    source: sources.Source, tokenizer: tokenizer_copy.CopiedTokenizer, request: Request
) -> list[str]:
    """Add rows to the embedding for token ids that have none, if requested; returns report lines.

    Raises:
        ConfigError: rows are missing, and they are not requested.
    """
    if "language_model" not in source.parts:
        return []
    if tokenizer.path is None:
        return [f"no tokenizer: {tokenizer.note}; give the run one with --tokenizer"]
    notes = [f"tokenizer       {tokenizer.size} tokens{'; ' + tokenizer.note if tokenizer.note else ''}"]
    rows = source.vocabulary
    if rows is None or tokenizer.size <= rows:
        return notes
    if not request.resize_embeddings:
        raise ConfigError(
            f"the tokenizer has {tokenizer.size} tokens but the embedding has {rows} rows, so ids from "
            f"{rows} on have no embedding; import with --resize-embeddings, which adds rows that are the "
            "mean of the others"
        )
    source.grow(tokenizer.size)
    return [*notes, f"embedding       {tokenizer.size - rows} rows added to {rows}, each the mean of those"]


def _checked(source: sources.Source, request: Request) -> tuple[RunConfig, list[str]]:
    """The model's configuration, whose tensors the source is checked to have, and the unused tensors."""
    config = _config(source, request)
    left_out = sources.drop_unread(source, config.vision.num_layers_used)
    sources.require_floating(source)
    where = request.model or " and ".join(p for p in (request.language_model, request.vision_model) if p)
    NameMap(config, source.kind, source.parts, all_experts=True).check_hf(dict(sources.sizes(source)), where)
    return config, left_out


def _target(source: sources.Source, config: RunConfig, request: Request) -> Target:
    return Target(
        config, source.kind if request.expert_init == "none" else StageKind.ROUTE.value, source.parts
    )


class Target:
    """The tensors to write.

    A checkpoint of an evolving model holds all experts, and the dense FFN that it computes with, which is the
    first expert. Two tensor maps describe them.

    Attributes:
        shapes: core key -> global shape.
        entries: of the tensor maps, each once.
        parameters: number of parameters.
    """

    def __init__(self, config: RunConfig, kind: str, parts: list[str]) -> None:
        maps = [
            NameMap(config, kind, parts, all_experts=every)
            for every in ((True, False) if kind == StageKind.EVOLVE else (False,))
        ]
        self.kind, self.parts = kind, parts
        self.shapes = {key: shape for names in maps for key, shape in names.core_shapes().items()}
        self.entries = list({(e.core, e.expert): e for names in maps for e in names.entries}.values())
        self.parameters = sum(math.prod(shape) for e in self.entries for shape in e.hf.values())

    def size(self, dtypes: dict[str, torch.dtype]) -> int:
        """Bytes of all core tensors in the given dtypes, at most."""
        return sum(math.prod(shape) * dtypes[core].itemsize for core, shape in self.shapes.items())

    def dtypes(self, source: sources.Source, request: Request) -> dict[str, torch.dtype]:
        """Core key -> dtype to write.

        It is the request's dtype, or else the narrowest one that holds all of the source's tensors that make
        up the core tensor: gate and up projection may differ, and so may experts. A new router has the dtype
        of its layer's norm.
        """
        found: dict[str, torch.dtype] = {}
        for entry in self.entries:
            if dtype := CONVERSIONS[request.dtype]:
                found[entry.core] = dtype
                continue
            names = (
                [_router_like(entry)]
                if _is_fresh(entry, request)
                else [self.origin(name, source) for name in entry.hf]
            )
            types = [source.place(name).dtype for name in names]
            found[entry.core] = functools.reduce(torch.promote_types, types, found.get(entry.core, types[0]))
        return found

    @staticmethod
    def origin(name: str, source: sources.Source) -> str:
        """The name of the source's tensor that holds the values of the HF tensor `name`.

        An expert of a new mixture has the values of the dense FFN, and the dense FFN of an evolving model
        those of its first expert.
        """
        if name in source.tensors:
            return name
        dense = _EXPERT.sub(".mlp.", name)
        return dense if dense in source.tensors else name.replace(".mlp.", ".mlp.experts.0.")


def model_yaml(config: RunConfig, kind: str, parts: list[str]) -> str:
    """The sections of a configuration that describe the model, as YAML.

    `moe` is among them if there are experts. For a dense model with few layers it holds a `moe_layer_freq`,
    because the default would leave no layer to become a mixture.
    """
    described = {
        "language": "language_model" in parts,
        "vision": "vision_model" in parts,
        "moe": kind in MIXTURE_KINDS,
    }
    sections = config.to_dict()
    if (
        not described["moe"]
        and described["language"]
        and not any(MoEConfig().layer_pattern(config.language.num_layers))
    ):
        described["moe"], sections["moe"] = True, {"moe_layer_freq": config.moe.moe_layer_freq}
    return yaml.safe_dump(
        {name: sections[name] for name, is_there in described.items() if is_there}, sort_keys=False
    )


def _config(source: sources.Source, request: Request) -> RunConfig:
    """The configuration of the source, with the fields that the request replaces."""
    if request.dtype not in CONVERSIONS:
        raise ConfigError(f"dtype {request.dtype!r} is unknown; known: {', '.join(CONVERSIONS)}")
    if request.expert_init != "none" and (source.kind != PRETRAINED or "language_model" not in source.parts):
        raise ConfigError(
            f"--expert-init {request.expert_init} makes a mixture from a dense language model, but the "
            f"source is {'a mixture already' if source.kind != PRETRAINED else 'a vision tower alone'}; "
            "leave it out"
        )
    moe = {"expert_init": request.expert_init} if request.expert_init != "none" else {}
    sections = {**source.sections, "moe": {**source.sections.get("moe", {}), **moe}}
    language = sections.get("language", {})
    if (
        layers := language.get("num_layers")
    ) and layers < MoEConfig().moe_layer_freq:  # the default would leave no layer a mixture
        sections["moe"].setdefault("moe_layer_freq", layers)
    # The sequence length is checked when a run starts. Here it only must not exceed the model's limit.
    longest = language.get("max_position_embeddings")
    return from_mapping({**({"data": {"seq_length": longest}} if longest else {}), **sections}, request.flags)


def _write(
    directory: Path, source: sources.Source, config: RunConfig, target: Target, request: Request
) -> Path:
    record = Record(
        stage="imported",
        kind=target.kind,
        step=0,
        position=0,
        finished=True,
        layout={"world": 1},
        vocab_size=config.language.vocab_size or 0,
        tokenizer_fingerprint="",
        parts=target.parts,
        lineage=source.lineage,
        num_experts=config.moe.num_experts if target.kind in MIXTURE_KINDS else 0,
    )
    dtypes = target.dtypes(source, request)
    with CheckpointWriter(directory, record, config.to_yaml()) as writer:
        for entry in target.entries:
            row = 0
            for piece in _pieces(entry, source, config, request, dtypes[entry.core]):
                if entry.expert is None:
                    writer.put(entry.core, piece, shape=target.shapes[entry.core], offset=(row,))
                else:
                    writer.put(
                        entry.core, piece[None], shape=target.shapes[entry.core], offset=(entry.expert, row)
                    )
                row += len(piece)
    return writer.path


def is_drawn(entry: Entry, request: Request) -> bool:
    """Whether an entry's values are random, in whole or in part."""
    noisy = request.expert_init == "noise" and entry.expert is not None and entry.core.endswith(".weight")
    return noisy or _is_fresh(entry, request)


def _is_fresh(entry: Entry, request: Request) -> bool:
    """Whether an entry belongs to a new router, which the source does not have."""
    return request.expert_init != "none" and ".mlp.router." in entry.core


def _layer_of(entry: Entry) -> int:
    """The number of the layer that an entry belongs to, from 0."""
    found = _LAYER.search(entry.core)
    assert found is not None, entry.core
    return int(found[1])


def _router_like(entry: Entry) -> str:
    """The source's tensor whose dtype a new router takes."""
    return f"language_model.model.layers.{_layer_of(entry)}.input_layernorm.weight"


def _pieces(
    entry: Entry, source: sources.Source, config: RunConfig, request: Request, dtype: torch.dtype
) -> list[Tensor]:
    """The core tensor of an entry in `dtype`, as pieces along its first axis. All values are finite."""
    if _is_fresh(entry, request):
        layer, name = _layer_of(entry), entry.core.split(".mlp.router.")[1]
        return [converted(entry.core, initial_draws.router_weights(config, layer + 1)[name], dtype)]
    origins = {name: Target.origin(name, source) for name in entry.hf}
    if not is_drawn(entry, request):
        return entry.to_core(
            {name: converted(source.describe(o), source.read(o), dtype) for name, o in origins.items()}
        )
    own = functools.reduce(torch.promote_types, (source.place(o).dtype for o in origins.values()))
    pieces = entry.to_core(
        {name: converted(source.describe(o), source.read(o), own) for name, o in origins.items()}
    )
    noisy = _with_noise(torch.cat(pieces), entry, len(pieces), config)
    return [converted(f"{' and '.join(map(source.describe, origins.values()))} with noise", noisy, dtype)]


def _with_noise(weight: Tensor, entry: Entry, gates: int, config: RunConfig) -> Tensor:
    """Add to `weight` the same noise that `expert_init.add_noise` adds to a model in memory."""
    layer, which = _layer_of(entry) + 1, 1 if ".linear_fc1." in entry.core else 2
    assert entry.expert is not None, "noise is for experts"
    noise = initial_draws.expert_noise(
        config.train.seed, layer, entry.expert, which, (gates, len(weight) // gates, weight.shape[1])
    )
    scale = config.moe.expert_init_noise * initial_draws.std_of(initial_draws.moments(weight))
    return noise.reshape(weight.shape).mul_(scale).add_(weight).to(weight.dtype)
