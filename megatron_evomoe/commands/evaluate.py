"""``evaluate``: score an exported model on a published benchmark, under torchrun or as a single process."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_evomoe.config.arguments import whole
from megatron_evomoe.evaluation.benchmark_run import Job, evaluate
from megatron_evomoe.evaluation.item import Source
from megatron_evomoe.evaluation.registry import BENCHMARKS
from megatron_evomoe.generate.loading import DTYPE_CHOICES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--model", required=True, type=Path, help="directory written by convert-to-hf, or a LLaVA model's"
    )
    parser.add_argument("--benchmark", required=True, choices=list(BENCHMARKS), help="name of the benchmark")
    parser.add_argument(
        "--questions",
        required=True,
        type=Path,
        help="the benchmark's own file or folder (docs/evaluation.md)",
    )
    parser.add_argument(
        "--images", type=Path, help="folder of the images, if the benchmark's file does not hold them"
    )
    parser.add_argument(
        "--annotations", type=Path, help="VQAv2: file with the answers, which are public for some splits"
    )
    parser.add_argument(
        "--ocr-tokens", type=Path, help="TextVQA: file of Rosetta OCR tokens, to add to each question"
    )
    parser.add_argument(
        "--split", default="test", help="ScienceQA: which split of pid_splits.json (default %(default)s)"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="folder for predictions.jsonl, metrics.json, submission files",
    )
    parser.add_argument(
        "--batch-size",
        type=whole(1, 2**20),
        default=8,
        help="questions answered together on each rank (default %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1, 2**20),
        default=128,
        help="longest answer in tokens (default %(default)s, as for LLaVA)",
    )
    parser.add_argument(
        "--limit", type=whole(1), help="answer only the first questions; a later run may raise the limit"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPE_CHOICES,
        help="dtype of the weights (default: the directory's)",
    )
    parser.add_argument("--device", help="cuda:0, cpu, … (default: this rank's GPU, or the CPU without one)")


def run(args: argparse.Namespace) -> int:
    """Evaluate.

    Raises:
        BenchmarkError, ModelError: as `evaluate`.
    """
    evaluate(
        Job(
            model=args.model,
            benchmark=BENCHMARKS[args.benchmark],
            source=Source(args.questions, args.images, args.annotations, args.ocr_tokens, args.split),
            output=args.output,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            limit=args.limit,
            dtype=args.dtype,
            device=args.device,
        )
    )
    return 0
