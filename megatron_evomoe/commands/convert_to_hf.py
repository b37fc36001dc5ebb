"""``convert-to-hf``: convert a checkpoint to a Hugging Face directory (see docs/huggingface.md)."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_evomoe.hf.dtypes import DTYPES
from megatron_evomoe.hf.to_hf.exporting import Exported, Request, export_model
from megatron_evomoe.hf.to_hf.safetensors_writer import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "checkpoint", help="folder of a run's stage, whose newest checkpoint is taken, or an iter_… folder"
    )
    parser.add_argument("--output", required=True, help="directory to create; must not exist, or be empty")
    parser.add_argument(
        "--format",
        choices=("auto", "evomoe", "llava"),
        default="auto",
        help="evomoe: custom code; llava: transformers' own class, for dense models; auto: llava if it can "
        "compute the model (default)",
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="export only the first expert of an evolve stage, as a dense model",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: that of training)")
    parser.add_argument(
        "--max-shard-size", default="5GB", help="size limit of a weight file (default %(default)s)"
    )
    parser.add_argument("--tokenizer", help="the run's tokenizer, if its path has changed since training")
    parser.add_argument(
        "--verify", action="store_true", help="run both models on the same inputs and print the differences"
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO_ID",
        help="upload the directory to this repository, which is created if it does not exist",
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push-to-hub: create a private repository"
    )


def run(args: argparse.Namespace) -> int:
    """Export, report, and verify and upload if requested.

    Returns 1 if the verification fails; then nothing is uploaded.

    Raises:
        ConfigError, CheckpointError: as `export_model`, `verify_export.compare` and `hub.push`.
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
    """A report of what was written and how it is loaded."""
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
