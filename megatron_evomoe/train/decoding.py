"""Greedy decoding by the model in training, under any layout.

Each new token runs the whole sequence again: short answers need no key/value cache, and the measured forward
is the one that was trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
    counts = _images_per_prompt(prompts, len(images), _unwrap(chunks[0]).run_config.vision.tokens_per_image)
    images_of_prompt = images.to(backend.device()).split(counts)
    sequences: list[tuple[list[int], list[int]]] = [([*p.tokens], [*p.token_types]) for p in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        rows = open_rows or [0]
        tokens, token_types, last = _pad([sequences[r] for r in rows], pad_id)
        chosen = next_tokens(
            chunks, tokens, token_types, torch.cat([images_of_prompt[r] for r in rows]), last
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


def _pad(
    sequences: Sequence[tuple[list[int], list[int]]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded tokens and token types [b, s], s a multiple of TP, and each row's last position [b]."""
    where, multiple = backend.device(), topology.current().tensor.size
    longest = max(len(tokens) for tokens, _ in sequences)
    longest += -longest % multiple
    tokens = torch.tensor([t + [pad_id] * (longest - len(t)) for t, _ in sequences], device=where)
    token_types = torch.tensor(
        [t + [TokenType.PADDING] * (longest - len(t)) for _, t in sequences], device=where
    )
    return tokens, token_types, torch.tensor([len(t) - 1 for t, _ in sequences], device=where)


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
) -> torch.Tensor:
    """The greedy choice after position `at` [b] of every row, int64 [b].

    Every rank of the replica gets it. Communicates.
    """
    b, s = tokens.shape
    vocab_size = _unwrap(chunks[0]).run_config.language.vocab_size

    def forward_step(
        batches: Iterator[int], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        next(batches)
        logits = model(tokens, token_types, images)

        def choose(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            last = output[torch.arange(b, device=output.device), at]
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
    choice = found[0] if found else torch.zeros(b, dtype=torch.int64, device=tokens.device)
    stages = topology.current().pipeline
    if stages.size > 1:
        last = dist.get_global_rank(stages.group, stages.size - 1)
        dist.broadcast(choice, last, group=stages.group)
    return choice


def _unwrap(module: Any) -> Any:
    while not hasattr(module, "run_config"):
        module = module.module
    return module
