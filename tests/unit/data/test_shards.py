"""webdataset reads our shards, and shards of other writers are read or their faults reported."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import tarfile

import pytest

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data import shard_index
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.shards import ShardDataset, expand_paths, tar_bytes, write_shards

from .helpers import chat, jpeg, open_files_under, samples, write_tar


def record(i=0):
    return json.dumps({"id": i, "conversations": chat()}).encode()


def test_round_trip(dataset):
    assert len(dataset) == 50 and len(dataset.paths) == 3
    for i, (expected, images) in enumerate(samples(50)):
        raw = dataset.read(i)
        assert (raw.record, raw.images, raw.key) == (expected, images, f"{i:09d}")
        assert (
            raw.shard.endswith(f"shard-{i // 20:06d}.tar")
            and str(dataset.shard(i)) == raw.shard
            and dataset.key(i) == raw.key
        )
    assert dataset.problems == {}
    with pytest.raises(IndexError):
        dataset.read(50)


def test_webdataset_reads_what_we_write(shard_dir):
    import webdataset

    read = list(webdataset.WebDataset(str(shard_dir / "shard-{000000..000002}.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{i:09d}" for i in range(50)]
    for sample, (expected, images) in zip(read, samples(50), strict=True):
        assert json.loads(sample["json"]) == expected
        assert [
            sample[e] for e in (["jpg"] if len(images) == 1 else [f"{j}.jpg" for j in range(len(images))])
        ] == images


def test_we_read_what_webdataset_writes(tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for i in range(3):
            sink.write({"__key__": f"dir/k{i}", "jpg": jpeg(i), "json": json.loads(record(i))})
        sink.write({"__key__": "caption", "png": jpeg(9), "txt": "a red square"})
    data = ShardDataset(tmp_path)
    assert [data.key(i) for i in range(4)] == ["dir/k0", "dir/k1", "dir/k2", "caption"]
    assert data.read(2).images == [jpeg(2)] and data.read(2).record["id"] == 2
    assert data.read(3).record["conversations"] == chat("<image>", "a red square")


def test_bytes_are_reproducible(tmp_path):
    first, second = (write_shards(samples(7), tmp_path / n, samples_per_shard=3) for n in "ab")
    assert [p.name for p in first] == [f"shard-{i:06d}.tar" for i in range(3)]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    # The tar holds no clock time, user or machine name.
    constant = tar_bytes([("k", {"a": "é"}, [b"\x89PNG", b"RIFF0000WEBP"])])
    assert (
        hashlib.sha256(constant).hexdigest()
        == "990c1fa98243ccf9561a985fb2fa9d33bd1ac76dd2c2ff1e362ad0d65efb1554"
    )
    with pytest.raises(ConfigError, match="already holds shards"):
        write_shards(samples(2), tmp_path / "a")
    with pytest.raises(ConfigError, match="no samples"):
        write_shards([], tmp_path / "c")


def test_images_are_stored_under_their_true_type(tmp_path):
    from PIL import Image

    from .helpers import encoded

    kinds = [encoded(Image.new("RGB", (4, 4)), kind) for kind in ("PNG", "WEBP", "JPEG", "GIF", "BMP")]
    (path,) = write_shards([({"conversations": []}, kinds)], tmp_path)
    with tarfile.open(path) as archive:
        names = archive.getnames()
    assert names == [f"000000000.{e}" for e in ("0.png", "1.webp", "2.jpg", "3.gif", "4.bmp", "json")]
    assert ShardDataset(path).read(0).images == kinds


def test_expand_paths(shard_dir, tmp_path, monkeypatch):
    names = [f"shard-{i:06d}.tar" for i in range(3)]
    for pattern in (
        shard_dir,
        shard_dir / "shard-{000000..000002}.tar",
        shard_dir / "*.tar",
        shard_dir / "shard-00000?.tar",
    ):
        assert [p.name for p in expand_paths([str(pattern)])] == names
    assert [p.name for p in expand_paths([str(shard_dir / names[2]), str(shard_dir / names[0])])] == [
        names[2],
        names[0],
    ]
    for pattern, message in [
        ([], "no shards given"),
        ([str(tmp_path)], "holds no .tar"),
        (["gone.tar"], "gone.tar does not exist"),
        ([str(tmp_path / "*.tar")], "does not exist"),
        ([str(shard_dir / "shard-{000000..000003}.tar")], r"shard-000003\.tar does not exist"),
        (["pipe:touch ran"], "pipe or URL"),
        (["https://host/a.tar"], "pipe or URL"),
        (["s3://bucket/a.tar"], "pipe or URL"),
        (["{0..999999999}.tar"], "more than"),
    ]:
        with pytest.raises(ConfigError, match=message):
            expand_paths(pattern)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello" * 300, "not an uncompressed tar"),
        (b"\0" * 10240, "holds no sample"),
    ],
)
def test_shards_that_are_none(tmp_path, data, message):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"a\.tar.*{message}"):
        ShardDataset(tmp_path)


def test_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.add(__file__, "x.json")
    with pytest.raises(ConfigError, match="uncompressed"):
        ShardDataset(tmp_path)


def test_truncated_anywhere_keeps_the_whole_samples(tmp_path):
    whole = write_shards(samples(9), tmp_path / "whole")[0]
    data = whole.read_bytes()
    index = shard_index.load_index(whole)
    ends = [int(-(-(offset + size) // 512) * 512) for offset, size in index.text]
    complete = [int(offset + size) for offset, size in index.text]
    cut = tmp_path / "cut.tar"
    for at in sorted({*range(600, ends[-1], 331), *ends, *(e + 100 for e in ends[:-1])}):
        cut.write_bytes(data[:at])
        expected = sum(end <= at for end in complete)
        if expected == 0:
            with pytest.raises(ConfigError, match=r"cut\.tar"):
                ShardDataset(cut)
            continue
        dataset = ShardDataset(cut)
        assert len(dataset) == expected, at
        assert "truncated" in dataset.problems
        assert [dataset.read(i).record for i in range(expected)] == [r for r, _ in samples(expected)]


def test_cut_after_indexing_is_a_bad_sample_not_garbage(tmp_path):
    path = write_shards(samples(9), tmp_path)[0]
    dataset = ShardDataset(path)
    os.truncate(path, 4000)
    with pytest.raises(SampleError) as error:
        dataset.read(8)
    assert error.value.reason == "read-error"


def test_odd_members_are_reported(tmp_path, caplog):
    path = tmp_path / "a.tar"
    members = [
        ("a.jpg", jpeg(0)),
        ("b.jpg", jpeg(1)),
        ("a.json", record(0)),
        ("b.json", record(1)),  # not adjacent to its image
        ("a.jpg", jpeg(2)),
        ("a.json", record(2)),  # the key occurs again
        ("c.pyd", pickle.dumps(1)),
        ("c.pkl", pickle.dumps(1)),
        ("c.json", record(3)),
        ("lonely.jpg", jpeg(4)),
        ("d.seg.png", b"mask"),
        ("d.cls", b"1"),
        ("d.JSON", record(5)),
    ]
    write_tar(path, members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("e.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    dataset = ShardDataset(path)
    assert [dataset.key(i) for i in range(len(dataset))] == ["a", "b", "a~2", "c", "d"]
    assert [dataset.read(i).record["id"] for i in range(3)] == [0, 1, 2]
    assert [dataset.read(i).images for i in range(3)] == [[jpeg(0)], [jpeg(1)], [jpeg(2)]]
    for i, reason in ((3, "pickle-member"), (4, "unread-member")):
        with pytest.raises(SampleError, match=reason):
            dataset.read(i)
    assert dataset.problems == {
        "duplicate-key": 1,
        "pickle-member": 2,
        "no-json": 2,
        "ignored-member": 2,
        "not-a-file": 1,
    }
    assert "c.pyd" in caplog.text and "lonely" in caplog.text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "bad-json"),
        (b"\xff", "bad-json"),
        (b"[" * 100000, "bad-json"),
        (b"[1]", "no-conversation"),
        (b"null", "no-conversation"),
    ],
)
def test_json_that_is_no_record(tmp_path, data, reason):
    dataset = ShardDataset(write_tar(tmp_path / "a.tar", [("x.json", data)]))
    with pytest.raises(SampleError) as error:
        dataset.read(0)
    assert error.value.reason == reason


def test_images_in_numeric_order(tmp_path):
    members = [(f"x.{i}.jpg", jpeg(i)) for i in (10, 2, 0, 1)] + [("x.json", record())]
    assert ShardDataset(write_tar(tmp_path / "a.tar", members)).read(0).images == [
        jpeg(i) for i in (0, 1, 2, 10)
    ]


def test_open_files_stay_bounded(tmp_path):
    write_shards(samples(80), tmp_path, samples_per_shard=1)
    dataset = ShardDataset(tmp_path)
    for i in range(80):
        dataset.read(i)
    assert open_files_under(tmp_path) == 129  # 64 shards, 64 mapped indexes, the table
    dataset.close()
    assert open_files_under(tmp_path) == 1
    assert dataset.read(0).key == "000000000"


def test_archives_put_together_are_read_whole(tmp_path):
    parts = [
        write_tar(tmp_path / f"{i}.part", [(f"{i}.jpg", jpeg(i)), (f"{i}.json", record(i))]).read_bytes()
        for i in range(3)
    ]
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(parts))
    dataset = ShardDataset(path)
    assert [dataset.read(i).record["id"] for i in range(len(dataset))] == [0, 1, 2]
    assert [dataset.read(i).images for i in range(3)] == [[jpeg(i)] for i in range(3)]
    assert dataset.problems == {"concatenated": 2}
    path.write_bytes(parts[0] + bytes(40960))
    assert ShardDataset(path).problems == {"truncated": 1}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "not-a-file"),
        (tarfile.LNKTYPE, "not-a-file"),
        (tarfile.FIFOTYPE, "not-a-file"),
        (tarfile.GNUTYPE_SPARSE, "sparse-member"),
    ],
)
def test_members_that_are_no_plain_files_take_their_sample_with_them(tmp_path, form, kind, reason):
    """A sample whose image is not a plain file is refused.

    Without its image the record would be trained on as text alone.
    """
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in (
            ("x.json", json.dumps({"conversations": chat("hi")}).encode()),
            ("y.json", record(1)),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("x.jpg")
        link.type, link.linkname = kind, "y.json" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
        archive.addfile(link)
    dataset = ShardDataset(path)
    with pytest.raises(SampleError, match=reason):
        dataset.read(0)
    assert dataset.read(1).record["id"] == 1 and dataset.problems == {reason: 1}
