"""A sample as text, as PNG files, or as an item of a page: what the model sees, and what is supervised.

The supervised spans come from the labels and are decoded back, so what is shown is what the model learns.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.text import Text

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.batch import Row
from megatron_evomoe.data.conversation import IGNORE_INDEX, EncodedSample
from megatron_evomoe.data.tokenizer import Tokenizer
from megatron_evomoe.observe.data_page import ShownSample


def describe(row: Row, tokenizer: Tokenizer, tokens_per_image: int, *, colour: bool = False) -> Text:
    """A sample's key, counts and text. Supervised spans are green, or in ⟦ ⟧ without colour."""
    out = Text(f"{row.key} of {row.shard}\n", style="bold" if colour else "")
    if row.sample is None:
        reason, message = row.problem or ("unknown", "")
        return out.append(f"skipped: {reason}: {message}", style="red" if colour else "")
    out.append(f"{_facts(row, row.sample)}\n", style="dim" if colour else "")
    for text, is_supervised in spans(row.sample, tokenizer, tokens_per_image):
        if is_supervised:
            text = text if colour else f"⟦{text}⟧"
        out.append(text, style="bold green" if colour and is_supervised else "")
    return out


def shown(row: Row, answer: str | None, tokenizer: Tokenizer, tokens_per_image: int) -> ShownSample:
    """A sample for a page; `answer` is what a held-out question expects."""
    title = f"{row.key} of {row.shard}"
    if row.sample is None:
        return ShownSample(title, problem=": ".join(row.problem or ("unknown", "")))
    return ShownSample(
        title,
        _facts(row, row.sample),
        spans(row.sample, tokenizer, tokens_per_image),
        [_hwc(image) for image in row.images],
        expected=answer,
    )


def _facts(row: Row, sample: EncodedSample) -> str:
    images = ", ".join(f"{image.shape[2]} x {image.shape[1]}" for image in row.images) or "none"
    return (
        f"{len(sample.tokens)} tokens: {sample.token_types.count(TokenType.VISION)} vision, "
        f"{sample.num_supervised} supervised; images: {images}"
    )


def spans(sample: EncodedSample, tokenizer: Tokenizer, tokens_per_image: int) -> list[tuple[str, bool]]:
    """The text of a sample in spans, each with whether it is supervised.

    A token is supervised if the label at the position before it is its id.
    """
    supervised = [False, *(label != IGNORE_INDEX for label in sample.labels[:-1])]
    kinds = zip(sample.token_types, supervised, sample.tokens, strict=True)
    found = []
    for (kind, is_supervised), group in groupby(kinds, key=lambda item: item[:2]):
        ids = [token for _, _, token in group]
        if kind == TokenType.VISION:
            found.append(("<image>" * (len(ids) // tokens_per_image), False))
        else:
            found.append((_decode_visibly(ids, tokenizer), is_supervised))
    return found


def _decode_visibly(ids: list[int], tokenizer: Tokenizer) -> str:
    """Decode tokens, and write out the special tokens that `decode` would drop."""
    names = {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"}
    known = {
        piece: tokenizer.special_id(piece)
        for piece in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>")
    }
    names |= {i: piece for piece, i in known.items() if i is not None}
    text = ""
    for special, group in groupby(ids, key=names.get):
        run_of_ids = list(group)
        text += special * len(run_of_ids) if special else tokenizer.decode(run_of_ids)
    return text


def save_images(row: Row, folder: Path) -> list[Path]:
    """Write the processed images, uint8 [3, S, S] each, as PNG files named by the sample's key."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, image in enumerate(row.images):
        paths.append(
            folder / f"{row.key.replace('/', '_')[-60:]}.{i}.png"
        )  # a key may be longer than a file's name
        Image.fromarray(_hwc(image)).save(paths[-1])
    return paths


def _hwc(image: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
