"""``inspect-data``: samples as the model gets them, the supervised spans marked.

The spans come from the labels and are decoded back, so what is shown is what is learned, not what the code meant to do.
"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.text import Text

from megatron_evomoe.config import DataConfig, VisionConfig
from megatron_evomoe.data.batch import Preparer, Row
from megatron_evomoe.data.conversation import IGNORE_INDEX, TEMPLATES, VISION, EncodedSample, check_template
from megatron_evomoe.data.image import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD, ImageProcessor
from megatron_evomoe.data.order import SampleOrder
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.tokenizer import Tokenizer, build_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``inspect-data``."""
    parser.add_argument("--data", required=True, nargs="+", metavar="SHARDS", help="paths, brace ranges, globs or folders of tars")
    parser.add_argument("--tokenizer", required=True, help="sentencepiece .model file or Hugging Face tokenizer directory")
    parser.add_argument("--template", default="v1", choices=sorted(TEMPLATES), help="conversation template (default %(default)s)")
    parser.add_argument("--num", type=int, default=4, help="samples to show (default %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="position to start at (default %(default)s)")
    parser.add_argument("--seed", type=int, help="show them in the training order of this seed; left out: in stored order")
    parser.add_argument("--image-size", type=int, default=336, help="side of the model's input, pixels (default %(default)s)")
    parser.add_argument("--patch-size", type=int, default=14, help="side of a patch, pixels (default %(default)s)")
    parser.add_argument("--vision-model", default="clip", choices=["clip", "siglip"],
                        help="for the padding colour (default %(default)s)")
    parser.add_argument("--image-aspect-ratio", default="pad", choices=("pad", "square"), help="(default %(default)s)")
    parser.add_argument("--seq-length", type=int, default=2048, help="longer samples are shown as skipped (default %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for the images as the model sees them, as PNG")


def run(args: argparse.Namespace) -> int:
    """Print the samples; 1 when none of them is usable.

    Raises:
        ConfigError: shards, tokenizer or template do not exist or fit.
    """
    console = Console(soft_wrap=True)
    tokenizer = build_tokenizer(args.tokenizer)
    check_template(tokenizer, args.template)
    dataset = ShardDataset(args.data)
    vision = VisionConfig(model_type=args.vision_model, image_size=args.image_size, patch_size=args.patch_size)
    mean, std = (SIGLIP_MEAN, SIGLIP_STD) if args.vision_model == "siglip" else (CLIP_MEAN, CLIP_STD)
    processor = ImageProcessor(args.image_size, args.image_aspect_ratio, mean, std)
    preparer = Preparer.from_config(dataset, tokenizer, processor, DataConfig(seq_length=args.seq_length),
                                    template=args.template, tokens_per_image=vision.tokens_per_image)
    order = SampleOrder(len(dataset), args.seed or 0, shuffle=args.seed is not None)
    console.print(f"{len(dataset)} samples in {len(dataset.paths)} shards", style="bold", highlight=False)
    usable = 0
    for position in range(args.start, args.start + args.num):
        row = preparer.row(order.index(position))
        usable += row.sample is not None
        console.print()
        console.print(describe(row, tokenizer, vision.tokens_per_image, colour=console.is_terminal))
        if args.output is not None:
            for path in save_images(row, args.output):
                console.print(f"wrote {path}", markup=False, highlight=False)
    return 0 if usable or not args.num else 1


def describe(row: Row, tokenizer: Tokenizer, tokens_per_image: int, *, colour: bool = False) -> Text:
    """Key, counts and the text with supervised spans green, or in ⟦ ⟧ where there is no colour."""
    out = Text(f"{row.key} of {row.shard}\n", style="bold" if colour else "")
    if row.sample is None:
        reason, message = row.problem or ("unknown", "")
        return out.append(f"skipped: {reason}: {message}", style="red" if colour else "")
    sample = row.sample
    images = ", ".join(f"{image.shape[2]} x {image.shape[1]}" for image in row.images) or "none"
    out.append(f"{len(sample.tokens)} tokens: {sample.token_types.count(VISION)} vision, {sample.num_supervised} supervised; "
               f"images: {images}\n", style="dim" if colour else "")
    for text, is_supervised in spans(sample, tokenizer, tokens_per_image):
        if is_supervised:
            text = text if colour else f"⟦{text}⟧"
        out.append(text, style="bold green" if colour and is_supervised else "")
    return out


def spans(sample: EncodedSample, tokenizer: Tokenizer, tokens_per_image: int) -> list[tuple[str, bool]]:
    """(text, whether it is supervised) in order. A token is supervised when the label one position before it is its id."""
    supervised = [False, *(label != IGNORE_INDEX for label in sample.labels[:-1])]
    kinds = zip(sample.token_types, supervised, sample.tokens, strict=True)
    found = []
    for (kind, is_supervised), group in groupby(kinds, key=lambda item: item[:2]):
        ids = [token for _, _, token in group]
        if kind == VISION:
            found.append(("<image>" * (len(ids) // tokens_per_image), False))
        else:
            found.append((_decode_visibly(ids, tokenizer), is_supervised))
    return found


def _decode_visibly(ids: list[int], tokenizer: Tokenizer) -> str:
    """Text with the special tokens spelled out, which `decode` drops."""
    names = {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"}
    known = {piece: tokenizer.special_id(piece) for piece in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>")}
    names |= {i: piece for piece, i in known.items() if i is not None}
    text = ""
    for special, group in groupby(ids, key=names.get):
        run_of_ids = list(group)
        text += special * len(run_of_ids) if special else tokenizer.decode(run_of_ids)
    return text


def save_images(row: Row, folder: Path) -> list[Path]:
    """The processed images, uint8 [3, S, S] each, as PNG files named by key."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, image in enumerate(row.images):
        paths.append(folder / f"{row.key.replace('/', '_')}.{i}.png")
        Image.fromarray(_hwc(image)).save(paths[-1])
    return paths


def _hwc(image: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
