"""Greedy decoding by the model in training, under any layout.

Each new token runs the whole sequence again: short answers need no key/value cache, and the measured forward
is the one that was trained. So sequences are the segments of one packed row where training packs, and padded
rows elsewhere.

Shape legend: n sequences · b rows (n, or 1 of packed sequences) · s positions of a row.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.conversation import EncodedSample
from megatron_evomoe.model.precision import without_fp8
from megatron_evomoe.parallel import backend, topology


class inference:
    """Context without gradients, in evaluation mode and without FP8; restores the chunks' modes on exit."""

    def __init__(self, chunks: list[torch.nn.Module]) -> None:
        self._chunks = chunks
        self._contexts = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._modes = [c.training for c in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
        self._contexts.enter_context(torch.no_grad())
        self._contexts.enter_context(without_fp8(self._chunks))

    def __exit__(self, *args: Any) -> None:
        self._contexts.__exit__(*args)
        for chunk, mode in zip(self._chunks, self._modes, strict=True):
            chunk.train(mode)


def greedy(
    chunks: list[torch.nn.Module],
    prompts: Sequence[EncodedSample],
    images: torch.Tensor,
    *,
    stop: set[int],
    max_new_tokens: int,
    pad_id: int,
) -> list[list[int]]:
    """The greedy continuation of each prompt, without the stop token. Communicates.

    Every rank of every replica takes part in every forward, and all stop together. Rows that have ended are
    left out of the next forward; a replica without open rows repeats its first row.

    Args:
        images: uint8 [n, 3, S, S], in prompt order.
        stop: ids that end an answer.
    """
    config = _unwrap(chunks[0]).run_config
    counts = _images_per_prompt(prompts, len(images), config.vision.tokens_per_image)
    images_of_prompt = images.to(backend.device()).split(counts)
    sequences: list[tuple[list[int], list[int]]] = [([*p.tokens], [*p.token_types]) for p in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        rows = open_rows or [0]
        join = _pack if config.data.packing == "pack" else _pad
        joined = join([sequences[r] for r in rows], pad_id)
        chosen = next_tokens(
            chunks,
            joined.tokens,
            joined.token_types,
            torch.cat([images_of_prompt[r] for r in rows]),
            joined.last,
            segments=joined.segments,
        ).tolist()
        for row, token in zip(list(open_rows), chosen, strict=False):
            if token in stop:
                open_rows.remove(row)
            else:
                answers[row].append(token)
                sequences[row][0].append(token)
                sequences[row][1].append(TokenType.TEXT)
        if not _any_open(bool(open_rows)):
            break
    return answers


def _images_per_prompt(prompts: Sequence[EncodedSample], total: int, tokens_per_image: int) -> list[int]:
    counts = [p.token_types.count(TokenType.VISION) // tokens_per_image for p in prompts]
    assert sum(counts) == total, f"prompts have places for {sum(counts)} images, {total} are given"
    return counts


class _Joined(NamedTuple):
    """Sequences as the model takes them."""

    tokens: torch.Tensor
    """int64 [b, s]"""
    token_types: torch.Tensor
    """int64 [b, s]"""
    last: torch.Tensor
    """int64 [n], the last position of each sequence, in its row or in the only one"""
    segments: tuple[int, ...] | None
    """of a packed row; the last segment may be padding"""


def _pad(sequences: Sequence[tuple[list[int], list[int]]], pad_id: int) -> _Joined:
    """Right-padded rows whose length is a multiple of TP."""
    where, multiple = backend.device(), topology.current().tensor.size
    longest = max(len(tokens) for tokens, _ in sequences)
    longest += -longest % multiple
    tokens = torch.tensor([t + [pad_id] * (longest - len(t)) for t, _ in sequences], device=where)
    token_types = torch.tensor(
        [t + [TokenType.PADDING] * (longest - len(t)) for _, t in sequences], device=where
    )
    last = torch.tensor([len(t) - 1 for t, _ in sequences], device=where)
    return _Joined(tokens, token_types, last, None)


def _pack(sequences: Sequence[tuple[list[int], list[int]]], pad_id: int) -> _Joined:
    """One row of all sequences and, up to a multiple of TP, padding."""
    where, multiple = backend.device(), topology.current().tensor.size
    ends = list(itertools.accumulate(len(tokens) for tokens, _ in sequences))
    padding = -ends[-1] % multiple
    tokens = [*itertools.chain(*(t for t, _ in sequences)), *[pad_id] * padding]
    token_types = [*itertools.chain(*(t for _, t in sequences)), *[TokenType.PADDING] * padding]
    lengths = (*(len(t) for t, _ in sequences), padding)
    return _Joined(
        torch.tensor([tokens], device=where),
        torch.tensor([token_types], device=where),
        torch.tensor(ends, device=where) - 1,
        lengths if padding else lengths[:-1],
    )


def _any_open(mine: bool) -> bool:
    """Whether any rank still has a row to continue. Communicates."""
    flag = torch.tensor(int(mine), device=backend.device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def next_tokens(
    chunks: list[torch.nn.Module],
    tokens: torch.Tensor,
    token_types: torch.Tensor,
    images: torch.Tensor,
    at: torch.Tensor,
    *,
    segments: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The greedy choice after the positions `at` [n], int64 [n].

    Every rank of the replica gets it. Communicates.

    Args:
        tokens: int64 [b, s].
        token_types: int64 [b, s].
        images: as in `LlavaModel.forward`.
        at: a position of each row, or with `segments` any positions of the only row.
        segments: lengths of the segments of a packed row.
    """
    b, s = tokens.shape
    rows = torch.arange(b, device=at.device) if segments is None else torch.zeros_like(at)
    vocab_size = _unwrap(chunks[0]).run_config.language.vocab_size

    def forward_step(
        batches: Iterator[int], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        next(batches)
        logits = model(tokens, token_types, images, segments=segments)

        def choose(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            last = output[rows, at]
            if _unwrap(model).language_model.parallel_output:
                last = tensor_parallel.gather_from_tensor_model_parallel_region(last)
            return last[:, :vocab_size].argmax(-1)  # without the embedding's padding rows

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
    choice = found[0] if found else torch.zeros_like(at)
    stages = topology.current().pipeline
    if stages.size > 1:
        last = dist.get_global_rank(stages.group, stages.size - 1)
        dist.broadcast(choice, last, group=stages.group)
    return choice


def _unwrap(module: Any) -> Any:
    while not hasattr(module, "run_config"):
        module = module.module
    return module
