"""Does an export compute what its checkpoint computes? megatron-core's model and transformers', on the same
inputs.

Both run in float32 with weights rounded to the export's dtype, so that what differs is the model and not the
rounding of its activations. The checkpoint is read by megatron-core itself, not by the converter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_evomoe.config import ConfigError, RunConfig, TrainConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.batch import stack_images
from megatron_evomoe.data.conversation import IMAGE_TOKEN, EncodedSample, encode_prompt
from megatron_evomoe.data.image import processor_for
from megatron_evomoe.data.tokenizer import build_tokenizer
from megatron_evomoe.hf import register
from megatron_evomoe.hf.tensor_map import EVOLVING
from megatron_evomoe.hf.to_hf.exporting import Exported
from megatron_evomoe.parallel.single_rank import one_rank

LOGITS = 1e-4
"""Largest accepted difference, of the largest logit. Tiny models: 3e-6; sums in another order grow with width
and depth.
"""
PIXELS = 1.0
"""Largest accepted mean difference of pixels, of 255: PIL's filter there, torch's here."""
AGREEMENT = 0.999
"""Smallest accepted share of positions with the same most likely token or experts: of two nearly equal logits
either may win.
"""
_QUESTION = "What is in this picture?"
_IMAGES = (1, 0, 2)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    found: str
    limit: str
    good: bool


def compare(exported: Exported) -> list[Row]:
    """Load both models and ask them the same. In a process without process groups; makes a world of one for
    the time.

    Raises:
        ConfigError: transformers is not installed, or cannot load the directory without differing keys.
    """
    theirs, processor = _load_export(exported)
    pictures = [_picture(i) for i in range(max(_IMAGES))]
    rows = []
    with core_model(exported) as ours, torch.no_grad():
        for count in _IMAGES:
            rows += _compare_prompt(exported, ours, theirs, processor, pictures[:count])
    return rows


def table(rows: list[Row]) -> str:
    """For people."""
    cells = [
        ("check", "found", "accepted", ""),
        *((r.what, r.found, r.limit, "ok" if r.good else "FAILED") for r in rows),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _compare_prompt(
    exported: Exported, ours: Any, theirs: Any, processor: Any, pictures: list[np.ndarray]
) -> Iterator[Row]:
    config, name = exported.config, f"{len(pictures)} images"
    sample = _our_prompt(config, len(pictures))
    image_token = theirs.config.image_token_index
    messages = [
        {
            "role": "user",
            "content": [*({"type": "image"} for _ in pictures), {"type": "text", "text": _QUESTION}],
        }
    ]
    batch = processor(
        text=processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
        images=pictures or None,
        return_tensors="pt",
    )
    wanted = [
        image_token if kind == TokenType.VISION else i
        for i, kind in zip(sample.tokens, sample.token_types, strict=True)
    ]
    same = batch["input_ids"][0].tolist() == wanted
    yield Row(f"{name}: token ids", "equal" if same else "differ", "equal", same)
    images = processor_for(config)
    stacked = stack_images([images(p) for p in pictures], images.size)
    pixels = images.normalize(stacked, torch.float32)
    if pictures:
        scale = torch.tensor(images.std).view(1, 3, 1, 1) * 255
        difference = ((batch["pixel_values"] - pixels).abs() * scale).mean().item()
        yield Row(
            f"{name}: pixels, mean difference",
            f"{difference:.3f} of 255",
            f"{PIXELS:g}",
            difference <= PIXELS,
        )
    logits, experts = _core_answer(ours, sample, stacked)
    extra = {"output_router_logits": True} if experts else {}
    answer = theirs(
        input_ids=torch.tensor([wanted]), **({"pixel_values": pixels} if pictures else {}), **extra
    )
    got = answer.logits[0, :, : logits.shape[1]]
    error = ((got - logits).abs().max() / logits.abs().max()).item()
    yield Row(
        f"{name}: logits, largest difference", f"{error:.1e}", f"{LOGITS:.0e} of the largest", error <= LOGITS
    )
    agree = (got.argmax(-1) == logits.argmax(-1)).float().mean().item()
    yield Row(
        f"{name}: most likely token",
        f"{100 * agree:.1f} % equal",
        f"{100 * AGREEMENT:g} %",
        agree >= AGREEMENT,
    )
    for i, (routing, of_theirs) in enumerate(
        zip(experts, answer.router_logits if experts else (), strict=True)
    ):
        chosen = (
            torch.zeros_like(of_theirs)
            .scatter(1, of_theirs.topk(config.moe.moe_router_topk).indices, 1)
            .bool()
        )
        equal = int((chosen == routing).all(-1).sum())
        yield Row(
            f"{name}: experts in mixture {i + 1}",
            f"{equal} of {len(routing)} tokens equal",
            f"{100 * AGREEMENT:g} %",
            equal >= AGREEMENT * len(routing),
        )


def _our_prompt(config: RunConfig, images: int) -> EncodedSample:
    tokenizer = build_tokenizer(config.data.tokenizer)
    text = IMAGE_TOKEN * images + _QUESTION
    return encode_prompt(
        [{"from": "human", "value": text}],
        images,
        tokenizer,
        config.data.conversation_template,
        config.vision.tokens_per_image,
    )


def _picture(seed: int) -> np.ndarray:
    """A smooth random picture, uint8 [H, W, 3], no side of which is the model's."""
    noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed)) * 255
    wide = torch.nn.functional.interpolate(noise, size=(90 + 30 * seed, 140), mode="bicubic").clamp(0, 255)
    return wide[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


def _load_export(exported: Exported) -> tuple[Any, Any]:
    """The exported model in float32 and its processor, through this package's classes: no code in the
    directory is run.
    """
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        register()
    except ImportError:
        raise ConfigError("--verify needs transformers 4.56 or later: pip install transformers") from None
    model, report = AutoModelForImageTextToText.from_pretrained(
        exported.output, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ConfigError(
                f"{exported.output}: transformers reports {kind}: {sorted(map(str, report[kind]))[:5]}"
            )
    return model.eval(), AutoProcessor.from_pretrained(exported.output, local_files_only=True)


@contextmanager
def core_model(exported: Exported) -> Iterator[Any]:
    """The checkpoint in megatron-core's model, float32, evaluation mode, with nothing dropped for
    capacity.
    """
    given = exported.config  # of which only what the model computes counts, not how the run computed it
    plain = replace(
        given.moe,
        moe_expert_capacity_factor=None,
        moe_grouped_gemm=False,
        moe_token_dispatcher_type="alltoall",
    )
    config = RunConfig(
        language=given.language,
        vision=given.vision,
        moe=plain,
        data=given.data,
        train=TrainConfig(transformer_impl="local"),
    )
    with one_rank(config):
        yield _loaded(exported, config)


def _loaded(exported: Exported, config: RunConfig) -> Any:
    from megatron_evomoe.checkpoint import store
    from megatron_evomoe.model.build import build_modules

    [model] = build_modules(config, StageKind.ROUTE if exported.kind == StageKind.ROUTE else StageKind.DENSE)
    states, _ = store.load_weights(
        exported.source,
        [model.sharded_state_dict(metadata=store.metadata())],
        may_be_fresh=re.compile(r"(?!)"),
        may_be_left=None if exported.kind == StageKind.ROUTE else EVOLVING,
    )
    model.load_state_dict({k: v for k, v in states[0].items() if torch.is_tensor(v)}, strict=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, exported.dtype)))
    return model.eval()


def _core_answer(
    model: Any, sample: EncodedSample, pictures: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [s, V] of the true vocabulary on the CPU, and each mixture's choice [s, N]."""
    chosen: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if hasattr(module, "observer"):
            module.observer = lambda layer, token_types, logits, probs, routing: chosen.__setitem__(
                layer, routing.cpu()
            )
    where = next(model.parameters()).device
    tokens, token_types = (torch.tensor([x], device=where) for x in (sample.tokens, sample.token_types))
    logits = model(tokens, token_types, pictures.to(where))[0, :, : model.run_config.language.vocab_size]
    return logits.float().cpu(), [chosen[layer] for layer in sorted(chosen)]
