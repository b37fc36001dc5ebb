"""Held-out exact match by greedy decoding, under any layout.

Answers are decoded by running the whole sequence again for every new token: short answers need no cache, and the very
forward that trained is the one that is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_evomoe.data.conversation import PADDING, TEXT, EncodedSample
from megatron_evomoe.parallel import backend


@dataclass(kw_only=True)
class Question:
    """One held-out question."""

    prompt: EncodedSample
    answer: str
    images: torch.Tensor
    """uint8 [n, 3, S, S]"""
    kind: str
    """what accuracy is reported by; the model never sees it"""


@dataclass(kw_only=True)
class Score:
    """Exact matches by kind."""

    correct: dict[str, int]
    total: dict[str, int]

    def accuracy(self, kinds: Sequence[str] | None = None) -> float:
        """Share of exact matches over `kinds` (all by default)."""
        kinds = [k for k in self.total if kinds is None or k in kinds]
        return sum(self.correct[k] for k in kinds) / max(1, sum(self.total[k] for k in kinds))

    def by_kind(self) -> dict[str, float]:
        """Accuracy of each kind."""
        return {kind: self.correct[kind] / self.total[kind] for kind in self.total}


def exact_match(chunks: list[torch.nn.Module], questions: Sequence[Question], tokenizer: Any, *, stop: set[int], batch_size: int,
                max_new_tokens: int = 8, blind: bool = False) -> Score:
    """Decode every question and compare texts. Communicates: all ranks call it with the same `questions`.

    Args:
        chunks: the model chunks of this rank (unwrapped or wrapped); left in the mode they were in.
        stop: ids that end an answer.
        blind: blank the images (all zero), to see what the questions alone give away.
    """
    kinds = sorted({q.kind for q in questions})
    tally = torch.zeros(2, len(kinds), dtype=torch.int64, device=backend.device())
    rank, world = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
    with inference(chunks):
        for start in range(0, len(questions), batch_size * world):
            batch = questions[start + rank * batch_size : min(len(questions), start + (rank + 1) * batch_size)]
            # replicas must run equally many forwards, since experts are shared between them; an idle one repeats a question
            rows = batch or questions[:1]
            images = torch.cat([q.images for q in rows])
            answers = greedy(chunks, [q.prompt for q in rows], torch.zeros_like(images) if blind else images,
                             stop=stop, max_new_tokens=max_new_tokens, pad_id=tokenizer.pad_id)
            for question, ids in zip(batch, answers, strict=False):
                column = kinds.index(question.kind)
                tally[1, column] += 1
                tally[0, column] += int(tokenizer.decode(ids).strip() == question.answer.strip())
    dist.all_reduce(tally, group=ps.get_data_parallel_group())
    correct, total = tally.tolist()
    return Score(correct=dict(zip(kinds, correct, strict=True)), total=dict(zip(kinds, total, strict=True)))


class inference:
    """Context: no gradients, evaluation mode; puts the training mode back."""

    def __init__(self, chunks: list[torch.nn.Module]) -> None:
        self._chunks = chunks
        self._no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self._modes = [c.training for c in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
        self._no_grad.__enter__()

    def __exit__(self, *args: Any) -> None:
        self._no_grad.__exit__(*args)
        for chunk, mode in zip(self._chunks, self._modes, strict=True):
            chunk.train(mode)


def greedy(chunks: list[torch.nn.Module], prompts: Sequence[EncodedSample], images: torch.Tensor, *, stop: set[int],
           max_new_tokens: int, pad_id: int) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token, without the stop token.

    Args:
        images: uint8 [n, 3, S, S], in prompt order.

    Communicates: every rank of every replica takes part in every forward, and all stop together.
    """
    where = backend.device()
    multiple = ps.get_tensor_model_parallel_world_size()
    longest = max(len(p.tokens) for p in prompts) + max_new_tokens
    longest += -longest % multiple
    tokens = torch.full((len(prompts), longest), pad_id, device=where)
    types = torch.full_like(tokens, PADDING)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = torch.tensor(prompt.tokens, device=where)
        types[row, : len(prompt.tokens)] = torch.tensor(prompt.token_types, device=where)
    ends = torch.tensor([len(p.tokens) for p in prompts], device=where)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=where)
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        following = next_tokens(chunks, tokens, types, images.to(where), ends - 1)
        rows = torch.arange(len(prompts), device=where)
        tokens[rows, ends], types[rows, ends] = following, TEXT
        ends = ends + 1
        for row, token in enumerate(following.tolist()):
            if token in stop:
                done[row] = True
            if not done[row]:
                answers[row].append(token)
        if _all_done(done):
            break
    return answers


def _all_done(done: torch.Tensor) -> bool:
    unfinished = (~done).any().long()
    dist.all_reduce(unfinished, op=dist.ReduceOp.MAX)
    return not unfinished.item()


def next_tokens(chunks: list[torch.nn.Module], tokens: torch.Tensor, types: torch.Tensor, images: torch.Tensor,
                at: torch.Tensor) -> torch.Tensor:
    """Greedy choice after position `at` [b] of every row, int64 [b], on every rank of the replica. Communicates."""
    b, s = tokens.shape
    vocab_size = _unwrap(chunks[0]).run_config.language.vocab_size

    def forward_step(batches: Iterator[int], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        next(batches)
        logits = model(tokens, types, images)

        def choose(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            last = output[torch.arange(b, device=output.device), at]
            if _unwrap(model).language_model.parallel_output:
                last = tensor_parallel.gather_from_tensor_model_parallel_region(last)
            return last[:, :vocab_size].argmax(-1)  # never a padding row of the embedding

        return logits, choose

    iterators = [iter((0,)) for _ in chunks]
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=chunks,
        num_microbatches=1,
        seq_length=s,
        micro_batch_size=b,
        decoder_seq_length=s,
        forward_only=True,
        collect_non_loss_data=True,
    )
    choice = found[0] if found else torch.zeros(b, dtype=torch.int64, device=tokens.device)
    if ps.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(choice, ps.get_pipeline_model_parallel_last_rank(), group=ps.get_pipeline_model_parallel_group())
    return choice


def _unwrap(module: torch.nn.Module) -> Any:
    while not hasattr(module, "run_config"):
        module = module.module
    return module
