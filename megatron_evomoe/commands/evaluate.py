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
        "--model", required=True, type=Path, help="directory that convert_to_hf wrote, or a plain LLaVA one"
    )
    parser.add_argument("--benchmark", required=True, choices=list(BENCHMARKS))
    parser.add_argument(
        "--questions",
        required=True,
        type=Path,
        help="the benchmark's own file or folder (docs/evaluation.md)",
    )
    parser.add_argument(
        "--images", type=Path, help="folder of the images, where the benchmark keeps them apart"
    )
    parser.add_argument("--annotations", type=Path, help="VQAv2: the answers, where they are public")
    parser.add_argument(
        "--ocr-tokens", type=Path, help="TextVQA: Rosetta OCR tokens to show under each question"
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
        help="longest answer (default %(default)s, LLaVA's)",
    )
    parser.add_argument(
        "--limit", type=whole(1), help="only the first questions, for a trial; a later run may raise it"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPE_CHOICES, help="of the weights (default: the directory's)"
    )
    parser.add_argument("--device", help="cuda:0, cpu, …; default: this rank's GPU where there is one")


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
