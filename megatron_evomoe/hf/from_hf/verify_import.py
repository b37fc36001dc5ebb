"""Checks an import: compares every tensor with the source's, and both models on the same inputs.

The models are compared if they fit in memory.

The tensors are read back through the tensor map. The models are transformers' and megatron-core's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from megatron_evomoe.checkpoint.stream import CheckpointReader
from megatron_evomoe.config import ConfigError, LanguageConfig, ParallelConfig, RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import MODULES
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.image import processor_for
from megatron_evomoe.hf import register
from megatron_evomoe.hf.from_hf import sources
from megatron_evomoe.hf.from_hf.config_sections import LLAVA_TYPES
from megatron_evomoe.hf.from_hf.importing import CONVERSIONS, Imported, Request, is_drawn, open_target
from megatron_evomoe.hf.verification import LOGITS, NOTHING, Row, core_model, difference

_LENGTH = 24


def compare(request: Request, imported: Imported) -> list[Row]:
    """Compare the imported checkpoint with its source, and return the rows of the table.

    If the process has no process groups, groups of one rank exist for the duration of the call.

    Raises:
        CheckpointError, ConfigError: the source can no longer be read.
    """
    rows = [_compare_tensors(request, imported)]
    if reason := _why_not_run(request, imported):
        return [*rows, Row("logits", reason, "", True)]
    return [*rows, *_compare_models(request, imported)]


def _compare_tensors(request: Request, imported: Imported) -> Row:
    """Read back every tensor of the map, one at a time, and compare it bit by bit."""
    source, target = open_target(request, imported.config)
    reader, dtypes = CheckpointReader(imported.checkpoint), target.dtypes(source, request)
    count, different = 0, []
    for entry in target.entries:
        if is_drawn(entry, request):
            continue
        for name, tensor in entry.to_hf(reader.read(entry.core, entry.expert)).items():
            original = source.read(target.origin(name, source)).to(dtypes[entry.core])
            count += 1
            if tensor.dtype != original.dtype or not torch.equal(tensor, original):
                different.append(name)
    found = (
        f"{count} bit-identical"
        if not different
        else f"{len(different)} of {count} differ: {', '.join(different[:3])}"
    )
    return Row("tensors", found, "all", not different)


def _why_not_run(request: Request, imported: Imported) -> str:
    """Why the models are not compared, or "" if they are."""
    if request.expert_init == "noise" or (
        imported.kind == StageKind.ROUTE
        and imported.config.moe.router_gate != "straight_through"
        and request.expert_init != "none"
    ):
        return "not compared: the new experts do not compute what the dense model computes"
    if imported.kind == StageKind.EVOLVE:
        return "not compared: an evolving model has no router yet"
    if request.model and sources.directory_of(request.model).config.get("model_type") in LLAVA_TYPES[1:]:
        return "not compared: transformers has no class for this format"
    needed, free = 2 * 4 * imported.parameters, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        return f"not compared: both models need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return ""


@torch.no_grad()
def _compare_models(request: Request, imported: Imported) -> Iterator[Row]:
    config, parts = imported.config, imported.parts
    pixels = torch.randint(
        0,
        256,
        (1, 3, config.vision.image_size, config.vision.image_size),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )
    normalised = processor_for(config).normalize(pixels, torch.float32)
    with _core_model(imported) as ours:
        if "language_model" in parts:
            whole = "vision_projection" in parts
            theirs = _transformers_model(
                request,
                "AutoModelForImageTextToText" if whole else "AutoModelForCausalLM",
                request.model or request.language_model,
            )
            # transformers' LLaVA looks up the embedding of the image token, which some files do not have.
            rows = theirs.get_input_embeddings().weight.shape[0]
            whole = whole and (theirs.config.model_type != "llava" or theirs.config.image_token_index < rows)
            tokens, token_types = _prompt(
                config, rows, image_token=theirs.config.image_token_index if whole else None
            )
            wanted = theirs(input_ids=tokens, **({"pixel_values": normalised} if whole else {})).logits
            # The ids at image positions are not read, and an export's image token may lie beyond the
            # embedding of megatron-core's model.
            got = ours(
                tokens.masked_fill(token_types == TokenType.VISION, 0), token_types, pixels[: int(whole)]
            )
            size = min(config.language.vocab_size, wanted.shape[-1])  # without rows that the import added
            what = "logits, one image" if whole else "logits, text"
            yield difference(what, got[..., :size], wanted[..., :size])
            yield _at_long_positions(config, ours, theirs, rows)
        if "vision_model" in parts and "vision_projection" not in parts:
            kind = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}[config.vision.model_type]
            theirs = _transformers_model(request, kind, request.vision_model)
            states = theirs(normalised, output_hidden_states=True).hidden_states[config.vision.feature_layer]
            yield difference(
                "tower's features",
                ours.vision_model(normalised),
                states[:, -config.vision.tokens_per_image :],
            )


def long_positions(lm: LanguageConfig) -> list[int]:
    """Positions at which a wrong RoPE scaling shows.

    They are at the start, around the length that the model had before scaling (half its length if RoPE is not
    scaled), and at the end.

    Few tokens suffice, because RoPE depends on the distance of two positions alone.
    """
    before = {"llama3": 8192, "linear": int(lm.max_position_embeddings / lm.rope_scaling_factor)}.get(
        lm.rope_scaling_type or "", lm.max_position_embeddings // 2
    )
    end = max(lm.max_position_embeddings, before + _LENGTH)
    stretches = (range(8), range(before - 4, before + 4), range(end - 8, end))
    return sorted({position for stretch in stretches for position in stretch if position >= 0})


def _at_long_positions(config: RunConfig, ours: Any, theirs: Any, rows: int) -> Row:
    """Compare both models on a text with tokens at `long_positions`, each with its own rotary tables."""
    lm = config.language
    positions = long_positions(lm)
    tokens = _prompt(config, rows, image_token=None, length=len(positions))[0]
    # Without a mask, transformers would take the gaps between positions for borders of packed texts.
    wanted = theirs(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=torch.tensor([positions])
    ).logits
    rotary = ours.language_model.rotary_pos_emb
    hook = rotary.register_forward_hook(
        lambda module, given, table: torch.cat([module.forward(1, position) for position in positions])
    )
    try:
        got = ours(
            tokens,
            torch.full_like(tokens, TokenType.TEXT),
            torch.empty(0, 3, *[config.vision.image_size] * 2, dtype=torch.uint8),
        )
    finally:
        hook.remove()
    size = min(lm.vocab_size, wanted.shape[-1])
    # For linear scaling megatron-core divides positions and transformers divides frequencies, so their angles
    # are rounded differently.
    rounding = positions[-1] / lm.rope_scaling_factor * 2**-22 if lm.rope_scaling_type == "linear" else 0.0
    return difference(
        f"logits, positions up to {positions[-1]}", got[..., :size], wanted[..., :size], LOGITS + rounding
    )


def _prompt(
    config: RunConfig, rows: int, image_token: int | None, length: int = _LENGTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids and their types, int64 [1, s].

    Args:
        rows: rows of the source's embedding; no id is larger.
        image_token: id at the positions of one image; None for text alone.
    """
    rows = min(rows, config.language.vocab_size or rows)
    tokens = torch.randint(0, rows, (1, length), generator=torch.Generator().manual_seed(2))
    if image_token is None:
        return tokens, torch.full_like(tokens, TokenType.TEXT)
    tokens[tokens == image_token] = (image_token + 1) % rows
    image = torch.full((1, config.vision.tokens_per_image), image_token)
    tokens = torch.cat([tokens[:, :4], image, tokens[:, 4:]], dim=1)
    return tokens, torch.where(tokens == image_token, TokenType.VISION, TokenType.TEXT)


def _transformers_model(request: Request, kind: str, path: str | None) -> Any:
    """transformers' model of class `kind` in float32, with weights rounded to the import's dtype.

    Code in the directory is not run.
    """
    try:
        import transformers

        register()  # for a source that is an export of this package
    except ImportError:
        raise ConfigError("--verify needs transformers 4.56 or later: pip install transformers") from None
    model = getattr(transformers, kind).from_pretrained(
        sources.local_path(str(path)), dtype=torch.float32, local_files_only=True
    )
    if dtype := CONVERSIONS[request.dtype]:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
    return model.eval()


def _core_model(imported: Imported) -> AbstractContextManager[Any]:
    """megatron-core's model of the checkpoint; modules that it lacks keep their initial values."""
    language = replace(imported.config.language, vocab_size=imported.config.language.vocab_size or 8)
    config = replace(
        imported.config,
        language=language,
        parallel=ParallelConfig(),
        train=replace(imported.config.train, bf16=False),
        moe=replace(imported.config.moe, moe_expert_capacity_factor=None),
    )
    lacking = "|".join(rf"^{module}\." for module in MODULES if module not in imported.parts)
    return core_model(
        imported.checkpoint,
        config,
        imported.kind,
        may_be_fresh=re.compile(lacking) if lacking else NOTHING,
    )
