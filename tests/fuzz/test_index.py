"""With a damaged or forged index beside a shard, every sample is the one in the tar, or is counted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

from megatron_evomoe.data import shard_index
from megatron_evomoe.data.shard_index import index_path
from megatron_evomoe.data.shards import ShardDataset

from .samples import picture, rows, tar


@pytest.fixture
def shard(tmp_path):
    """A shard of samples with no, one or two images in turn; every fifth record has a caption file too."""
    members = []
    for i in range(12):
        members += [(f"k{i}.{j}.jpg", picture(20 * i + j)) for j in range(i % 3)]
        turns = [{"from": "human", "value": "<image>" * (i % 3) + f"{i}?"}, {"from": "gpt", "value": f"{i}!"}]
        record = {"conversations": turns} if i % 5 else {"images": ["x.jpg"] * (i % 3)}
        members.append((f"k{i}.json", json.dumps(record).encode()))
        members += [(f"k{i}.txt", f"caption {i}".encode())] if i % 5 == 0 else []
    path = tmp_path / "a.tar"
    path.write_bytes(tar(members))
    return path


def content(row):
    return row.sample and (
        row.key,
        row.sample.tokens,
        row.sample.labels,
        [image.tolist() for image in row.images],
    )


def judge(tally, shard, truth):
    found = rows(ShardDataset(shard))
    assert len(found) == len(truth)
    for row, right in zip(found, truth, strict=True):
        assert row.problem is not None or content(row) == right
    tally.add("counted" if any(row.problem for row in found) else "right")


def test_index_bytes(tally, shard):
    truth = [content(row) for row in rows(ShardDataset(shard))]
    whole = index_path(shard).read_bytes()
    for rng in tally.draws(100):
        data, at = bytearray(whole), rng.randrange(len(whole))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at : at + 8] = rng.randbytes(8)
        else:
            data[:8] = rng.choice([0, 1, 2**31, 2**63, len(data), len(data) - 8]).to_bytes(8, "little")
        index_path(shard).write_bytes(bytes(data))
        judge(tally, shard, truth)


def test_forged_index(tally, shard):
    """An index forged with a matching digest, which no accident produces, may only leave members out.

    docs/data.md states what such an index can do.
    """
    truth = [content(row) for row in rows(ShardDataset(shard))]
    whole = safetensors.numpy.load(index_path(shard).read_bytes())
    names = [name for name in whole if name not in ("stamp", "digest", "problems", "defects")]
    for rng in tally.draws(100):
        saved = {name: array.copy() for name, array in whole.items()}
        name = rng.choice(names)
        array = saved[name]
        kind = rng.randrange(5)
        flat = array.reshape(-1)
        if kind == 0 and array.dtype != np.bool_:
            flat[rng.randrange(flat.size)] += np.array(
                rng.choice([1, -1, 512, -512, 1024, 2**40, -(2**62)])
            ).astype(array.dtype)
        elif kind == 1:
            saved[name] = np.roll(array, rng.randrange(1, 5), axis=0)
        elif kind == 2:
            i, j = rng.randrange(len(array)), rng.randrange(len(array))
            array[[i, j]] = array[[j, i]]
        elif kind == 3:
            saved[name] = rng.choice([array[:-1], array[..., None], array.astype(np.float64), array[::-1]])
        else:
            flat[rng.randrange(flat.size)] = rng.choice([0, 1])
        saved["digest"] = np.frombuffer(shard_index._digest(saved), np.uint8)
        index_path(shard).write_bytes(
            safetensors.numpy.save({n: np.ascontiguousarray(a) for n, a in saved.items()})
        )
        judge(tally, shard, truth)
