"""Fingerprints of shards, which tell whether two runs train on the same samples.

The digest of a shard covers, in the order of its samples: their keys, the kind of their text, the number of
    their
images, why a sample is unusable, the size of every member, and a checksum of the bytes that `sampled_sum`
reads of it. It does not cover paths, times, offsets and tar dialects, so a copy of a directory has the
digests of the original. Building an index costs a few reads for each sample.
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
"""Members of at most this size, in bytes, are read whole; nearly every record is one of them."""
BLOCK = 512
"""Bytes that are read at the start, in the middle and at the end of a larger member.

Two images of the same size differ at least in the middle or at the end.
"""


def sampled_sum(fd: int, ranges: Iterable[tuple[int, int]]) -> int:
    """CRC-32 of the sampled bytes of some members of an open file.

    Bytes beyond the end of the file are left out; the reader of the member reports that it is cut off.

    Args:
        ranges: (offset, size) of each member.
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
    """32 hexadecimal digits that identify the samples of a shard and their order."""
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
