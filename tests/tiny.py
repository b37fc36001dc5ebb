"""A tiny model and random batches for tests that need no data on disk."""

from __future__ import annotations

from typing import Any

import torch

from megatron_evomoe.config import RunConfig, from_mapping
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.batch import MicroBatch
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.parallel.broadcast import Step

VOCAB = 64
IMAGE_TOKENS = 4

SMALL: dict[str, dict[str, Any]] = {
    "language": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 2,
        "vocab_size": VOCAB,
    },
    "vision": {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "ffn_hidden_size": 32,
    },
    "moe": {"dtr_hidden_size": 4, "dtr_rank": 4},
    "data": {"seq_length": 64},
    "train": {"micro_batch_size": 2, "global_batch_size": 4, "train_iters": 10},
}
"""A model of two layers (the second a mixture), 32 wide, and what it trains on; read only."""


def tiny_config(kind: str = "warmup", **sections: Any) -> RunConfig:
    """The configuration of a tiny model with one stage of `kind`.

    The model has two layers (the second a mixture), 32 wide. `sections` are merged over the configuration.
    """
    raw: dict[str, Any] = {
        **SMALL,
        "optimizer": {"lr": 1e-2, "lr_decay_style": "constant", "lr_warmup_fraction": 0.0},
        "stages": [{"name": kind}],
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values} if isinstance(values, dict) else values
    return from_mapping(raw)


def rows(
    images_per_row: list[int], *, seed: int = 0, length: int = 24, answer: tuple[int, ...] = (3,)
) -> dict[str, Any]:
    """One microbatch whose rows each have their images first, then text, then padding.

    The last `answer[i]` text tokens of a row are supervised.
    """
    g = torch.Generator().manual_seed(seed)
    b = len(images_per_row)
    tokens = torch.randint(4, VOCAB, (b, length), generator=g)
    types = torch.full((b, length), TokenType.TEXT)
    labels = torch.full((b, length), IGNORE_INDEX)
    for i, images in enumerate(images_per_row):
        start, end = 1, length - 2 - i % 3
        types[i, start : start + images * IMAGE_TOKENS] = TokenType.VISION
        types[i, end:] = TokenType.PADDING
        supervised = answer[i % len(answer)]
        labels[i, end - supervised : end] = torch.randint(4, VOCAB, (supervised,), generator=g)
    pixels = torch.randint(0, 256, (sum(images_per_row), 3, 16, 16), generator=g, dtype=torch.uint8)
    return {
        "tokens": tokens,
        "labels": labels,
        "token_types": types,
        "images": pixels,
        "keys": [f"sample-{seed}-{i}" for i in range(b)],
    }


def step_of(*microbatches: dict[str, Any]) -> Step:
    """One optimizer step of the given microbatches."""
    return Step(microbatches=[MicroBatch(**m) for m in microbatches])
