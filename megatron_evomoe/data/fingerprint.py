"""What tells one set of training samples from another, at the price of a few reads a sample when an index is
built.

A shard's digest covers, in the order of its samples: keys, kinds, the number of images, what makes a sample
unusable, every member's size, and a checksum of what `sampled_sum` reads of it. Paths, times, offsets and tar
dialects stay out of it, so a copy of a folder has the digests of the original.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megatron_evomoe.data.shard_index import ShardIndex

WHOLE = 16384
"""Members up to this size in bytes are read whole: nearly every record."""
BLOCK = 512
"""Bytes read at the start, in the middle and at the end of a larger member: of two images, at least the last
two differ.
"""


def sampled_sum(fd: int, ranges: Iterable[tuple[int, int]]) -> int:
    """CRC-32 of what is read of the members at `ranges`, (offset, size) each, in the open file `fd`.

    What a short file lacks is left out: a cut member is the reader's to report.
    """
    crc = 0
    for offset, size in ranges:
        for start, count in _blocks(size):
            crc = zlib.crc32(os.pread(fd, count, offset + start), crc)
    return crc


def _blocks(size: int) -> tuple[tuple[int, int], ...]:
    if size <= WHOLE:
        return ((0, size),)
    return (0, BLOCK), (size // 2, BLOCK), (size - BLOCK, BLOCK)


def shard_digest(index: ShardIndex) -> str:
    """32 hexadecimal digits that identify a shard's samples and their order."""
    digest = hashlib.sha256(str(len(index)).encode())
    digest.update(b"\0".join(index.keys.tolist()))
    counts = np.diff(index.first).astype("<i8")
    for part in (
        index.is_json.astype("u1"),
        counts,
        index.text[:, 1].astype("<i8"),
        index.images[:, 1].astype("<i8"),
        index.content.astype("<u4"),
        index.captioned.astype("<i8"),
        index.captions[:, 1].astype("<i8"),
        index.defects,
    ):
        digest.update(part.tobytes())
    return digest.hexdigest()[:32]
