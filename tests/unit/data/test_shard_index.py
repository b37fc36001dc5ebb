"""The index file beside a shard is reused while it matches, verified on use, and never required."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import safetensors.numpy

from megatron_evomoe.data import shard_index
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.shard_index import index_path, load_index
from megatron_evomoe.data.shards import ShardDataset, expand_paths, write_shards

from .helpers import chat, samples, write_tar

ARRAYS = (
    "keys",
    "text",
    "is_json",
    "first",
    "images",
    "captions",
    "captioned",
    "defects",
    "text_lead",
    "image_lead",
    "caption_lead",
    "content",
)


def record(i=0):
    return json.dumps({"id": i, "conversations": chat("hi")}).encode()


def everything(path):
    dataset = ShardDataset(path)
    return [dataset.read(i) for i in range(len(dataset))]


def energon_index(tar):
    """Write SHARD.tar.idx as megatron-energon does.

    The file holds the byte offset at which each sample begins, and the end, as uint64.
    """
    starts, keys = [], []
    with tarfile.open(tar) as archive:
        for member in archive:
            if (key := member.name.partition(".")[0]) not in keys:
                keys.append(key)
                starts.append(member.offset)
        end = archive.offset
    return b"".join(struct.pack("<Q", at) for at in (*starts, end - 512))


@pytest.fixture
def built(monkeypatch):
    """List of the tars for which an index was built."""
    found = []
    monkeypatch.setattr(
        shard_index, "build_index", lambda tar, build=shard_index.build_index: found.append(tar) or build(tar)
    )
    return found


def test_it_is_kept_and_follows_the_tar(tmp_path, built):
    path = write_tar(tmp_path / "a.tar", [("x.json", record())])
    assert len(everything(path)) == 1 and len(built) == 1
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == 3 and names[1:] == [".a.tar.evomoe-index", "a.tar"]
    assert names[0].endswith(".evomoe-set")
    assert len(everything(path)) == 1 and len(built) == 1
    index_path(path).write_bytes(b"PK damaged")
    assert len(everything(path)) == 1 and len(built) == 2
    write_tar(path, [("x.json", record()), ("y.json", record())])
    assert len(everything(path)) == 2 and len(built) == 3
    os.utime(path, (1, 1))
    assert len(everything(path)) == 2 and len(built) == 4
    assert len(list(tmp_path.glob(".*.evomoe-set"))) == 1, "the tables of former states are removed"
    os.chmod(path, 0o600)
    assert len(everything(path)) == 2 and len(built) == 4, "the inode alone has changed"


def test_it_is_in_nobodys_way(tmp_path):
    first, second = write_shards(samples(6), tmp_path, samples_per_shard=3)
    energons = tmp_path / f"{first.name}.idx"
    energons.write_bytes(energon_index(first))
    before = energons.read_bytes()
    for path in (first, second):
        index_path(path).unlink()
    ShardDataset(tmp_path)
    assert energons.read_bytes() == before and not (tmp_path / f"{second.name}.idx").exists()
    for pattern in ("*", "*.tar*", "shard-*", "*.idx"):
        assert not [p for p in expand_paths([str(tmp_path / pattern)]) if "evomoe" in p.name]


def test_energon_reads_a_folder_as_before(tmp_path):
    energon = pytest.importorskip(
        "megatron.energon", reason="megatron-energon is no dependency; pip install it to run this"
    )
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    shards = write_shards(samples(6), tmp_path, samples_per_shard=3)
    BaseWebdatasetFactory.prepare_dataset(
        tmp_path,
        [s.name for s in shards],
        split_parts_ratio=[("train", 1.0)],
        workers=1,
        shuffle_seed=None,
        tar_index_only=False,
    )
    (tmp_path / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    )

    def keys():
        worker = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
        data = energon.get_train_dataset(
            tmp_path,
            worker_config=worker,
            batch_size=None,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            repeat=False,
            task_encoder=Crude(),
        )
        return [sample["__key__"] for sample in energon.get_loader(data)]

    class Crude(energon.DefaultTaskEncoder):
        cookers = (energon.Cooker(energon.stateless(lambda sample: sample)),)

    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*.idx")}
    found = keys()
    assert len(found) == 6 and len(before) == 2
    for path in shards:
        index_path(path).unlink()
    assert len(everything(tmp_path)) == 6
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*.idx")} == before
    assert keys() == found


def test_it_never_unpickles(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    path = write_tar(tmp_path / "a.tar", [("x.json", record())])
    np.savez(tmp_path / "evil.npz", keys=np.array([Bomb()], dtype=object))
    (tmp_path / "ran").unlink(missing_ok=True)
    for payload in (pickle.dumps(Bomb()), (tmp_path / "evil.npz").read_bytes()):
        index_path(path).write_bytes(payload)
        assert everything(path)[0].record["id"] == 0
        assert not (tmp_path / "ran").exists()


def test_read_only_folder(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [("x.json", record())])

    def refuse(*_args, **_kwargs):
        raise PermissionError(30, "Read-only file system")

    # The failure is simulated because tests may run as root, for whom file modes have no effect.
    monkeypatch.setattr(type(tmp_path), "mkdir", refuse)
    monkeypatch.setattr(shard_index.safetensors.numpy, "save", refuse)
    assert len(everything(path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def rewrite(path, *, seal=True, **arrays):
    """Replace arrays of the index beside `path`; `seal` recomputes its digest."""
    saved = {**safetensors.numpy.load(index_path(path).read_bytes()), **arrays}
    if seal:
        saved["digest"] = np.frombuffer(shard_index._digest(saved), np.uint8)
    other = index_path(path).with_suffix(".other")  # files of indexes are mapped, and so replaced
    other.write_bytes(safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in saved.items()}))
    os.replace(other, index_path(path))


def shifted(path):
    """The index's member tables, shifted by one sample (samples have no, one or two images in turn)."""
    saved = safetensors.numpy.load(index_path(path).read_bytes())
    return {"text": np.roll(saved["text"], 1, axis=0), "images": np.roll(saved["images"], 1, axis=0)}


@pytest.mark.parametrize("seal", [False, True])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_cannot_be_true_are_made_anew(tmp_path, built, name, seal):
    (path,) = write_shards(samples(6), tmp_path)
    truth = everything(path)
    saved = safetensors.numpy.load(index_path(path).read_bytes())[name]
    others = [
        saved.astype(np.float32),
        saved.astype(np.int16),
        saved[:-1],
        saved[None],
        np.zeros((2, 0), saved.dtype),
    ]
    if saved.dtype == np.int64 and saved.size:
        others += [
            saved + 1,
            -saved - 1,
            saved + 512 * 10**6,
            np.full_like(saved, 2**63 - 1),
            np.full_like(saved, -(2**63)),
        ]
    if name in ("defects", "text_lead", "image_lead"):
        others += [saved + 100, saved - 1]
    for other in others:
        if other.shape == saved.shape and other.dtype == saved.dtype and (other == saved).all():
            continue
        before = len(built)
        rewrite(path, seal=seal, **{name: other})
        assert everything(path) == truth and len(built) == before + 1, other
    assert everything(path) == truth and len(built) == before + 1, "what was written last is read"


def test_an_index_of_another_tar_pairs_nothing(tmp_path, built):
    """An index of another tar never pairs a record with a wrong image.

    The index has the right size, time and digest. It is compared with the tar when it is loaded, and again
    when each member is read.
    """
    (path,) = write_shards(samples(9), tmp_path)
    truth = everything(path)
    before = len(built)
    rewrite(path, **shifted(path))
    assert everything(path) == truth and len(built) == before + 1
    moved = load_index(path).text.copy()
    # The swapped samples are neither the first nor the middle nor the last, which loading checks.
    moved[[1, 2]] = moved[[2, 1]]
    rewrite(path, text=moved)
    dataset = ShardDataset(path)
    for i in range(9):
        if i in (1, 2):
            with pytest.raises(SampleError, match=r"stale-index.*delete .*evomoe-index"):
                dataset.read(i)
        else:
            assert dataset.read(i) == truth[i]
    index = load_index(path)
    images = index.images.copy()
    images[[0, 1]] = images[[1, 0]]
    rewrite(path, text=truth_text(path), images=images)
    with pytest.raises(SampleError, match="stale-index"):
        ShardDataset(path).read(1)


def truth_text(path):
    return shard_index.build_index(path).text


def test_a_tar_replaced_by_one_of_equal_size_and_time(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{i}.json", record(i)) for i in range(5)])
    everything(path)
    stat = path.stat()
    write_tar(path, [(f"{i}.json", record(9 - i)) for i in (3, 1, 4, 0, 2)])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert [raw.record["id"] for raw in everything(path)] == [6, 8, 5, 9, 7]


@pytest.mark.parametrize("what", ["folder", "pipe", "device", "huge", "loop"])
def test_what_lies_in_its_place(tmp_path, what):
    path = write_tar(tmp_path / "a.tar", [("x.json", record())])
    place = index_path(path)
    if what == "folder":
        place.mkdir()
    elif what == "pipe":
        os.mkfifo(place)
    elif what == "huge":
        with open(place, "wb") as file:
            file.truncate(1 << 40)
    else:
        place.symlink_to("/dev/zero" if what == "device" else place.name)
    assert len(ShardDataset(path)) == 1


@pytest.mark.parametrize("name", ["defects", "content", "images"])
def test_a_change_that_could_be_true_is_noticed_by_the_digest(tmp_path, built, name):
    (path,) = write_shards(samples(6), tmp_path)
    before = load_index(path)
    changed = getattr(before, name).copy()
    changed[1] = changed[1] + 1 if name != "images" else changed[2]
    count = len(built)
    rewrite(path, seal=False, **{name: changed})
    assert (getattr(load_index(path), name) == getattr(before, name)).all() and len(built) == count + 1


def test_images_of_a_sample_are_not_exchanged(tmp_path):
    (path,) = write_shards(samples(3), tmp_path)  # the third sample has two images
    images = load_index(path).images.copy()
    images[[1, 2]] = images[[2, 1]]
    rewrite(path, images=images)
    with pytest.raises(SampleError, match="stale-index"):
        ShardDataset(path).read(2)
