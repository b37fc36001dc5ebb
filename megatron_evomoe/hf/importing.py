"""A Hugging Face model to a checkpoint that `train --load` takes under any layout, tensor by tensor.

    OUTPUT/latest_checkpointed_iteration.txt
    OUTPUT/iter_0000000/…           the checkpoint
    OUTPUT/model.yaml               its sections of a run's configuration: train --preset OUTPUT/model.yaml --load OUTPUT
    OUTPUT/tokenizer/…              copied from the source

All of it is written beside OUTPUT and renamed at the end.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import yaml
from torch import Tensor

from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.checkpoint.stream import CheckpointWriter
from megatron_evomoe.config import ConfigError, RunConfig, from_mapping
from megatron_evomoe.hf import sources
from megatron_evomoe.hf.names import Entry, NameMap
from megatron_evomoe.moe import fresh

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json")
_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(kw_only=True)
class Request:
    """What to import, and into what."""

    output: str
    model: Optional[str] = None
    language_model: Optional[str] = None
    vision_model: Optional[str] = None
    allow_remote_code: bool = False
    dtype: str = "keep"
    expert_init: Literal["none", "replicate", "noise"] = "none"
    flags: dict[str, Any] = field(default_factory=dict)
    """Fields of our configuration over what the source says, as flat names."""


@dataclass
class Imported:
    """What was written."""

    output: Path
    checkpoint: Path
    config: RunConfig
    kind: str
    parts: list[str]
    tensors: int
    """HF tensors read."""
    parameters: int
    left_out: list[str]
    """Tensors of the source that LLaVA does not compute with."""
    tokenizer: Path | None


def import_model(request: Request) -> Imported:
    """Convert; nothing is at `request.output` unless all went well.

    Raises:
        ConfigError: the source cannot be expressed, or the request contradicts itself.
        CheckpointError: missing, surplus, misshapen or damaged tensors; the output is not empty; no room on the disk.
    """
    output = Path(request.output).expanduser()
    _require_empty(output)
    source = sources.open_source(request.model, request.language_model, request.vision_model,
                                 allow_remote_code=request.allow_remote_code)
    config = _config(source, request)
    left_out = sources.drop_unread(source, config.vision.num_layers_used)
    sources.require_floating(source)
    where = request.model or " and ".join(p for p in (request.language_model, request.vision_model) if p)
    there = NameMap(config, source.kind, source.parts)
    there.check_hf(dict(sources.sizes(source)), where)
    kind = source.kind if request.expert_init == "none" else "route"
    target = NameMap(config, kind, source.parts)
    dtype = DTYPES[request.dtype]
    _require_room(output, target, source, dtype)
    pending = output.with_name(f".{output.name}.importing-{os.getpid()}")
    try:
        checkpoint = _write(pending, source, config, target, request, dtype)
        tokenizer = _copy_tokenizer(source.tokenizer, pending / "tokenizer")
        (pending / "model.yaml").write_text(model_yaml(config, kind, source.parts))
        if output.is_dir():
            output.rmdir()
        os.replace(pending, output)
    finally:
        shutil.rmtree(pending, ignore_errors=True)
    return Imported(output=output, checkpoint=output / checkpoint.name, config=config, kind=kind, parts=source.parts,
                    tensors=len(source.tensors), parameters=sum(math.prod(s) for s in target.hf_shapes().values()),
                    left_out=left_out, tokenizer=output / "tokenizer" if tokenizer else None)


def model_yaml(config: RunConfig, kind: str, parts: list[str]) -> str:
    """The sections that describe the model: of a mixture also `moe`."""
    described = {"language": "language_model" in parts, "vision": "vision_model" in parts, "moe": kind == "route"}
    sections = config.to_dict()
    return yaml.safe_dump({name: sections[name] for name, is_there in described.items() if is_there}, sort_keys=False)


def _require_empty(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not empty; choose another --output, or remove it")


def _config(source: sources.Source, request: Request) -> RunConfig:
    """The source's sections with the request's fields over them."""
    if request.dtype not in DTYPES:
        raise ConfigError(f"dtype {request.dtype!r} is unknown; known: {', '.join(DTYPES)}")
    if request.expert_init != "none" and (source.kind == "route" or "language_model" not in source.parts):
        raise ConfigError(f"--expert-init {request.expert_init} makes a mixture of a dense language model, and the source is "
                          f"{'one already' if source.kind == 'route' else 'a vision tower alone'}; leave it out")
    moe = {"expert_init": request.expert_init} if request.expert_init != "none" else {}
    sections = {**source.sections, "moe": {**source.sections.get("moe", {}), **moe}}
    # a run's own sequence length is checked when it starts; here only the model's limit counts
    longest = sections.get("language", {}).get("max_position_embeddings")
    return from_mapping({**sections, **({"data": {"seq_length": longest}} if longest else {})}, request.flags)


def _require_room(output: Path, target: NameMap, source: sources.Source, dtype: torch.dtype | None) -> None:
    widest = max(source.place(name).dtype.itemsize for name in source.tensors)
    needed = sum(math.prod(s) for s in target.core_shapes().values()) * (dtype.itemsize if dtype else widest)
    existing = next(p for p in (output, *output.absolute().parents) if p.exists())
    if needed > (free := shutil.disk_usage(existing).free):
        raise CheckpointError(f"{output} needs up to {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; nothing was "
                              "written. Free some space, or choose another --output")


def _write(directory: Path, source: sources.Source, config: RunConfig, target: NameMap, request: Request,
           dtype: torch.dtype | None) -> Path:
    record = Record(stage="imported", kind=target.kind, step=0, position=0, finished=True, layout={"world": 1},
                    vocab_size=config.language.vocab_size or 0, tokenizer_fingerprint="", parts=list(target.parts),
                    num_experts=config.moe.num_experts if target.kind == "route" else 0)
    shapes = target.core_shapes()
    with CheckpointWriter(directory, record, config.to_yaml()) as writer:
        for entry in target.entries:
            row = 0
            for piece in _pieces(entry, source, config, request):
                piece = piece if dtype is None else piece.to(dtype)
                if entry.expert is None:
                    writer.put(entry.core, piece, shape=shapes[entry.core], offset=(row,))
                else:
                    writer.put(entry.core, piece[None], shape=shapes[entry.core], offset=(entry.expert, row))
                row += len(piece)
    return writer.path


def _pieces(entry: Entry, source: sources.Source, config: RunConfig, request: Request) -> Iterator[Tensor]:
    """The core tensor of an entry, in pieces along its first axis."""
    if request.expert_init == "none":
        yield from entry.to_core({name: source.read(name) for name in entry.hf})
    elif ".mlp.router." in entry.core:
        layer, name = int(_LAYER.search(entry.core)[1]), entry.core.split(".mlp.router.")[1]
        like = source.place(f"language_model.model.layers.{layer}.input_layernorm.weight").dtype
        yield fresh.router_weights(config, layer + 1)[name].to(like)
    else:
        dense = {name: source.read(_EXPERT.sub(".mlp.", name)) for name in entry.hf}
        pieces = entry.to_core(dense)
        noisy = request.expert_init == "noise" and entry.expert is not None and entry.core.endswith(".weight")
        yield from [_with_noise(torch.cat(pieces), entry, len(pieces), config)] if noisy else pieces


def _with_noise(weight: Tensor, entry: Entry, gates: int, config: RunConfig) -> Tensor:
    """As `expert_init.add_noise` does to a model in memory, with the same numbers."""
    layer, which = int(_LAYER.search(entry.core)[1]) + 1, 1 if ".linear_fc1." in entry.core else 2
    noise = fresh.expert_noise(config.train.seed, layer, entry.expert, which, (gates, len(weight) // gates, weight.shape[1]))
    scale = config.moe.expert_init_noise * fresh.std_of(fresh.moments(weight))
    return noise.reshape(weight.shape).mul_(scale).add_(weight).to(weight.dtype)


def _copy_tokenizer(source: Path | None, target: Path) -> bool:
    found = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()] if source else []
    if not any(f.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for f in found):
        return False
    target.mkdir()
    for file in found:
        shutil.copyfile(file, target / file.name)
    return True


def describe(imported: Imported) -> str:
    """What was done, and what to put into a run."""
    lm, vision, moe = imported.config.language, imported.config.vision, imported.config.moe
    lines = [f"{imported.checkpoint}: {imported.tensors} tensors read, {imported.parameters:,} parameters written"]
    if "vision_model" in imported.parts:
        lines.append(f"  vision tower    {vision.model_type}, {vision.num_layers_used} of {vision.num_layers} layers, "
                     f"{vision.hidden_size} wide, {vision.image_size} pixels, {vision.tokens_per_image} tokens per image")
    if "language_model" in imported.parts:
        lines.append(f"  language model  {lm.num_layers} layers, {lm.hidden_size} wide, vocabulary {lm.vocab_size}")
    if imported.kind == "route":
        mixtures = sum(moe.layer_pattern(lm.num_layers))
        lines.append(f"  mixture         {moe.num_experts} experts in {mixtures} layers, {moe.router} router")
    if "vision_projection" not in imported.parts:
        lines.append("  the projector will start fresh")
    if imported.left_out:
        lines.append(f"  left out: {len(imported.left_out)} tensors without a part in the result (the tower's end, buffers, a tied "
                     "output layer)")
    tokenizer = f" --tokenizer {_tokenizer_path(imported.tokenizer)}" if imported.tokenizer else ""
    lines.append(f"train on with: python -m megatron_evomoe train --config RUN.yaml --preset {imported.output}/model.yaml "
                 f"--load {imported.output}{tokenizer}")
    return "\n".join(lines)


def _tokenizer_path(folder: Path) -> Path:
    """A run takes the folder where it has a fast tokenizer, else the sentencepiece file."""
    sentencepiece = folder / "tokenizer.model"
    return sentencepiece if sentencepiece.exists() and not (folder / "tokenizer.json").exists() else folder
