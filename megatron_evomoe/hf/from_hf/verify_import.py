"""Is an import what it was made of? Every tensor against the source's, and both models on the same inputs
where they fit in memory.

The tensors are read back through the name map; the model is loaded by megatron-core itself, in float32.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from megatron_evomoe.checkpoint.stream import CheckpointReader
from megatron_evomoe.config import ConfigError, LanguageConfig, ParallelConfig, RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.image import processor_for
from megatron_evomoe.hf import register
from megatron_evomoe.hf.from_hf import sources
from megatron_evomoe.hf.from_hf.config_sections import LLAVA_TYPES
from megatron_evomoe.hf.from_hf.importing import CONVERSIONS, Imported, Request, is_drawn, open_target
from megatron_evomoe.hf.to_hf.verify_export import LOGITS, Row
from megatron_evomoe.parallel.single_rank import one_rank

_LENGTH = 24


def compare(request: Request, imported: Imported) -> list[Row]:
    """The table's rows. In a process without process groups; makes a world of one for the time.

    Raises:
        CheckpointError, ConfigError: the source cannot be read any more.
    """
    rows = [_compare_tensors(request, imported)]
    if reason := _why_not_run(request, imported):
        return [*rows, Row("logits", reason, "", True)]
    return [*rows, *_compare_models(request, imported)]


def _compare_tensors(request: Request, imported: Imported) -> Row:
    """All entries of the map, one at a time."""
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
    """Why both models cannot be run; empty if they can."""
    if request.expert_init == "noise" or (
        imported.kind == StageKind.ROUTE
        and imported.config.moe.router_gate != "straight_through"
        and request.expert_init != "none"
    ):
        return "not compared: the new experts do not compute what the dense model does"
    if imported.kind == StageKind.EVOLVE:
        return "not compared: an evolving model's router does not exist yet"
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
            theirs = _theirs(
                request,
                "AutoModelForImageTextToText" if whole else "AutoModelForCausalLM",
                request.model or request.language_model,
            )
            # transformers' LLaVA looks up the image token's own embedding, which some files do not have
            rows = theirs.get_input_embeddings().weight.shape[0]
            whole = whole and (theirs.config.model_type != "llava" or theirs.config.image_token_index < rows)
            tokens, token_types = _prompt(
                config, rows, image_token=theirs.config.image_token_index if whole else None
            )
            wanted = theirs(input_ids=tokens, **({"pixel_values": normalised} if whole else {})).logits
            # what stands at image positions is replaced, and an export's image token is no row of the core's
            # embedding
            got = ours(
                tokens.masked_fill(token_types == TokenType.VISION, 0), token_types, pixels[: int(whole)]
            )
            size = min(config.language.vocab_size, wanted.shape[-1])  # rows that the import added are new
            yield _row("logits, one image" if whole else "logits, text", got[..., :size], wanted[..., :size])
            yield _at_long_positions(config, ours, theirs, rows)
        if "vision_model" in parts and "vision_projection" not in parts:
            kind = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}[config.vision.model_type]
            theirs = _theirs(request, kind, request.vision_model)
            states = theirs(normalised, output_hidden_states=True).hidden_states[config.vision.feature_layer]
            yield _row(
                "tower's features",
                ours.vision_model(normalised),
                states[:, -config.vision.tokens_per_image :],
            )


def _row(what: str, got: torch.Tensor, wanted: torch.Tensor, limit: float = LOGITS) -> Row:
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    return Row(f"{what}: largest difference", f"{error:.1e}", f"{limit:.0e} of the largest", error <= limit)


def long_positions(lm: LanguageConfig) -> list[int]:
    """Places at the start, on both sides of the length the model had before its RoPE was stretched (half of
    its length, if it was not), and at its end or beyond. Few tokens suffice: what RoPE computes depends on
    how far apart two of them stand.
    """
    before = {"llama3": 8192, "linear": int(lm.max_position_embeddings / lm.rope_scaling_factor)}.get(
        lm.rope_scaling_type or "", lm.max_position_embeddings // 2
    )
    end = max(lm.max_position_embeddings, before + _LENGTH)
    stretches = (range(8), range(before - 4, before + 4), range(end - 8, end))
    return sorted({place for stretch in stretches for place in stretch if place >= 0})


def _at_long_positions(config: RunConfig, ours: Any, theirs: Any, rows: int) -> Row:
    """Both models on a text whose tokens stand far apart, by their own rotary tables."""
    lm = config.language
    positions = long_positions(lm)
    tokens = _prompt(config, rows, image_token=None, length=len(positions))[0]
    # without a mask transformers takes the gaps for the ends of packed texts
    wanted = theirs(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=torch.tensor([positions])
    ).logits
    rotary = ours.language_model.rotary_pos_emb
    hook = rotary.register_forward_hook(
        lambda module, given, table: torch.cat([module.forward(1, place) for place in positions])
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
    # the core divides positions and transformers frequencies, which rounds angles differently
    rounding = positions[-1] / lm.rope_scaling_factor * 2**-22 if lm.rope_scaling_type == "linear" else 0.0
    return _row(
        f"logits, positions up to {positions[-1]}", got[..., :size], wanted[..., :size], LOGITS + rounding
    )


def _prompt(
    config: RunConfig, rows: int, image_token: int | None, length: int = _LENGTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and types [1, s] of a text of the source's `rows` tokens, an image within it if there is a token
    for it.
    """
    rows = min(rows, config.language.vocab_size)
    tokens = torch.randint(0, rows, (1, length), generator=torch.Generator().manual_seed(2))
    if image_token is None:
        return tokens, torch.full_like(tokens, TokenType.TEXT)
    tokens[tokens == image_token] = (image_token + 1) % rows
    image = torch.full((1, config.vision.tokens_per_image), image_token)
    tokens = torch.cat([tokens[:, :4], image, tokens[:, 4:]], dim=1)
    return tokens, torch.where(tokens == image_token, TokenType.VISION, TokenType.TEXT)


def _theirs(request: Request, kind: str, path: str | None) -> Any:
    """transformers' model in float32, its weights rounded to the import's type; code in the directory is not
    run.
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


@contextmanager
def _core_model(imported: Imported) -> Iterator[Any]:
    """The checkpoint in megatron-core's model, float32, evaluation mode; parts it lacks are fresh."""
    language = replace(imported.config.language, vocab_size=imported.config.language.vocab_size or 8)
    config = replace(
        imported.config,
        language=language,
        parallel=ParallelConfig(),
        train=replace(imported.config.train, bf16=False),
        moe=replace(imported.config.moe, moe_expert_capacity_factor=None),
    )
    with one_rank(config):
        yield _loaded(imported, config)


def _loaded(imported: Imported, config: RunConfig) -> Any:
    from megatron_evomoe.checkpoint import store
    from megatron_evomoe.config.recipe import MODULES
    from megatron_evomoe.model.build import build_modules

    [model] = build_modules(config, StageKind.ROUTE if imported.kind == StageKind.ROUTE else StageKind.DENSE)
    lacking = "|".join(rf"^{part}\." for part in MODULES if part not in imported.parts) or r"(?!)"
    states, _ = store.load_weights(
        imported.checkpoint,
        [model.sharded_state_dict(metadata=store.metadata())],
        may_be_fresh=re.compile(lacking),
    )
    model.load_state_dict({k: v for k, v in states[0].items() if torch.is_tensor(v)}, strict=False)
    return model.eval()
