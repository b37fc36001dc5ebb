"""Converts a checkpoint of any stage, saved under any layout, to a Hugging Face directory.

Tensors are read and written one by one, without process groups, a GPU or transformers. The directory gets

    OUTPUT/config.json  generation_config.json  preprocessor_config.json  processor_config.json  README.md
    OUTPUT/model.safetensors, or model-00001-of-0000N.safetensors … and an index
    OUTPUT/tokenizer.json  tokenizer_config.json  special_tokens_map.json  chat_template.jinja
    OUTPUT/configuration_evomoe.py  modeling_evomoe.py …  only if transformers has no class for the model
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from torch import Tensor

from megatron_evomoe.checkpoint import integrity
from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.checkpoint.stream import CheckpointReader
from megatron_evomoe.config import ConfigError, RunConfig
from megatron_evomoe.config.kinds import MIXTURE_KINDS, StageKind
from megatron_evomoe.config.recipe import MODULES
from megatron_evomoe.data.conversation import TEMPLATES, end_id, stop_ids
from megatron_evomoe.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
    same_tokenizer,
)
from megatron_evomoe.hf.dtypes import DTYPES
from megatron_evomoe.hf.export_format import EMBEDDING, OUTPUT
from megatron_evomoe.hf.output_directory import output_directory, require_room
from megatron_evomoe.hf.remote_code.exported_files import source_files
from megatron_evomoe.hf.tensor_map import Entry, NameMap
from megatron_evomoe.hf.to_hf import config_files, model_card, origin
from megatron_evomoe.hf.to_hf.chat_template import chat_template
from megatron_evomoe.hf.to_hf.safetensors_writer import ShardedWriter
from megatron_evomoe.hf.to_hf.tokenizer_json import TokenizerFiles, check_ids, tokenizer_files


@dataclass(kw_only=True)
class Request:
    """An export that is asked for: the checkpoint, the target directory and the form."""

    checkpoint: str
    """An ``iter_…`` folder, or a stage's folder, whose newest checkpoint is taken."""
    output: str
    format: Literal["auto", "evomoe", "llava"] = "auto"
    """`evomoe` is custom code, `llava` is transformers' own class.

    `auto` chooses `llava` for every model that it can compute.
    """
    dense: bool = False
    """Whether to export only the first expert of an evolving model, as a dense model."""
    dtype: Optional[str] = None
    """One of `DTYPES`; None takes the type that the run trained in."""
    tokenizer: Optional[str] = None
    """Where the run's tokenizer is now; None means where it was during training."""
    max_shard_bytes: int = 5 * 10**9


@dataclass
class Exported:
    """What was written."""

    output: Path
    source: Path
    config: RunConfig
    kind: str
    """Stage kind; `dense` if one expert was taken."""
    format: str
    dtype: str
    tensors: int
    size: int
    """Bytes of weights."""


@dataclass
class _Plan:
    """Everything that is decided before the first byte is written."""

    reader: CheckpointReader
    config: RunConfig
    kind: str
    format: str
    dtype: str
    names: NameMap
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer
    tokenizer_files: TokenizerFiles
    tokens: config_files.Tokens
    own: dict[str, Any]

    @property
    def rows(self) -> int:
        """Rows of the exported embedding.

        transformers' LLaVA looks up the image token before it overwrites the result, so that token needs a
        row.
        """
        true = self.config.language.vocab_size or 0
        return max(true, self.tokens.image + 1) if self.format == "llava" else true


def export_model(request: Request) -> Exported:
    """Write the directory `request.output`. After an error nothing is there.

    Raises:
        ConfigError: the request contradicts itself or the checkpoint, or the tokenizer is missing or cannot
            be expressed in Hugging Face's format.
        CheckpointError: the checkpoint is damaged; tensors are missing, unexpected or of a wrong shape; the
            output is not empty; or the disk has too little room.
    """
    output = Path(request.output).expanduser()
    checker = ThreadPoolExecutor(1)
    try:
        with output_directory(output) as pending:
            plan = _plan(request)
            # The checksums are read during the conversion, which finds the same bytes in the page cache.
            problem = checker.submit(integrity.mismatch, plan.reader.directory, plan.reader.record.files)
            writer = ShardedWriter(
                pending, _shapes(plan), getattr(torch, plan.dtype), request.max_shard_bytes
            )
            require_room(output, writer.total_size)
            pending.mkdir(parents=True)
            for name, tensor in _tensors(plan):
                writer.put(name, tensor)
            writer.finish()
            _write_files(plan, pending, writer)
            if message := problem.result():
                raise CheckpointError(message)
    finally:
        checker.shutdown(cancel_futures=True)
    return Exported(
        output=output,
        source=plan.reader.directory,
        config=plan.config,
        kind=plan.kind,
        format=plan.format,
        dtype=plan.dtype,
        tensors=len(_shapes(plan)),
        size=writer.total_size,
    )


def _plan(request: Request) -> _Plan:
    folder = origin.find_checkpoint(Path(request.checkpoint).expanduser())
    reader = CheckpointReader(folder)
    record, config = reader.record, origin.config_of(folder, reader.record)
    if lacking := [part for part in MODULES if part not in record.parts]:
        raise CheckpointError(f"{folder} holds no {', '.join(lacking)}; only a whole model can be exported")
    kind, form = _kind_and_format(request, record, config)
    tokenizer, path = _tokenizer(request, record, config)
    files = tokenizer_files(tokenizer, path, config.language.max_position_embeddings)
    check_ids(files.files["tokenizer.json"], tokenizer, files.template_prefix, _probes(config))
    stops = stop_ids(tokenizer, config.data.conversation_template)
    names = NameMap(config, record.kind, all_experts=kind == StageKind.EVOLVE)
    names.check_core(reader.shapes, folder)
    if request.tokenizer:
        config = replace(config, data=replace(config.data, tokenizer=str(path)))
    stage = {
        "name": record.stage,
        "kind": record.kind,
        "step": record.step,
        "lineage": origin.lineage(record),
    }
    return _Plan(
        reader=reader,
        config=config,
        kind=kind,
        format=form,
        dtype=_dtype(request, config),
        names=names,
        tokenizer=tokenizer,
        tokenizer_files=files,
        own=config_files.own_sections(config, kind, stage),
        tokens=config_files.Tokens(
            bos=tokenizer.bos_id,
            eos=tokenizer.eos_id,
            pad=tokenizer.pad_id,
            image=files.image_token_id,
            stop=tuple(stops),
        ),
    )


def _kind_and_format(request: Request, record: Record, config: RunConfig) -> tuple[str, str]:
    kind = record.kind
    if request.dense:
        if kind == StageKind.ROUTE:
            raise ConfigError(
                f"--dense exports the first expert of an evolving model, but {request.checkpoint} is a "
                "routed model, which uses all experts; export its evolve stage, or leave --dense out"
            )
        kind = StageKind.DENSE.value
    if kind in MIXTURE_KINDS:
        if request.format == "llava":
            raise ConfigError(
                f"--format llava: transformers' LLaVA has no experts, and {request.checkpoint} is a {kind!r} "
                "stage; use --format evomoe"
                f"{', or --dense for its first expert' if kind == StageKind.EVOLVE else ''}"
            )
        return kind, "evomoe"
    if request.format == "evomoe":
        return kind, "evomoe"
    try:
        config_files.stock_text_config(config.language)
    except ConfigError:
        if request.format == "llava":
            raise
        return kind, "evomoe"
    return kind, "llava"


def _dtype(request: Request, config: RunConfig) -> str:
    if request.dtype is not None and request.dtype not in DTYPES:
        raise ConfigError(f"dtype {request.dtype!r} is unknown; known: {', '.join(DTYPES)}")
    return request.dtype or ("bfloat16" if config.train.bf16 else "float32")


def _tokenizer(
    request: Request, record: Record, config: RunConfig
) -> tuple[SentencePieceTokenizer | HuggingFaceTokenizer, Path]:
    path = request.tokenizer or config.data.tokenizer
    if path is None or not Path(path).expanduser().exists():
        raise ConfigError(
            f"the tokenizer that {request.checkpoint} was trained with "
            f"({path or 'the checkpoint does not say which'}) does not exist; give its path with --tokenizer"
        )
    tokenizer = build_tokenizer(path)
    if not same_tokenizer(record.tokenizer_fingerprint, tokenizer.fingerprint()):
        raise ConfigError(
            f"{path} is not the tokenizer that {request.checkpoint} was trained with, so token ids would "
            "stand for other words; give the path of the right one with --tokenizer"
        )
    if tokenizer.vocab_size > (config.language.vocab_size or 0):
        raise ConfigError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens, but the model has "
            f"{config.language.vocab_size}; give the path of the run's tokenizer with --tokenizer"
        )
    return tokenizer, Path(path).expanduser()


def _probes(config: RunConfig) -> list[str]:
    """Texts that both tokenizers must encode alike before anything is written."""
    return [
        TEMPLATES[config.data.conversation_template].system or "A caption.",
        "USER: What is this? ASSISTANT:",
        "user\nHow many, 1 or 23?\nWhich?",
        "Ça, é — 漢字 🙂\tund so  weiter.",
    ]


def _shapes(plan: _Plan) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every tensor to write, in the order of writing."""
    shapes = plan.names.hf_shapes()
    for name in (EMBEDDING, OUTPUT):
        if name in shapes:
            shapes[name] = (plan.rows, *shapes[name][1:])
    return {**shapes, **{name: tuple(t.shape) for name, t in _unused_norm(plan).items()}}


def _tensors(plan: _Plan) -> Iterator[tuple[str, Tensor]]:
    for entry, core in _read_ahead(plan):
        for name, tensor in entry.to_hf(core).items():
            if name in (EMBEDDING, OUTPUT) and len(tensor) < plan.rows:
                tensor = torch.cat([tensor, tensor.new_zeros(plan.rows - len(tensor), *tensor.shape[1:])])
            yield name, tensor
    yield from _unused_norm(plan).items()


def _read_ahead(plan: _Plan) -> Iterator[tuple[Entry, Tensor]]:
    """Every entry and its core tensor; the next tensor is read while one is written."""
    entries = plan.names.entries
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(plan.reader.read, entries[0].core, entries[0].expert)
        for entry, after in zip(entries, [*entries[1:], None], strict=True):
            core = coming.result()
            if after is not None:
                coming = reader.submit(plan.reader.read, after.core, after.expert)
            yield entry, core


def _unused_norm(plan: _Plan) -> dict[str, Tensor]:
    """The norm behind the vision tower, with initial values: transformers' class has it, LLaVA skips it."""
    if plan.format != "llava":
        return {}
    width, name = plan.config.vision.hidden_size, "vision_tower.vision_model.post_layernorm"
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def _write_files(plan: _Plan, folder: Path, writer: ShardedWriter) -> None:
    config, tokens, files = plan.config, plan.tokens, plan.tokenizer_files
    if plan.format == "llava":
        described = config_files.llava_config(config, tokens, plan.own, plan.dtype, plan.rows)
    else:
        described = config_files.evomoe_config(config, plan.kind, tokens, plan.own, plan.dtype)
        for name, file in source_files().items():
            shutil.copyfile(file, folder / name)
    contents = {
        "config.json": described,
        "generation_config.json": config_files.generation_config(tokens, plan.rows),
        **config_files.processor_configs(config, plan.format),
        **files.files,
    }
    for name, value in contents.items():
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    template = config.data.conversation_template
    end = files.pieces[end_id(plan.tokenizer, template)]
    (folder / "chat_template.jinja").write_text(chat_template(template, end, files.template_prefix))
    (folder / "README.md").write_text(
        model_card.model_card(plan.own, plan.format, plan.dtype, writer.total_size)
    )
