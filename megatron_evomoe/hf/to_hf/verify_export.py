"""Checks an export: compares megatron-core's model of the checkpoint with transformers' of the directory.

Both get the same prompts and images. Token ids, pixels, logits and chosen experts are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from megatron_evomoe.hf import register, verification
from megatron_evomoe.hf.tensor_map import EVOLVING
from megatron_evomoe.hf.to_hf.exporting import Exported
from megatron_evomoe.hf.verification import Row, difference

PIXELS = 1.0
"""Largest accepted mean difference of pixels, out of 255. transformers resizes with PIL, training with torch.
"""
AGREEMENT = 0.999
"""Smallest accepted share of positions with the same most likely token, or the same experts.

Of two nearly equal logits either may be the larger one.
"""
_QUESTION = "What is in this picture?"
_IMAGES = (1, 0, 2)


def compare(exported: Exported) -> list[Row]:
    """Compare both models on prompts with one image, none and two, and return the rows of the table.

    If the process has no process groups, groups of one rank exist for the duration of the call.

    Raises:
        ConfigError: transformers is not installed, or finds other tensors in the directory than it expects.
    """
    theirs, processor = _load_export(exported)
    pictures = [_picture(i) for i in range(max(_IMAGES))]
    rows: list[Row] = []
    with core_model(exported) as ours, torch.no_grad():
        for count in _IMAGES:
            rows += _compare_prompt(exported, ours, theirs, processor, pictures[:count])
    return rows


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
        error = ((batch["pixel_values"] - pixels).abs() * scale).mean().item()
        yield Row(f"{name}: pixels, mean difference", f"{error:.3f} of 255", f"{PIXELS:g}", error <= PIXELS)
    logits, experts = _core_answer(ours, sample, stacked)
    answer = theirs(
        input_ids=torch.tensor([wanted]),
        **({"pixel_values": pixels} if pictures else {}),
        **({"output_router_logits": True} if experts else {}),
    )
    got = answer.logits[0, :, : logits.shape[1]]
    yield difference(f"{name}: logits", got, logits)
    agree = (got.argmax(-1) == logits.argmax(-1)).float().mean().item()
    yield Row(
        f"{name}: most likely token",
        f"{100 * agree:.1f} % equal",
        f"{100 * AGREEMENT:g} %",
        agree >= AGREEMENT,
    )
    router_logits = answer.router_logits if experts else ()
    for i, (routing, of_theirs) in enumerate(zip(experts, router_logits, strict=True)):
        chosen = of_theirs.topk(config.moe.moe_router_topk).indices
        mask = torch.zeros_like(of_theirs).scatter(1, chosen, 1).bool()
        equal = int((mask == routing).all(-1).sum())
        yield Row(
            f"{name}: experts in mixture {i + 1}",
            f"{equal} of {len(routing)} tokens equal",
            f"{100 * AGREEMENT:g} %",
            equal >= AGREEMENT * len(routing),
        )


def _our_prompt(config: RunConfig, images: int) -> EncodedSample:
    """The question as training encodes it."""
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
    """A smooth random picture, uint8 [H, W, 3], whose sides differ from the model's input size."""
    noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed)) * 255
    wide = torch.nn.functional.interpolate(noise, size=(90 + 30 * seed, 140), mode="bicubic").clamp(0, 255)
    return wide[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


def _load_export(exported: Exported) -> tuple[Any, Any]:
    """The exported model in float32 and its processor.

    They are loaded through the installed classes; no code in the directory is run.
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
    """megatron-core's model of the checkpoint, with weights rounded to the export's dtype.

    No token is dropped for capacity, as in the exported model.
    """
    given = exported.config
    plain_moe = replace(
        given.moe,
        moe_expert_capacity_factor=None,
        moe_grouped_gemm=False,
        moe_token_dispatcher_type="alltoall",
    )
    # The sections that define what the model computes; how the run computed it does not matter here.
    config = RunConfig(
        language=given.language,
        vision=given.vision,
        moe=plain_moe,
        data=given.data,
        train=TrainConfig(transformer_impl="local"),
    )
    is_routed = exported.kind == StageKind.ROUTE
    with verification.core_model(
        exported.source, config, exported.kind, may_be_left=None if is_routed else EVOLVING
    ) as model:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, exported.dtype)))
        yield model


def _core_answer(
    model: Any, sample: EncodedSample, images: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [s, V] on the CPU, and for each mixture the experts of each token, bool [s, N]."""
    chosen: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if hasattr(module, "observer"):
            module.observer = lambda layer, token_types, logits, probs, routing: chosen.__setitem__(
                layer, routing.cpu()
            )
    where = next(model.parameters()).device
    tokens, token_types = (torch.tensor([x], device=where) for x in (sample.tokens, sample.token_types))
    logits = model(tokens, token_types, images.to(where))[0, :, : model.run_config.language.vocab_size]
    return logits.float().cpu(), [chosen[layer] for layer in sorted(chosen)]
