"""The loaders that `loader.py` compares: this project's, and others that read the same shards.

Each is an endless iterator of batches. Its worker processes decode, resize, encode the text and make the
batch. All encode text with this project's code. *The same decode* is this project's too (simplejpeg, resized
as uint8); the other is what most code does (Pillow, float32, normalised in the workers).

Shapes: b samples of a batch, s positions after padding, S the side of an image.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_evomoe.config import DataConfig
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.conversation import IGNORE_INDEX, encode
from megatron_evomoe.data.image import CLIP_MEAN, CLIP_STD, ImageProcessor, decode_image
from megatron_evomoe.data.loader import TrainLoader
from megatron_evomoe.data.order import SampleOrder
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.tokenizer import Tokenizer, build_tokenizer

SIDE, TOKENS_PER_IMAGE, TEMPLATE, SEQ_LENGTH = 336, 576, "v1", 2048
SHUFFLED = 200  # samples among which webdataset and energon shuffle


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every loader does; can be sent to another process as JSON."""

    shards: str
    tokenizer: str
    aspect_ratio: str
    batch: int
    workers: int
    prefetch: int

    def paths(self) -> list[str]:
        """The files of the shards."""
        return sorted(map(str, Path(self.shards).glob("*.tar")))

    def processor(self) -> ImageProcessor:
        """The images' processor."""
        return ImageProcessor(SIDE, self.aspect_ratio)  # type: ignore[arg-type]


class SameDecode:
    """Stored bytes to one sample's tensors, with this project's decoding."""

    def __init__(self, job: Job) -> None:
        self.tokenizer: Tokenizer = build_tokenizer(job.tokenizer)
        self.processor = job.processor()

    def image(self, data: bytes) -> Tensor:
        """The image of a file, uint8 [3, S, S]."""
        return self.processor(decode_image(data))

    def __call__(self, conversations: Any, image: bytes) -> dict[str, Tensor]:
        """The tensors of a sample: its text, each [s], and its image."""
        sample = encode(conversations, 1, self.tokenizer, TEMPLATE, TOKENS_PER_IMAGE)
        return {
            "tokens": torch.tensor(sample.tokens),
            "labels": torch.tensor(sample.labels),
            "token_types": torch.tensor(sample.token_types),
            "images": self.image(image),
        }

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a batch, [b, s] and [b, 3, S, S]."""
        pads = {
            "tokens": self.tokenizer.pad_id,
            "labels": IGNORE_INDEX,
            "token_types": int(TokenType.PADDING),
        }
        batch = {
            name: pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=pad)
            for name, pad in pads.items()
        }
        return {**batch, "images": torch.stack([sample["images"] for sample in samples])}


class PillowFloat(SameDecode):
    """Stored bytes to one sample's tensors as most code does it: Pillow, then float32."""

    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))

    def image(self, data: bytes) -> Tensor:
        """The image of a file, float32 [3, S, S], normalised."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if self.processor.aspect_ratio == "pad":
            side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in CLIP_MEAN))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        scale = SIDE / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        image = image.crop((left, top, left + SIDE, top + SIDE))
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
        return torch.from_numpy((pixels - self.mean) / self.std)


def project(job: Job) -> Iterator[Any]:
    """This project's loader."""
    data = DataConfig(
        conversation_template=TEMPLATE,
        seq_length=SEQ_LENGTH,
        num_workers=job.workers,
        prefetch_factor=job.prefetch,
    )
    dataset = ShardDataset(job.shards)
    return iter(
        TrainLoader(
            dataset,
            build_tokenizer(job.tokenizer),
            job.processor(),
            data,
            TOKENS_PER_IMAGE,
            micro_batch_size=job.batch,
            global_batch_size=job.batch,
            data_parallel_rank=0,
            data_parallel_size=1,
            order=SampleOrder(len(dataset), 0),
        )
    )


def torch_index(job: Job) -> Iterator[Any]:
    """PyTorch's DataLoader over this project's index; the usual map-style data set."""
    decode, shards = SameDecode(job), ShardDataset(job.shards)

    class Samples(torch.utils.data.Dataset):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return decode(shards.record(i)["conversations"], shards.images(i)[0])

        def __len__(self) -> int:
            return len(shards)

    loader = torch.utils.data.DataLoader(
        Samples(),
        job.batch,
        shuffle=True,
        drop_last=True,
        collate_fn=decode.collate,
        **_workers(job),
        persistent_workers=bool(job.workers),
    )
    while True:
        yield from loader


def webdataset(job: Job, decoding: type[SameDecode] = SameDecode) -> Iterator[Any]:
    """webdataset's pipeline."""
    import webdataset as wds

    decode = decoding(job)
    samples = (
        wds.WebDataset(job.paths(), shardshuffle=False)
        .repeat()
        .shuffle(SHUFFLED)
        .map(lambda sample: decode(_conversations(sample["json"]), sample["jpg"]))
        .batched(job.batch, collation_fn=decode.collate, partial=False)
    )
    return iter(torch.utils.data.DataLoader(samples, batch_size=None, **_workers(job)))


def webdataset_pillow(job: Job) -> Iterator[Any]:
    """webdataset's pipeline with Pillow and float32."""
    return webdataset(job, PillowFloat)


def energon(job: Job) -> Iterator[Any]:
    """megatron-energon's loader; `energon prepare` has seen the shards."""
    import megatron.energon as energon
    from megatron.energon.task_encoder.base import stateless

    decode = SameDecode(job)

    @energon.edataclass
    class Tensors(energon.Sample):
        values: dict[str, Tensor]

    @stateless
    def cook(sample: dict[str, Any]) -> Tensors:
        return Tensors(
            **energon.basic_sample_keys(sample), values=decode(_conversations(sample["json"]), sample["jpg"])
        )

    class Encoder(energon.DefaultTaskEncoder):
        decoder = None
        cookers = (energon.Cooker(cook),)

        def batch(self, samples: list[Tensors]) -> dict[str, Tensor]:
            return decode.collate([sample.values for sample in samples])

        def encode_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return batch

    dataset = energon.get_train_dataset(
        job.shards,
        batch_size=job.batch,
        shuffle_buffer_size=SHUFFLED,
        max_samples_per_sequence=100,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=job.workers),
        task_encoder=Encoder(),
    )
    return iter(energon.get_loader(dataset, prefetch_factor=job.prefetch))


def _conversations(record: bytes) -> Any:
    return json.loads(record)["conversations"]


def _workers(job: Job) -> dict[str, Any]:
    prefetch = job.prefetch if job.workers else None
    return dict(num_workers=job.workers, prefetch_factor=prefetch, worker_init_fn=_one_thread)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


PROJECT, ENERGON = "project", "energon"
LOADERS: dict[str, Callable[[Job], Iterator[Any]]] = {
    PROJECT: project,
    "webdataset": webdataset,
    ENERGON: energon,
    "dataloader": torch_index,
    "webdataset-pillow": webdataset_pillow,
}


def made_pictures(count: int) -> list[bytes]:
    """JPEG files of 640 x 480 pixels at quality 90, of about 100 KB, as photographs of this size have."""
    import simplejpeg

    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        pixels = torch.full((1, 3, 480, 640), 128.0)
        for strength, size in ((60, 32), (20, 8), (6, 2)):  # coarse to fine
            noise = strength * torch.randn(1, 3, 480 // size, 640 // size, generator=generator)
            pixels += torch.nn.functional.interpolate(noise, size=(480, 640), mode="bicubic")
        image = pixels[0].clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
        found.append(simplejpeg.encode_jpeg(image, quality=90))
    return found


def made_samples(count: int, words: list[str], pictures: list[bytes]) -> Iterator[tuple[dict, list[bytes]]]:
    """Conversations of three turns about one picture each."""
    rng = random.Random(0)
    for i in range(count):
        turns = []
        for turn in range(3):
            question, answer = (" ".join(rng.choices(words, k=k)) for k in (12, 40))
            turns.append({"from": "human", "value": question if turn else f"<image>\n{question}"})
            turns.append({"from": "gpt", "value": answer})
        yield {"id": i, "conversations": turns}, [pictures[i % len(pictures)]]
