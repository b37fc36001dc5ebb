"""Runs a benchmark: an exported model answers the questions, and the answers are scored."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.image import decode_image
from megatron_evomoe.evaluation.answers_file import AnswersFile
from megatron_evomoe.evaluation.item import Benchmark, BenchmarkError, Item, Source, first_groups
from megatron_evomoe.evaluation.ranks import Ranks
from megatron_evomoe.evaluation.score_report import report
from megatron_evomoe.generate.loading import (
    LoadedModel,
    ModelError,
    check_directory,
    greedy,
    load,
    user_message,
)

_SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """One evaluation: the model, the benchmark's files, and how to generate."""

    model: Path
    """A directory that transformers loads."""
    benchmark: Benchmark
    source: Source
    output: Path
    batch_size: int
    """Questions that each rank answers together."""
    max_new_tokens: int
    limit: int | None
    """Only the first questions; None takes all."""
    dtype: str
    """One of `loading.DTYPE_CHOICES`."""
    device: str | None
    """A torch device; None takes this rank's GPU where there is one."""


def evaluate(job: Job) -> None:
    """Answer the questions that have no answer yet, then score all of them.

    Under torchrun the ranks share the questions, and rank 0 writes and prints the scores.

    Raises:
        BenchmarkError: unreadable questions, missing images, or an output folder that belongs to another run.
        ModelError: the model cannot be loaded or a prompt is too long for it.
    """
    answers = AnswersFile(job.output)
    with Ranks() as ranks:
        questions = ranks.first_alone(lambda: _begin(job, answers)) or _questions(job)
        items = first_groups(questions, job.limit)
        answered = answers.read()
        # A rank that starts to answer before the others have read would change their share.
        ranks.wait()
        share = [item for item in items if item.id not in answered][ranks.index :: ranks.size]
        if share:
            _answer(share, load(job.model, job.dtype, job.device), answers, ranks, job)
        ranks.wait()
        ranks.first_alone(lambda: report(job.benchmark, items, answers.read(), job.output))


def _begin(job: Job, answers: AnswersFile) -> list[Item]:
    """Check everything that can be checked before a model is loaded, and return the questions."""
    check_directory(job.model)
    questions = _questions(job)
    answers.open(_identity(job, questions))
    return questions


def _questions(job: Job) -> list[Item]:
    """Every question of the files.

    The limit is applied later: the answers belong to the same files whatever the limit is.
    """
    source = job.source
    if not source.questions.exists():
        raise BenchmarkError(f"--questions {source.questions} does not exist")
    if source.images is not None and not source.images.is_dir():
        raise BenchmarkError(f"--images {source.images} is not a folder")
    items = job.benchmark.read(source)
    if not items:
        raise BenchmarkError(f"{source.questions} holds no questions")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise BenchmarkError(f"{source.questions}: question {item.id} occurs twice")
        seen.add(item.id)
    return items


def _identity(job: Job, items: Sequence[Item]) -> dict[str, Any]:
    """Everything that the answers depend on. Batch size, number of ranks and limit are not part of it."""
    prompts = hashlib.sha256(json.dumps([[item.id, item.prompt] for item in items]).encode())
    return {
        "benchmark": job.benchmark.name,
        "questions": prompts.hexdigest(),
        "model": _fingerprint(job.model),
        "max_new_tokens": job.max_new_tokens,
        "dtype": job.dtype,
    }


def _fingerprint(model: Path) -> str:
    """A digest of a model directory: its configuration files, and size, start and end of each weight file.

    Two trained models differ there, and reading the ends of large files takes no time.
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


def _answer(share: Sequence[Item], model: LoadedModel, answers: AnswersFile, ranks: Ranks, job: Job) -> None:
    columns = (
        TextColumn(job.benchmark.name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"of rank 0 of {ranks.size}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        answers.writer(ranks.index) as writer,
        Progress(*columns, console=Console(stderr=True), disable=ranks.index > 0) as progress,
    ):
        task = progress.add_task("", total=len(share))
        for items, batch in _encoded(share, model, job.batch_size):
            texts = model.answer(batch, **greedy(job.max_new_tokens))
            writer.add(dict(zip((item.id for item in items), texts, strict=True)))
            progress.advance(task, len(items))


def _encoded(share: Sequence[Item], model: LoadedModel, size: int) -> Iterator[tuple[Sequence[Item], Any]]:
    """Batches of `size` questions with their inputs; the next batch is prepared while one is answered."""
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
