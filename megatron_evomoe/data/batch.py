"""Turns a stored sample into the inputs of the model; and what a microbatch of several consists of.

Shapes: b rows of a microbatch, s positions after padding, n images of the microbatch, S the side of an image;
features have t positions for each image and width C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from megatron_evomoe.config import DataConfig
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.conversation import (
    IMAGE_TOKEN,
    EncodedSample,
    check_length,
    encode,
    encode_prompt,
    parse_turns,
)
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.feature_cache import FeatureCache
from megatron_evomoe.data.image import ImageProcessor, decode_image
from megatron_evomoe.data.sample_record import check_kind
from megatron_evomoe.data.shards import RawSample, ShardDataset
from megatron_evomoe.data.tokenizer import Tokenizer


@dataclass(kw_only=True)
class MicroBatch:
    """The inputs of one forward pass; positions without a sample are padding and have no labels."""

    tokens: torch.Tensor
    """int32 or int64 [b, s]."""
    labels: torch.Tensor
    """int32 or int64 [b, s], already shifted; -100 where nothing is supervised."""
    token_types: torch.Tensor
    """int32 or int64 [b, s] of `TokenType`."""
    images: torch.Tensor | None
    """Pixels, uint8 [n, 3, S, S], or features from a cache, [n, t, C].

    Images are ordered by row and then by occurrence; n may be 0. None on ranks that do not need them.
    """
    segments: tuple[int, ...] | None = None
    """For a packed row (b = 1): the lengths of its segments, whose sum is s.

    A segment is one sample, or padding. None if each row is one sample and its padding.
    """
    keys: list[str] = field(default_factory=list)
    """The keys of the samples, also of those that were read and are unusable.

    Empty on ranks that do not read samples.
    """

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the sequences within which attention is computed, padding included."""
        b, s = self.tokens.shape
        return (s,) * b if self.segments is None else self.segments


@dataclass
class Row:
    """One row of a microbatch, as a worker hands it over.

    Attributes:
        sample: None if the sample is unusable.
        problem: the reason and the message of the `SampleError`, if the sample is unusable.
    """

    key: str
    shard: str
    sample: EncodedSample | None
    images: list[torch.Tensor] = field(default_factory=list)
    problem: tuple[str, str] | None = None


class EvalSample(NamedTuple):
    """One held-out question: the prompt up to the start of the answer, and the expected answer."""

    prompt: EncodedSample
    answer: str
    images: torch.Tensor
    """uint8 [n, 3, S, S], the images of the prompt."""
    metadata: dict[str, Any]
    """The record without its conversations, with `key`, `shard` and `turn`."""


@dataclass(frozen=True)
class Preparer:
    """Turns the samples of shards into rows; each worker process holds one."""

    dataset: ShardDataset
    tokenizer: Tokenizer
    processor: ImageProcessor
    template: str
    tokens_per_image: int
    seq_length: int
    long_samples: str
    max_image_pixels: int
    features: FeatureCache | None = None
    """Gives features in place of images, which are then not decoded."""

    @classmethod
    def from_config(
        cls,
        dataset: ShardDataset,
        tokenizer: Tokenizer,
        processor: ImageProcessor,
        data: DataConfig,
        *,
        template: str,
        tokens_per_image: int,
        features: FeatureCache | None = None,
    ) -> Preparer:
        """A preparer with the limits and choices of the data section."""
        return cls(
            dataset,
            tokenizer,
            processor,
            template,
            tokens_per_image,
            seq_length=data.seq_length,
            long_samples=data.long_samples,
            max_image_pixels=data.max_image_pixels,
            features=features,
        )

    def row(self, i: int) -> Row:
        """The row of sample i; an unusable sample gives a row without a sample, but with the problem."""
        key, shard = self.dataset.key(i), str(self.dataset.shard(i))
        try:
            sample, kept = self._encode(i)
            images = self._images(i, kept)
        except SampleError as error:
            return Row(key, shard, None, problem=(error.reason, error.message))
        return Row(key, shard, sample, images)

    @property
    def image_form(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one image, as in `MicroBatch`."""
        if self.features is not None:
            return self.features.shape, self.features.dtype
        return (3, self.processor.size, self.processor.size), torch.uint8

    def _encode(self, i: int) -> tuple[EncodedSample, int]:
        """The encoded text, and how many of the images it keeps.

        This comes before the images, which need not be decoded where the text is refused.
        """
        record, total = self.dataset.record(i), len(self.dataset.images_of(i)[1])
        sample = encode(
            record["conversations"],
            total,
            self.tokenizer,
            self.template,
            self.tokens_per_image,
            max_length=self.seq_length,
        )
        kept = total
        if len(sample.tokens) > self.seq_length:
            if self.long_samples == "skip":
                raise SampleError("too-long", f"{len(sample.tokens)} tokens, seq_length is {self.seq_length}")
            sample, kept = truncate(sample, self.seq_length, self.tokens_per_image)
        if not sample.num_supervised:
            raise SampleError("no-supervision", "no token of this sample is supervised")
        return sample, kept

    def _images(self, i: int, count: int) -> list[torch.Tensor]:
        if self.features is not None:
            return self.features.read(i, count)
        return [
            self.processor(decode_image(data, self.max_image_pixels))
            for data in self.dataset.images(i)[:count]
        ]


def truncate(sample: EncodedSample, seq_length: int, tokens_per_image: int) -> tuple[EncodedSample, int]:
    """Cut the end of a sample off; an image is kept whole or not at all.

    Returns:
        The sample, and the number of its images that are left.

    Raises:
        SampleError: too-long; nothing supervised would be left.
    """
    end = seq_length
    vision_before_end = sample.token_types[:end].count(TokenType.VISION)
    kept, partial = divmod(vision_before_end, tokens_per_image)
    if partial:  # the cut lies inside an image; all images have the same length
        end -= partial
    cut = EncodedSample(sample.tokens[:end], sample.labels[:end], sample.token_types[:end])
    if not cut.num_supervised:
        raise SampleError(
            "too-long",
            f"{len(sample.tokens)} tokens, and cutting to seq_length {seq_length} leaves no answer",
        )
    return cut, kept


def stack_images(images: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """The images in one tensor, uint8 [n, 3, S, S]; there may be none."""
    return torch.stack(list(images)) if images else torch.empty((0, 3, size, size), dtype=torch.uint8)


def prepare_eval(
    raw: RawSample,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    template: str,
    tokens_per_image: int,
    *,
    max_image_pixels: int = 50_000_000,
    max_length: int | None = None,
) -> list[EvalSample]:
    """The questions of a sample: one for each gpt turn, with the turns before it as context.

    Args:
        max_length: the most positions that a prompt may have.

    Raises:
        SampleError: what `encode` and `decode_image` raise, bad-kind, or too-long.
    """
    check_kind(raw.record)
    turns = parse_turns(raw.record.get("conversations"), len(raw.images))
    if max_length is not None:
        check_length(turns, max_length)
    pixels = stack_images(
        [processor(decode_image(data, max_image_pixels)) for data in raw.images], processor.size
    )
    metadata = {key: value for key, value in raw.record.items() if key != "conversations"}
    samples: list[EvalSample] = []
    for end, turn in enumerate(turns):
        if turn.role != "gpt":
            continue
        context = [{"from": t.role, "value": t.text} for t in turns[:end]]
        seen = sum(t.text.count(IMAGE_TOKEN) for t in turns[:end] if t.role == "human")
        prompt = encode_prompt(context, seen, tokenizer, template, tokens_per_image)
        if max_length is not None and len(prompt.tokens) > max_length:
            raise SampleError(
                "too-long", f"a prompt of {len(prompt.tokens)} tokens, seq_length is {max_length}"
            )
        samples.append(
            EvalSample(
                prompt,
                turn.text,
                pixels[:seen],
                {**metadata, "key": raw.key, "shard": raw.shard, "turn": len(samples)},
            )
        )
    if not samples:
        raise SampleError("no-conversation", "no gpt turn, so nothing to compare with")
    return samples
