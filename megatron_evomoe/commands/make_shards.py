"""``make-shards``: convert a LLaVA JSON file and a folder of images to webdataset shards."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_evomoe.config.arguments import whole
from megatron_evomoe.data.make_shards import make_shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--json",
        required=True,
        type=Path,
        help="LLaVA JSON: a list of {id, image?, conversations}; .jsonl too",
    )
    parser.add_argument(
        "--images", type=Path, help="folder that the image paths are relative to; not needed for text only"
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="folder for shard-000000.tar … and report.json"
    )
    parser.add_argument(
        "--samples-per-shard",
        type=whole(1),
        default=1000,
        help="input records per shard (default %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=whole(1, 1024),
        default=os.cpu_count() or 1,
        help="processes (default: all cores, %(default)s)",
    )
    parser.add_argument(
        "--max-image-pixels",
        type=whole(1),
        default=50_000_000,
        help="larger images are skipped (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the shards; returns 1 if no sample at all was usable."""
    usable = make_shards(
        args.json,
        args.images,
        args.output,
        samples_per_shard=args.samples_per_shard,
        workers=args.workers,
        max_image_pixels=args.max_image_pixels,
    )
    return 0 if usable else 1
