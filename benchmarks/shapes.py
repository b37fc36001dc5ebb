"""Models and batches for the benchmarks of whole training steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_evomoe.config import RunConfig, from_mapping
from megatron_evomoe.config.presets import LANGUAGE_PRESETS
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.batch import MicroBatch
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.parallel import backend
from megatron_evomoe.parallel.broadcast import Step
from megatron_evomoe.plan import fp8, layout
from megatron_evomoe.plan.activations import activation_bytes
from megatron_evomoe.plan.states import states_of

MODELS = {"1.8b": "qwen-1.8b", "7b": "openchat-7b"}
"""Preset of each model, by its name in the tables."""

STAGES = ("align", "warmup", "evolve", "route")
USABLE = 0.85
"""Share of the device's memory that the models may fill; their layers are cut until they fit.

The rest is for the allocator and for short-lived tensors.
"""


def model_config(
    model: str,
    layers: int,
    *,
    tiny: bool,
    seq_length: int,
    micro_batch: int,
    microbatches: int,
    precision: str = "bf16",
    **sections: Any,
) -> RunConfig:
    """Configuration of a run of the four stages.

    `tiny` takes the smallest preset whatever `model` is. `sections` override the other arguments.
    """
    raw: dict[str, Any] = {
        "preset": "tiny" if tiny else MODELS[model],
        "language": {"num_layers": layers, **({"vocab_size": 256} if tiny else {})},
        "moe": {},
        "data": {"seq_length": seq_length},
        "optimizer": {"lr": 1e-4, "lr_decay_style": "constant", "lr_warmup_fraction": 0.0},
        "train": {
            "bf16": True,
            "micro_batch_size": micro_batch,
            "global_batch_size": micro_batch * microbatches,
            "train_iters": 1000,
        },
        "gpu": {"fp8_format": "hybrid"} if precision == "fp8" else {},
        "stages": [{"name": kind} for kind in STAGES],
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return from_mapping(raw)


def random_step(config: RunConfig) -> Step:
    """Samples of one optimizer step: full sequences without padding.

    Each sequence is an image followed by text, whose second half is supervised.
    """
    generator = torch.Generator().manual_seed(0)
    b, s = config.train.micro_batch_size, config.data.seq_length
    m, images = config.train.global_batch_size // b, config.vision.tokens_per_image
    tokens = torch.randint(0, config.language.vocab_size, (m, b, s), generator=generator)
    labels = torch.randint(0, config.language.vocab_size, (m, b, s), generator=generator)
    labels[..., : images + (s - images) // 2] = IGNORE_INDEX
    types = torch.full((m, b, s), TokenType.TEXT)
    types[..., 1 : 1 + images] = TokenType.VISION
    pixels = torch.randint(
        0, 256, (m, b, 3, *(config.vision.image_size,) * 2), dtype=torch.uint8, generator=generator
    )
    where = backend.device()
    parts = zip(tokens.to(where), labels.to(where), types.to(where), pixels.to(where), strict=True)
    return Step(
        microbatches=[
            MicroBatch(tokens=t, labels=labels_of, token_types=types_of, images=images_of)
            for t, labels_of, types_of, images_of in parts
        ]
    )


def planned_bytes(config: RunConfig, kind: str) -> int:
    """Bytes on one device that `plan` predicts: states, activations, and the FP8 copies of weights."""
    return _held_bytes(config, kind) + activation_bytes(config, kind, 0, layout.microbatches(config, 1))


def layers_that_fit(model: str, memory: float, precisions: Sequence[str], **options: Any) -> int:
    """Largest number of layers, in steps of two, with which every stage fits the device.

    These must fit side by side: a bare model in bf16, one model per precision, and the activations of one
    model.
    """
    layers = LANGUAGE_PRESETS[MODELS[model]]["num_layers"]
    while layers > 2:
        configs = [
            model_config(model, layers, tiny=False, precision=p, **options) for p in ("bf16", *precisions)
        ]
        if all(_side_by_side(configs, kind) <= USABLE * memory for kind in STAGES):
            break
        layers -= 2
    return layers


def _side_by_side(configs: list[RunConfig], kind: str) -> int:
    configs = [config.for_stage(kind) for config in configs]
    held = sum(_held_bytes(config, kind) for config in configs)
    return held + max(activation_bytes(config, kind, 0, layout.microbatches(config, 1)) for config in configs)


def _held_bytes(config: RunConfig, kind: str) -> int:
    """Bytes that a model holds between steps."""
    return states_of(config, kind, world_size=1, pp_rank=0).total_bytes + fp8.weight_bytes(config, kind, 0)
