"""A shard's digest depends on its samples alone, and changes with any of them."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_evomoe.data.fingerprint import BLOCK, WHOLE
from megatron_evomoe.data.shards import ShardDataset

Sample = tuple[bytes, list[bytes]]  # the record and the encoded images
SIZES = st.sampled_from([1, 7, BLOCK, WHOLE, WHOLE + 1, 3 * WHOLE])


def write(path: Path, samples: list[Sample], *, dialect: int = tarfile.USTAR_FORMAT, mtime: int = 0) -> Path:
    """Write the samples to a new tar and delete its index."""
    for stale in path.parent.glob(f"*{path.name}*"):
        stale.unlink()
    with tarfile.open(path, "w", format=dialect) as archive:
        for i, (record, images) in enumerate(samples):
            for name, data in [
                *((f"{i:03d}.{n}.jpg", image) for n, image in enumerate(images)),
                (f"{i:03d}.json", record),
            ]:
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(data), mtime
                archive.addfile(info, io.BytesIO(data))
    return path


def digests(*paths: Path) -> list[str]:
    return [digest for _, _, digest in ShardDataset([str(p) for p in paths]).contents()]


@st.composite
def samples(draw) -> list[Sample]:
    def member() -> bytes:
        return bytes([draw(st.integers(0, 255))]) * draw(SIZES)

    return [
        (member(), [member() for _ in range(draw(st.integers(0, 2)))]) for _ in range(draw(st.integers(1, 4)))
    ]


@settings(derandomize=True, deadline=None, max_examples=30)
@given(samples(), st.data())
def test_any_other_sample_gives_another_digest(tmp_path_factory, one, data):
    folder = tmp_path_factory.mktemp("shard")
    shard = write(folder / "a.tar", one)
    before = digests(shard)
    at = data.draw(st.integers(0, len(one) - 1))
    record, images = one[at]
    other = bytes(len(record)) if any(record) else b"\1" * len(record)  # a record of the same size
    changes: list[list[Sample]] = [
        [*one[:at], (other, images), *one[at + 1 :]],
        [*one[:at], (record + b"x", images), *one[at + 1 :]],
        [*one[:at], (record, [*images, b"x"]), *one[at + 1 :]],
        [*one, one[at]],
        [*one[:at], *one[at + 1 :]],
    ]
    changes += [
        [
            *one[:at],
            (record, [*images[:i], bytes(255 - b for b in images[i]), *images[i + 1 :]]),
            *one[at + 1 :],
        ]
        for i in range(len(images))
    ]
    for changed in changes:
        if changed:
            assert digests(write(folder / "a.tar", changed)) != before, changed
    if len({*map(repr, one)}) > 1:
        assert digests(write(folder / "a.tar", [*one[1:], one[0]])) != before or one[1:] + one[:1] == one


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    samples(),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.integers(0, 2**31),
)
def test_copies_and_dialects_have_one_digest(tmp_path_factory, one, dialect, mtime):
    folder = tmp_path_factory.mktemp("shard")
    shard = write(folder / "a.tar", one)
    before = digests(shard)
    assert digests(shard) == before, "read from the index that the first reading wrote"
    (folder / "elsewhere").mkdir()
    assert digests(Path(shutil.copy(shard, folder / "elsewhere" / "b.tar"))) == before
    assert digests(write(folder / "c.tar", one, dialect=dialect, mtime=mtime)) == before


def test_shards_are_told_apart_in_order(tmp_path):
    a = write(tmp_path / "a.tar", [(b"{}", [])])
    b = write(tmp_path / "b.tar", [(b"[]", []), (b"{}", [])])
    contents = ShardDataset([str(b), str(a)]).contents()
    assert [(name, count) for name, count, _ in contents] == [("b.tar", 2), ("a.tar", 1)]
    assert digests(a, b) == digests(b, a)[::-1]


@pytest.mark.parametrize("size", [WHOLE, WHOLE + 1, 10 * WHOLE])
def test_every_byte_of_a_record_counts_and_large_members_at_three_places(tmp_path, size):
    body = bytearray(size)
    before = digests(write(tmp_path / "a.tar", [(bytes(body), [])]))
    seen = []
    for place in (0, size // 4, size // 2, size - 1):
        body[place] ^= 1
        seen.append(digests(write(tmp_path / "a.tar", [(bytes(body), [])])) != before)
        body[place] ^= 1
    assert seen == [True, size <= WHOLE, True, True]
