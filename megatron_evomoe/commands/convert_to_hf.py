"""``convert-to-hf``: convert a checkpoint to a Hugging Face directory (see docs/huggingface.md)."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_evomoe.hf.dtypes import DTYPES
from megatron_evomoe.hf.to_hf.exporting import Exported, Request, export_model
from megatron_evomoe.hf.to_hf.safetensors_writer import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    parser.add_argument(
        "checkpoint", help="a stage's folder of a run (its newest checkpoint), or an iter_… folder"
    )
    parser.add_argument("--output", required=True, help="directory to make; must not exist, or be empty")
    parser.add_argument(
        "--format",
        choices=("auto", "evomoe", "llava"),
        default="auto",
        help="custom code, or transformers' own LLaVA (dense stages); auto: the latter where it can be",
    )
    parser.add_argument(
        "--dense", action="store_true", help="of an evolve stage, the first expert alone, as a dense model"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of the weights; default: what the run trained in"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest weights file (5GB)")
    parser.add_argument("--tokenizer", help="the run's tokenizer, if it is no longer where it was")
    parser.add_argument(
        "--verify", action="store_true", help="run both models on the same inputs and print how they differ"
    )
    parser.add_argument(
        "--push-to-hub", metavar="REPO_ID", help="upload the directory to this repository, made if need be"
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push-to-hub: make a private repository"
    )


def run(args: argparse.Namespace) -> int:
    """Export, then verify and upload where asked; 1 if the models differ (nothing is uploaded then).

    Raises:
        ConfigError, CheckpointError: see `export_model`, `verify_export.compare` and `hub.push`.
    """
    exported = export_model(
        Request(
            checkpoint=args.checkpoint,
            output=args.output,
            format=args.format,
            dense=args.dense,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            max_shard_bytes=parse_size(args.max_shard_size),
        )
    )
    print(describe(exported))
    if args.verify:
        from megatron_evomoe.hf import verification
        from megatron_evomoe.hf.to_hf import verify_export

        rows = verify_export.compare(exported)
        print(verification.table(rows))
        if not all(row.good for row in rows):
            print(f"error: {exported.output} does not compute what {exported.source} computes")
            return 1
    if args.push_to_hub:
        from megatron_evomoe.hf.to_hf import hub

        print(f"uploaded to {hub.push(exported.output, args.push_to_hub, private=args.private)}")
    return 0


def describe(exported: Exported) -> str:
    """What was written and how it is loaded."""
    path = Path(exported.output)
    how = (
        "LlavaForConditionalGeneration, no custom code"
        if exported.format == "llava"
        else "custom code: with trust_remote_code=True, or after megatron_evomoe.hf.register()"
    )
    return (
        f"{path}: {exported.tensors} tensors, {exported.size / 2**20:.1f} MiB, from {exported.source} "
        f"({exported.kind})\n"
        f"  loads as {how}"
    )
