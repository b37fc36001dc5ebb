"""``inspect-data``: show samples as the model sees them, with the supervised text marked.

``--html`` writes a page with samples and figures of the whole data set, ``--lengths`` counts the lengths that
packing needs, before a job is sent. With ``--config`` the samples are prepared as that run prepares them,
stage by stage where its stages differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_evomoe.config import ConfigError, RunConfig, add_flags, flags_from, from_mapping, load_config
from megatron_evomoe.config.arguments import whole
from megatron_evomoe.data.batch import EvalSample, Preparer, Row, prepare_eval
from megatron_evomoe.data.conversation import TEMPLATES, check_template
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.files import write_atomically
from megatron_evomoe.data.image import processor_for
from megatron_evomoe.data.lengths import Lengths, open_lengths
from megatron_evomoe.data.order import SampleOrder
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.tokenizer import Tokenizer, build_tokenizer
from megatron_evomoe.observe.console import plain_table
from megatron_evomoe.observe.data_page import Section, data_page
from megatron_evomoe.observe.data_report import DataReport
from megatron_evomoe.observe.samples import describe, save_images, shown

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
    parser.add_argument("--num", type=int, help="samples to show (default 4, with --html 24)")
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
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page instead: samples with their pictures, lengths, padding, duplicates, and what is "
        "left out",
    )
    parser.add_argument(
        "--lengths",
        action="store_true",
        help="count the lengths of all samples, which packing needs and keeps beside the shards, and show "
        "what they mean for the run instead of samples",
    )
    parser.add_argument(
        "--processes",
        type=whole(1, 1024),
        help="processes that count lengths (default: one for each core)",
    )
    parser.add_argument(
        "--replicas",
        type=whole(1),
        default=1,
        help="data-parallel size for which --html and --lengths compute the padding (default 1)",
    )
    parser.add_argument(
        "--preset", dest="cfg_preset", help="named model shape, or the model.yaml of an import"
    )
    add_flags(
        parser.add_argument_group("configuration fields as for `train`; flags take precedence over the file")
    )


def run(args: argparse.Namespace) -> int:
    """Print samples, or write or print the report; returns 1 if no sample is usable.

    Raises:
        ConfigError: the configuration, shards, tokenizer or template do not exist or fit.
        DataError: lengths cannot be written, because the disk is full.
    """
    config, flags = _config(args)
    console = Console(soft_wrap=True)
    is_report = args.html is not None or args.lengths
    in_order = not (args.stored_order or args.eval) and (args.config is not None or "seed" in flags)

    def alike(name: str, view: RunConfig) -> tuple:
        seen = _seen_in_report(view) if is_report else _seen(view)
        return *seen, config.order_key(name) if in_order else ""

    views = _views(config, args.stage, alike)
    usable, sections = 0, []
    for names, view in views:
        header = _header(names, view, in_order)
        if args.config:
            console.print(header, style="bold", markup=False, highlight=False)
        key = config.order_key(names[0]) if names else ""
        order = partial(SampleOrder, seed=view.train.seed, shuffle=in_order, key=key)
        source = _Source.of(view, args.eval, order)
        console.print(
            f"{len(source.dataset)} samples in {len(source.dataset.paths)} shards",
            style="bold",
            highlight=False,
        )
        output = args.output / names[0] if args.output and len(views) > 1 else args.output
        if is_report:
            section, found = _reported(source, args, console, header)
            sections.append(section)
            usable += found
        else:
            usable += _show(source, args, console, output)
        if len(views) > 1:
            console.print()
    if args.html is not None:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        page = data_page(f"Data of {args.config or ', '.join(config.data.train_data)}", sections)
        write_atomically(args.html, page.encode())
        console.print(f"wrote {args.html}", markup=False, highlight=False)
    return 0 if usable or not args.num else 1


def _config(args: argparse.Namespace) -> tuple[RunConfig, dict[str, Any]]:
    flags = flags_from(args)
    flags |= {name: value for alias, name in _ALIASES.items() if (value := getattr(args, alias)) is not None}
    if args.data:
        flags["eval_data" if args.eval else "train_data"] = args.data
    if args.num is None:
        args.num = 24 if args.html else 4
    if args.lengths and args.eval:
        raise ConfigError("--lengths is about training samples; leave --eval out")
    if min(args.start, args.num) < 0:
        raise ConfigError(f"--start {args.start} and --num {args.num} must not be negative")
    if args.config is None and args.stage:
        raise ConfigError(f"--stage {args.stage[0]} is a stage of a run; give the run's file with --config")
    return load_config(args.config, flags) if args.config else from_mapping(_WITHOUT_CONFIG, flags), flags


def _views(
    config: RunConfig, wanted: list[str] | None, alike: Callable[[str, RunConfig], tuple]
) -> list[tuple[list[str], RunConfig]]:
    """Group the stages for which `alike` is the same: the names of a group and its configuration.

    A run without stages is one group without names.
    """
    if not config.stages and not wanted:
        return [([], config)]
    views: list[tuple[list[str], RunConfig]] = []
    for name in wanted or [stage.name for stage in config.stages]:
        found = config.for_stage(name)
        same = next((names for names, other in views if alike(names[0], other) == alike(name, found)), None)
        if same is not None:
            same.append(name)
        else:
            views.append(([name], found))
    return views


def _seen(config: RunConfig) -> tuple:
    """All fields that samples depend on."""
    data = asdict(config.data)
    return *(data[name] for name in _SEEN), asdict(config.vision), config.train.seed


def _seen_in_report(config: RunConfig) -> tuple:
    """All fields that the report depends on."""
    data, train = config.data, config.train
    batches = train.micro_batch_size, train.global_batch_size
    return *_seen(config), *batches, data.packing, data.packing_replicas, data.pad_to_seq_length


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


@dataclass
class _Source:
    """The samples of a configuration, and how they are prepared."""

    config: RunConfig
    dataset: ShardDataset
    tokenizer: Tokenizer
    order: SampleOrder
    is_eval: bool

    @classmethod
    def of(cls, config: RunConfig, is_eval: bool, order_of: Callable[[int], SampleOrder]) -> _Source:
        paths = config.data.eval_data if is_eval else config.data.train_data
        if not paths:
            raise ConfigError(
                f"no shards to show; set {'eval_data' if is_eval else 'train_data'} in the run's file, or "
                "give --data"
            )
        tokenizer = build_tokenizer(config.data.tokenizer)
        check_template(tokenizer, config.data.conversation_template)
        dataset = ShardDataset(paths)
        return cls(config, dataset, tokenizer, order_of(len(dataset)), is_eval)

    def preparer(self) -> Preparer:
        """What makes rows of training samples."""
        return Preparer.from_config(
            self.dataset,
            self.tokenizer,
            processor_for(self.config),
            self.config.data,
            template=self.config.data.conversation_template,
            tokens_per_image=self.config.vision.tokens_per_image,
        )

    def lengths(self, args: argparse.Namespace, say: Callable[[str], None]) -> Lengths:
        """The lengths of all samples, where training looks for them."""
        save = self.config.checkpoint.save
        return open_lengths(
            self.dataset,
            self.tokenizer,
            self.config.data,
            self.config.vision.tokens_per_image,
            folder=Path(save) if save else args.html and args.html.parent,
            workers=args.processes,
            say=say,
        )

    def rows(self, start: int, count: int) -> Iterator[tuple[Row, str | None]]:
        """The samples at some positions of the order; of held-out ones each question and its answer."""
        row = _questions(self) if self.is_eval else None
        preparer = self.preparer()
        for position in range(start, start + count):
            i = self.order.index(position)
            yield from row(i) if row is not None else [(preparer.row(i), None)]


def _show(source: _Source, args: argparse.Namespace, console: Console, output: Path | None) -> int:
    """Print samples, and return the number of usable ones."""
    usable, tokens_per_image = 0, source.config.vision.tokens_per_image
    for row, answer in source.rows(args.start, args.num):
        usable += row.sample is not None
        console.print()
        text = describe(row, source.tokenizer, tokens_per_image, colour=console.is_terminal)
        console.print(text.append(f"\nexpected: {answer}") if answer is not None else text)
        for path in save_images(row, output) if output is not None else ():
            console.print(f"wrote {path}", markup=False, highlight=False)
    return usable


def _reported(
    source: _Source, args: argparse.Namespace, console: Console, header: str
) -> tuple[Section, int]:
    """The section of a page, and whether it shows or counts a usable sample."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    section, usable = Section(header.partition(":")[0], header), 0
    if not source.is_eval:
        lengths = source.lengths(args, say)
        report = DataReport(source.config, lengths, source.order, source.preparer(), args.replicas)
        usable += int(report.summary.kept.any())
        if args.lengths:
            say(f"lengths: {lengths.path}")
            for table in filter(lambda table: table.rows, report.tables()):
                rows = [[cell.partition("; ")[0] for cell in row] for row in table.rows]  # one example
                say(plain_table(f"\n{table.title}. {table.note}", table.columns, rows))
        if args.html is not None:
            section.parts = report.parts(say)
    if args.html is not None:
        for row, answer in source.rows(args.start, args.num):
            usable += row.sample is not None
            section.samples.append(
                shown(row, answer, source.tokenizer, source.config.vision.tokens_per_image)
            )
    return section, usable


def _questions(source: _Source) -> Callable[[int], list[tuple[Row, str | None]]]:
    """A function from a sample's index to its held-out questions and their expected answers."""
    config, dataset, processor = source.config, source.dataset, processor_for(source.config)

    def found(i: int) -> list[tuple[Row, str | None]]:
        key, shard = dataset.key(i), str(dataset.shard(i))
        try:
            samples: list[EvalSample] = prepare_eval(
                dataset.read(i),
                source.tokenizer,
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
