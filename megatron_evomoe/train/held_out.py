"""Held-out accuracy of a stage: the questions, exact match by greedy decoding, and the shuffle test."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_evomoe.config import RunConfig
from megatron_evomoe.data.batch import prepare_eval
from megatron_evomoe.data.conversation import EncodedSample
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.image import processor_for
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.diagnose import collect
from megatron_evomoe.parallel import backend, topology
from megatron_evomoe.train.decoding import greedy, inference
from megatron_evomoe.train.session import Session

if TYPE_CHECKING:
    from megatron_evomoe.train.stage_run import StageRun

ANSWER_TOKENS = 8
"""The most tokens that an answer is decoded to; held-out answers are a few words long."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Question:
    """One held-out question."""

    prompt: EncodedSample
    answer: str
    images: torch.Tensor
    """uint8 [n, 3, S, S]"""
    kind: str
    """the group that accuracy is reported for; not part of the prompt"""


@dataclass(kw_only=True)
class Score:
    """Exact matches by kind."""

    correct: dict[str, int]
    total: dict[str, int]

    def accuracy(self) -> float:
        """Share of exact matches over all kinds."""
        return sum(self.correct.values()) / max(1, sum(self.total.values()))

    def by_kind(self) -> dict[str, float]:
        """Accuracy of each kind."""
        return {kind: self.correct[kind] / self.total[kind] for kind in self.total}


def exact_match(
    chunks: list[torch.nn.Module],
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    stop: set[int],
    batch_size: int,
    max_new_tokens: int,
    blind: bool = False,
) -> Score:
    """Decode every question and compare texts. Communicates: all ranks call it with the same `questions`.

    Args:
        chunks: the model chunks of this rank (unwrapped or wrapped); left in the mode they were in.
        stop: ids that end an answer.
        blind: replace the images by zeros, to measure what the questions alone tell.
    """
    kinds = sorted({q.kind for q in questions})
    tally = torch.zeros(2, len(kinds), dtype=torch.int64, device=backend.device())
    replicas = topology.current().data
    rank, world = replicas.rank, replicas.size
    with inference(chunks):
        for start in range(0, len(questions), batch_size * world):
            batch = questions[
                start + rank * batch_size : min(len(questions), start + (rank + 1) * batch_size)
            ]
            # expert parallelism spans replicas, so all must run equally many forwards: one without questions
            # repeats the first
            rows = batch or questions[:1]
            images = torch.cat([q.images for q in rows])
            answers = greedy(
                chunks,
                [q.prompt for q in rows],
                torch.zeros_like(images) if blind else images,
                stop=stop,
                max_new_tokens=max_new_tokens,
                pad_id=tokenizer.pad_id,
            )
            for question, ids in zip(batch, answers, strict=False):
                column = kinds.index(question.kind)
                tally[1, column] += 1
                tally[0, column] += int(tokenizer.decode(ids).strip() == question.answer.strip())
    dist.all_reduce(tally, group=replicas.group)
    correct, total = tally.tolist()
    return Score(correct=dict(zip(kinds, correct, strict=True)), total=dict(zip(kinds, total, strict=True)))


def measure(run: StageRun) -> dict[str, Score]:
    """Held-out accuracy with images, with blanked images and, for a mixture, with shuffled routing.

    A mixture's routing is written to `diagnostics.jsonl`. Communicates.

    Returns:
        Scores by name: `accuracy`, `blind`, `shuffled 1`, …; none without `eval_data`.
    """
    session, config = run.session, run.config
    session.heartbeat.enter("evaluate")
    asked = questions(session, config)
    if not asked:
        return {}
    run.built.gather_weights()
    ask = functools.partial(
        exact_match,
        run.built.wrapped,
        asked,
        session.tokenizer,
        stop=session.stop_ids(config),
        batch_size=config.train.eval_batch_size,
        max_new_tokens=ANSWER_TOKENS,
    )
    mixtures = run.built.mixtures()
    with collect.watching(mixtures, config) as watch:
        scores = {"accuracy": ask()}
    scores["blind"] = ask(blind=True)
    if run.stage.kind.has_router:
        is_main = session.topology.rank == 0
        collect.save(session.run_dir, run.stage.name, run.step, watch, mixtures, config, is_main=is_main)
        for i in range(config.train.eval_shuffles):
            with collect.shuffled(mixtures, seed=config.train.seed + i):
                scores[f"shuffled {i + 1}"] = ask()
    return scores


def questions(session: Session, config: RunConfig) -> list[Question]:
    """The held-out questions, the same list on every rank. Unusable samples are left out and logged."""
    if not config.data.eval_data:
        return []
    found: list[Question] = []
    limit = config.train.eval_samples
    skipped: Counter[str] = Counter()
    dataset = ShardDataset(config.data.eval_data)
    processor = processor_for(config)
    for i in range(len(dataset)):
        try:
            samples = prepare_eval(
                dataset.read(i),
                session.tokenizer,
                processor,
                config.data.conversation_template,
                config.vision.tokens_per_image,
                max_image_pixels=config.data.max_image_pixels,
                max_length=config.data.seq_length,
            )
        except SampleError as error:
            skipped[error.reason] += 1
            continue
        found += [
            Question(
                prompt=s.prompt, answer=s.answer, images=s.images, kind=str(s.metadata.get("kind", "all"))
            )
            for s in samples
        ]
        if limit and len(found) >= limit:
            break
    if skipped:
        log.warning(
            "held-out samples left out: %s", ", ".join(f"{n} {reason}" for reason, n in skipped.items())
        )
    return found[:limit] if limit else found
