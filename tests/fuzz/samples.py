"""What the fuzz tests of records, tars and indices share: samples prepared as in training."""

from __future__ import annotations

import functools
import io
import re
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import simplejpeg

from megatron_evomoe.data.batch import Preparer, Row
from megatron_evomoe.data.image import ImageProcessor
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.tokenizer import build_tokenizer, train_sentencepiece

TOKENS_PER_IMAGE = 4
_DOCUMENTED = Path(__file__).parents[2] / "docs" / "data.md"


@functools.cache
def reasons() -> frozenset[str]:
    """The reasons listed in docs/data.md's table; no sample may be left out for any other reason."""
    rows = [line.split("|")[1] for line in _DOCUMENTED.read_text().splitlines() if line.startswith("| `")]
    return frozenset(slug for row in rows for slug in re.findall(r"`([a-z]+(?:-[a-z]+)+)`", row))


@functools.cache
def tokenizer():
    lines = [
        "Which digit is this? It is seven.",
        "USER: ASSISTANT: A chat between a curious user",
        "system user assistant",
    ] * 5
    path = Path(tempfile.mkdtemp()) / "tiny.model"
    return build_tokenizer(
        train_sentencepiece(lines, path, 400, user_defined_symbols=["<|im_start|>", "<|im_end|>", "\n"])
    )


@functools.cache
def picture(shade: int = 0) -> bytes:
    return simplejpeg.encode_jpeg(np.full((8, 8, 3), shade, np.uint8))


def rows(dataset: ShardDataset, *, length: int = 256, template: str = "v1") -> list[Row]:
    """All samples as training gets them.

    Each sample that is left out must have a documented reason and a message of one line.
    """
    preparer = Preparer(
        dataset, tokenizer(), ImageProcessor(8), template, TOKENS_PER_IMAGE, length, "skip", 10**6
    )
    found = [preparer.row(i) for i in range(len(dataset))]
    for row in found:
        if row.problem is not None:
            reason, message = row.problem
            assert reason in reasons(), f"{reason} is not in the table of docs/data.md"
            assert message.isprintable() and len(message) < 600
    return found


def tar(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()
