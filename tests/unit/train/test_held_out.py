"""Batched greedy decoding equals a simple loop, and exact matches are counted correctly."""

from __future__ import annotations

import contextlib

import pytest
import torch

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.conversation import EncodedSample
from megatron_evomoe.parallel import topology
from tests.tiny import IMAGE_TOKENS, VOCAB, tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def model(one_rank):
    from megatron_evomoe.train.built import build_stage

    config = tiny_config("route", language={"init_method_std": 0.3})
    topology.seed_everything(3)
    return build_stage(config.for_stage("route"), config.stages[0]).modules[0]


def prompt(images: int, length: int, seed: int) -> EncodedSample:
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(4, VOCAB, (length,), generator=g).tolist()
    tokens = [0] * (images * IMAGE_TOKENS) + text
    return EncodedSample(
        tokens, [-100] * len(tokens), [TokenType.VISION] * (images * IMAGE_TOKENS) + [TokenType.TEXT] * length
    )


PROMPTS = [prompt(1, 3, 0), prompt(0, 9, 1), prompt(2, 4, 2), prompt(1, 6, 3)]
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def plain_greedy(model, sample: EncodedSample, images: torch.Tensor, count: int) -> list[int]:
    """Greedy decoding of one row, without padding, with one forward per token."""
    tokens, types, out = list(sample.tokens), list(sample.token_types), []
    for _ in range(count):
        with torch.no_grad():
            logits = model.eval()(torch.tensor([tokens]), torch.tensor([types]), images)
        out.append(int(logits[0, -1, :VOCAB].argmax()))
        tokens.append(out[-1])
        types.append(TokenType.TEXT)
    return out


@pytest.mark.parametrize("packing", ["none", "pack"])
def test_batched_greedy_equals_row_by_row(model, packing, monkeypatch):
    """Sequences are rows, or segments of one row, of which some end before others."""
    from megatron_evomoe.train.decoding import greedy, inference

    wanted, start = [], 0
    for p in PROMPTS:
        n = p.token_types.count(TokenType.VISION) // IMAGE_TOKENS
        wanted.append(plain_greedy(model, p, IMAGES[start : start + n], 5))
        start += n
    assert len({tuple(w) for w in wanted}) > 1, "prompts that all decode alike would prove nothing"
    monkeypatch.setattr(model.run_config.data, "packing", packing)
    segments = []
    with inference([model]), noting_segments(model, segments):
        assert greedy([model], PROMPTS, IMAGES, stop=set(), max_new_tokens=5, pad_id=0) == wanted
        # The stop token is the third token of the first row; it may occur earlier in other rows.
        stop = {wanted[0][2]}
        cut = [w[: next((i for i, t in enumerate(w) if t in stop), 5)] for w in wanted]
        assert greedy([model], PROMPTS, IMAGES, stop=stop, max_new_tokens=5, pad_id=0) == cut
    assert segments[0] == (tuple(len(p.tokens) for p in PROMPTS) if packing == "pack" else None)
    assert packing == "none" or {len(s) for s in segments} > {4}, "some sequences end before others"


@contextlib.contextmanager
def noting_segments(model, segments: list):
    """Inside, the segments of each forward are appended to a list."""
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: segments.append(kwargs["segments"]), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


class _Letters:
    """Decodes ids to numbers in text; `exact_match` needs no more of a tokenizer."""

    pad_id = 0

    def decode(self, ids):
        return " ".join(str(i) for i in ids)


def test_exact_match_counts_by_kind_and_blind_sees_nothing(model):
    from megatron_evomoe.train.held_out import Question, exact_match

    model.train()
    images = [IMAGES[:1], IMAGES[:0], IMAGES[1:3], IMAGES[3:]]
    right = [" ".join(map(str, plain_greedy(model, p, i, 3))) for p, i in zip(PROMPTS, images, strict=True)]
    model.train()
    questions = [
        Question(prompt=p, answer=a, images=i, kind=k)
        for p, a, i, k in zip(
            PROMPTS, [right[0], right[1], "no", right[3]], images, ["a", "text", "a", "b"], strict=True
        )
    ]
    decode = {"stop": set(), "batch_size": 3, "max_new_tokens": 3}
    score = exact_match([model], questions, _Letters(), **decode)
    assert (score.correct, score.total) == ({"a": 1, "b": 1, "text": 1}, {"a": 2, "b": 1, "text": 1})
    assert score.accuracy() == 0.75 and score.by_kind() == {"a": 0.5, "b": 1.0, "text": 1.0}
    assert model.training, "the mode it was in comes back"
    black = [torch.zeros_like(i) for i in images]
    blind = [" ".join(map(str, plain_greedy(model, p, i, 3))) for p, i in zip(PROMPTS, black, strict=True)]
    wanted = sum(b == q.answer for b, q in zip(blind, questions, strict=True)) / 4
    assert exact_match([model], questions, _Letters(), blind=True, **decode).accuracy() == wanted


def test_padding_rows_of_the_vocabulary_are_never_chosen(model):
    from megatron_evomoe.train.decoding import inference, next_tokens

    tokens = torch.tensor([PROMPTS[1].tokens])
    types = torch.tensor([PROMPTS[1].token_types])
    limit = model.run_config.language.vocab_size
    with inference([model]):
        free = int(next_tokens([model], tokens, types, IMAGES[:0], torch.tensor([8])))
        model.run_config.language.vocab_size = free  # the favourite is now one of the padding rows
        try:
            assert int(next_tokens([model], tokens, types, IMAGES[:0], torch.tensor([8]))) < free
        finally:
            model.run_config.language.vocab_size = limit
    assert TokenType.PADDING not in (TokenType.TEXT, TokenType.VISION)
