"""``evaluate``: a benchmark's questions put to an exported model, batched over ranks, and the official metric
of the answers.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megatron_evomoe.config.arguments import whole
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.image import decode_image
from megatron_evomoe.evaluation.answers_file import AnswerStore
from megatron_evomoe.evaluation.item import Benchmark, BenchmarkError, Item, Source, first_groups
from megatron_evomoe.evaluation.ranks import Ranks
from megatron_evomoe.evaluation.registry import BENCHMARKS
from megatron_evomoe.evaluation.score_report import report
from megatron_evomoe.generate.loading import (
    DTYPE_CHOICES,
    LoadedModel,
    ModelError,
    check_directory,
    greedy,
    load,
    user_message,
)

_SAMPLED_BYTES = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``evaluate``."""
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
    """Answer what is unanswered, then score everything.

    Raises:
        BenchmarkError: unreadable questions, missing images, or an output folder of another run.
        ModelError: the model cannot be loaded or a prompt is too long for it.
    """
    benchmark, store = BENCHMARKS[args.benchmark], AnswerStore(args.output)
    with Ranks() as ranks:
        questions = ranks.first_alone(lambda: _begin(benchmark, store, args)) or _questions(benchmark, args)
        items = first_groups(questions, args.limit)
        answered = store.read()
        ranks.wait()  # a rank that began to answer before another had read would change that one's share
        share = [item for item in items if item.id not in answered][ranks.index :: ranks.size]
        if share:
            _answer(share, load(args.model, args.dtype, args.device), store, ranks, args)
        ranks.wait()
        ranks.first_alone(lambda: report(benchmark, items, store.read(), args.output))
    return 0


def _begin(benchmark: Benchmark, store: AnswerStore, args: argparse.Namespace) -> list[Item]:
    """Check everything that can be wrong before a model is loaded."""
    check_directory(args.model)
    questions = _questions(benchmark, args)
    store.open(_job(args, questions))
    return questions


def _questions(benchmark: Benchmark, args: argparse.Namespace) -> list[Item]:
    """Every question of the files; `--limit` comes after, so that it does not change what the answers belong
    to.
    """
    if not args.questions.exists():
        raise BenchmarkError(f"--questions {args.questions} does not exist")
    if args.images is not None and not args.images.is_dir():
        raise BenchmarkError(f"--images {args.images} is no folder")
    items = benchmark.read(Source(args.questions, args.images, args.annotations, args.ocr_tokens, args.split))
    if not items:
        raise BenchmarkError(f"{args.questions} holds no questions")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise BenchmarkError(f"{args.questions}: question {item.id} occurs twice")
        seen.add(item.id)
    return items


def _job(args: argparse.Namespace, items: Sequence[Item]) -> dict[str, Any]:
    """What the answers depend on; batch size, ranks and limit are free."""
    prompts = hashlib.sha256(json.dumps([[item.id, item.prompt] for item in items]).encode())
    return {
        "benchmark": args.benchmark,
        "questions": prompts.hexdigest(),
        "model": _fingerprint(args.model),
        "max_new_tokens": args.max_new_tokens,
        "dtype": args.dtype,
    }


def _fingerprint(model: Path) -> str:
    """Of all configuration, and of the ends and the size of each weight file: a retrained model differs
    there, and is soon read.
    """
    digest = hashlib.sha256()
    for path in sorted(
        p for p in model.iterdir() if p.suffix in (".json", ".jinja", ".model", ".safetensors")
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def _answer(
    share: Sequence[Item], model: LoadedModel, store: AnswerStore, ranks: Ranks, args: argparse.Namespace
) -> None:
    columns = (
        TextColumn(args.benchmark),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"of rank 0 of {ranks.size}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        store.writer(ranks.index) as writer,
        Progress(*columns, console=Console(stderr=True), disable=ranks.index > 0) as progress,
    ):
        task = progress.add_task("", total=len(share))
        for items, batch in _encoded(share, model, args.batch_size):
            answers = model.answer(batch, **greedy(args.max_new_tokens))
            writer.add(dict(zip((item.id for item in items), answers, strict=True)))
            progress.advance(task, len(items))


def _encoded(share: Sequence[Item], model: LoadedModel, size: int) -> Iterator[tuple[Sequence[Item], Any]]:
    """Batches of `size` with their inputs; the next one's pictures are decoded while this one is answered."""
    batches = [share[start : start + size] for start in range(0, len(share), size)]
    with ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(_encode, batches[0], model)
        for items, following in itertools.zip_longest(batches, batches[1:]):
            batch = waiting.result()
            if following is not None:
                waiting = ahead.submit(_encode, following, model)
            yield items, batch


def _encode(items: Sequence[Item], model: LoadedModel) -> Any:
    conversations = [[user_message(item.prompt, len(item.images))] for item in items]
    pixels = [_pixels(image, item) for item in items for image in item.images]
    try:
        return model.encode(conversations, pixels)
    except ModelError as error:
        raise ModelError(f"questions {items[0].id} to {items[-1].id}: {error}") from None


def _pixels(image: Path | bytes, item: Item) -> np.ndarray:
    try:
        return decode_image(image if isinstance(image, bytes) else image.read_bytes())
    except (SampleError, OSError) as error:
        name = "its image" if isinstance(image, bytes) else image
        raise BenchmarkError(f"question {item.id}: {name} cannot be read: {error}") from None
