"""``inspect-data``: show samples as the model sees them, with the supervised text marked.

The supervised spans come from the labels and are decoded back, so what is shown is what the model learns.
With ``--config`` the samples are prepared as that run prepares them, stage by stage where its stages differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.text import Text

from megatron_evomoe.config import ConfigError, RunConfig, add_flags, flags_from, from_mapping, load_config
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.batch import EvalSample, Preparer, Row, prepare_eval
from megatron_evomoe.data.conversation import IGNORE_INDEX, TEMPLATES, EncodedSample, check_template
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.image import processor_for
from megatron_evomoe.data.order import SampleOrder
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.tokenizer import Tokenizer, build_tokenizer

# our own flag -> the run's
_ALIASES = {
    "template": "conversation_template",
    "image_size": "vision_image_size",
    "patch_size": "vision_patch_size",
    "vision_model": "vision_model_type",
}
_WITHOUT_CONFIG = {"vision": {"image_size": 336, "patch_size": 14}}  # LLaVA-1.5's
_SEEN = (
    "train_data",
    "eval_data",
    "tokenizer",
    "conversation_template",
    "seq_length",
    "long_samples",
    "image_aspect_ratio",
    "max_image_pixels",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--config", help="a run's YAML file: show samples as this run would see them")
    parser.add_argument(
        "--stage", action="append", help="with --config: only this stage (may be given several times)"
    )
    parser.add_argument(
        "--eval",
        action="store_true",
        help="show the held-out questions (eval_data) instead of the training samples",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SHARDS",
        help="shards: paths, brace ranges, globs or folders of tar files",
    )
    parser.add_argument("--template", choices=sorted(TEMPLATES), help="conversation template (default v1)")
    parser.add_argument("--num", type=int, default=4, help="samples to show (default %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="position to start at (default %(default)s)")
    parser.add_argument(
        "--stored-order",
        action="store_true",
        help="show samples in stored order, not in the training order of the run or shuffled by --seed",
    )
    parser.add_argument("--image-size", type=int, help="side of the model's input in pixels (default 336)")
    parser.add_argument("--patch-size", type=int, help="side of a patch in pixels (default 14)")
    parser.add_argument(
        "--vision-model",
        choices=["clip", "siglip"],
        help="vision tower, which decides the padding colour (default clip)",
    )
    parser.add_argument(
        "--output", type=Path, help="folder for PNG files of the images as the model sees them"
    )
    parser.add_argument(
        "--preset", dest="cfg_preset", help="named model shape, or the model.yaml of an import"
    )
    add_flags(
        parser.add_argument_group("configuration fields as for `train`; flags take precedence over the file")
    )


def run(args: argparse.Namespace) -> int:
    """Print the samples; returns 1 if none of them is usable.

    Raises:
        ConfigError: the configuration, shards, tokenizer or template do not exist or fit.
    """
    config, flags = _config(args)
    console = Console(soft_wrap=True)
    in_order = not (args.stored_order or args.eval) and (args.config is not None or "seed" in flags)
    views = _views(config, args.stage, in_order)
    usable = 0
    for names, view in views:
        if args.config:
            console.print(_header(names, view, in_order), style="bold", markup=False, highlight=False)
        output = args.output / names[0] if args.output and len(views) > 1 else args.output
        key = config.order_key(names[0]) if names else ""
        order = partial(SampleOrder, seed=view.train.seed, shuffle=in_order, key=key)
        usable += _show(view, args, console, output, order)
        if len(views) > 1:
            console.print()
    return 0 if usable or not args.num else 1


def _config(args: argparse.Namespace) -> tuple[RunConfig, dict[str, Any]]:
    flags = flags_from(args)
    flags |= {name: value for alias, name in _ALIASES.items() if (value := getattr(args, alias)) is not None}
    if args.data:
        flags["eval_data" if args.eval else "train_data"] = args.data
    if min(args.start, args.num) < 0:
        raise ConfigError(f"--start {args.start} and --num {args.num} must not be negative")
    if args.config is None and args.stage:
        raise ConfigError(f"--stage {args.stage[0]} is a stage of a run; give the run's file with --config")
    return load_config(args.config, flags) if args.config else from_mapping(_WITHOUT_CONFIG, flags), flags


def _views(config: RunConfig, wanted: list[str] | None, in_order: bool) -> list[tuple[list[str], RunConfig]]:
    """Group the stages that prepare samples alike: the names of a group and its configuration.

    A run without stages is one group without names. With `in_order`, a group also has one order of samples.
    """
    if not config.stages and not wanted:
        return [([], config)]
    views: list[tuple[list[str], RunConfig]] = []
    for name in wanted or [stage.name for stage in config.stages]:
        found = config.for_stage(name)
        same = next(
            (
                names
                for names, other in views
                if _seen(other) == _seen(found)
                and (not in_order or config.order_key(names[0]) == config.order_key(name))
            ),
            None,
        )
        if same is not None:
            same.append(name)
        else:
            views.append(([name], found))
    return views


def _seen(config: RunConfig) -> tuple:
    """All fields that samples depend on."""
    data = asdict(config.data)
    return *(data[name] for name in _SEEN), asdict(config.vision), config.train.seed


def _header(names: list[str], config: RunConfig, in_order: bool) -> str:
    data, vision = config.data, config.vision
    who = f"stage{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else "the run"
    return (
        f"{who}: template {data.conversation_template}, {vision.image_size} x {vision.image_size} pixels "
        f"({data.image_aspect_ratio}, {vision.model_type}), {vision.tokens_per_image} tokens an image, "
        "seq_length "
        f"{data.seq_length} (longer: {data.long_samples}), tokenizer {data.tokenizer}, "
        + (f"training order of seed {config.train.seed}" if in_order else "stored order")
    )


def _show(
    config: RunConfig,
    args: argparse.Namespace,
    console: Console,
    output: Path | None,
    order_of: Callable[[int], SampleOrder],
) -> int:
    """Print samples as `config` prepares them, and return the number of usable ones."""
    paths = config.data.eval_data if args.eval else config.data.train_data
    if not paths:
        raise ConfigError(
            f"no shards to show; set {'eval_data' if args.eval else 'train_data'} in the run's file, or give "
            "--data"
        )
    tokenizer = build_tokenizer(config.data.tokenizer)
    check_template(tokenizer, config.data.conversation_template)
    dataset = ShardDataset(paths)
    order = order_of(len(dataset))
    console.print(f"{len(dataset)} samples in {len(dataset.paths)} shards", style="bold", highlight=False)
    rows = _questions(dataset, tokenizer, config) if args.eval else _training_rows(dataset, tokenizer, config)
    usable = 0
    for position in range(args.start, args.start + args.num):
        for row, answer in rows(order.index(position)):
            usable += row.sample is not None
            console.print()
            text = describe(row, tokenizer, config.vision.tokens_per_image, colour=console.is_terminal)
            console.print(text.append(f"\nexpected: {answer}") if answer is not None else text)
            for path in save_images(row, output) if output is not None else ():
                console.print(f"wrote {path}", markup=False, highlight=False)
    return usable


def _training_rows(
    dataset: ShardDataset, tokenizer: Tokenizer, config: RunConfig
) -> Callable[[int], list[tuple[Row, None]]]:
    preparer = Preparer.from_config(
        dataset,
        tokenizer,
        processor_for(config),
        config.data,
        template=config.data.conversation_template,
        tokens_per_image=config.vision.tokens_per_image,
    )
    return lambda i: [(preparer.row(i), None)]


def _questions(
    dataset: ShardDataset, tokenizer: Tokenizer, config: RunConfig
) -> Callable[[int], list[tuple[Row, str | None]]]:
    """A function from a sample's index to its held-out questions and their expected answers."""
    processor = processor_for(config)

    def found(i: int) -> list[tuple[Row, str | None]]:
        key, shard = dataset.key(i), str(dataset.shard(i))
        try:
            samples: list[EvalSample] = prepare_eval(
                dataset.read(i),
                tokenizer,
                processor,
                config.data.conversation_template,
                config.vision.tokens_per_image,
                max_image_pixels=config.data.max_image_pixels,
            )
        except SampleError as error:
            return [(Row(key, shard, None, problem=(error.reason, error.message)), None)]
        return [
            (Row(f"{key}.{turn}", shard, s.prompt, list(s.images)), s.answer)
            for turn, s in enumerate(samples)
        ]

    return found


def describe(row: Row, tokenizer: Tokenizer, tokens_per_image: int, *, colour: bool = False) -> Text:
    """A sample's key, counts and text. Supervised spans are green, or in ⟦ ⟧ without colour."""
    out = Text(f"{row.key} of {row.shard}\n", style="bold" if colour else "")
    if row.sample is None:
        reason, message = row.problem or ("unknown", "")
        return out.append(f"skipped: {reason}: {message}", style="red" if colour else "")
    sample = row.sample
    images = ", ".join(f"{image.shape[2]} x {image.shape[1]}" for image in row.images) or "none"
    out.append(
        f"{len(sample.tokens)} tokens: {sample.token_types.count(TokenType.VISION)} vision, "
        f"{sample.num_supervised} supervised; images: {images}\n",
        style="dim" if colour else "",
    )
    for text, is_supervised in spans(sample, tokenizer, tokens_per_image):
        if is_supervised:
            text = text if colour else f"⟦{text}⟧"
        out.append(text, style="bold green" if colour and is_supervised else "")
    return out


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
