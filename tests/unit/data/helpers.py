"""Small data sets, tokenizers and images for the data tests."""

from __future__ import annotations

import io
import json
import multiprocessing
import multiprocessing.context
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_evomoe.config import DataConfig
from megatron_evomoe.data.loader import TrainLoader
from megatron_evomoe.data.order import SampleOrder

TEMPLATES = ("plain", "v1", "phi", "qwen", "stablelm")
MARKUP = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
LINES = [
    "USER: <image>\nWhich digit is this? ASSISTANT: It is seven.",
    "Is it even? No, it is odd.",
    "How many are there of 3? 2",
    "A chat between a curious user and an artificial intelligence assistant.",
    "system user assistant You are a helpful",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "Ist das ein schönes Bild?  Ja!",
]
TOKENS_PER_IMAGE = 4


def forked_children() -> list[multiprocessing.process.BaseProcess]:
    """The forked processes of this one that still run; the server that megatron-core keeps is not forked."""
    return [
        child
        for child in multiprocessing.active_children()
        if isinstance(child, multiprocessing.context.ForkProcess)
    ]


def save_hf_tokenizer(folder: Path, kind: str) -> Path:
    """Save a BPE tokenizer of one of two kinds.

    `gpt` has byte-level pieces, no bos, and eos <|endoftext|>; `llama` has Llama's dummy prefix and <s> …
    </s>.
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    if kind == "gpt":
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        specials = MARKUP
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        names = dict(eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    else:
        tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        tok.decoder = decoders.Sequence(steps)
        specials = ["<unk>", "<s>", "</s>", *MARKUP]
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=[*specials, *(f"<0x{b:02X}>" for b in range(256))],
            show_progress=False,
        )
        names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tok.train_from_iterator(LINES * 5, trainer)
    if kind == "llama":
        bytes_ids = {f"<0x{b:02X}>" for b in range(256)}
        spec = json.loads(tok.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in bytes_ids]
        tok = Tokenizer.from_str(json.dumps(spec))
        tok.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))]
        )
    tok.add_tokens([AddedToken("<tool_call>", special=False)])
    PreTrainedTokenizerFast(tokenizer_object=tok, **names).save_pretrained(str(folder))
    return folder


def jpeg(seed: int = 0, size: tuple[int, int] = (24, 16), **save: object) -> bytes:
    """A smooth random JPEG of `size` (width, height)."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize(size, Image.BICUBIC).save(out, "JPEG", quality=90, **save)
    return out.getvalue()


def encoded(image: Image.Image, kind: str, **save: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **save)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def chat(
    question: str = "<image>\nWhich digit is this?", answer: str = "It is seven."
) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def samples(n: int) -> list[tuple[dict, list[bytes]]]:
    """Samples with no, one and two images in turn, and of different lengths."""
    out = []
    for i in range(n):
        images = [jpeg(10 * i + j, (20 + i % 5, 16)) for j in range(i % 3)]
        question = "<image>" * len(images) + f" How many are there of {i}?" + " Is it even?" * (i % 4)
        out.append(
            (
                {"id": f"sample-{i}", "kind": "count", "conversations": chat(question, f"There are {i}.")},
                images,
            )
        )
    return out


def loader(dataset, tokenizer, processor, *, workers: int = 0, shuffle: bool = True, **kwargs) -> TrainLoader:
    """A TrainLoader with small defaults, shuffled or in stored order; `kwargs` take DataConfig's fields."""
    config = {k: kwargs.pop(k) for k in list(kwargs) if k in DataConfig.__dataclass_fields__}
    config = {"seq_length": 512, "num_workers": workers, "prefetch_factor": 2, **config}
    defaults = dict(
        micro_batch_size=2,
        global_batch_size=8,
        data_parallel_rank=0,
        data_parallel_size=1,
        order=SampleOrder(len(dataset), 5, shuffle),
    )
    arguments = {**defaults, **kwargs}
    return TrainLoader(dataset, tokenizer, processor, DataConfig(**config), TOKENS_PER_IMAGE, **arguments)


def take(train_loader: TrainLoader, steps: int) -> list:
    iterator = iter(train_loader)
    out = [next(iterator) for _ in range(steps)]
    iterator.close()
    return out


def open_files_under(folder: Path) -> int:
    """Number of file descriptors that this process has open on files under `folder`."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith(str(folder)) for link in links if link.is_symlink())
