"""The table of a set of shards: made once, mapped afterwards, current or made again, and never trusted."""

from __future__ import annotations

import multiprocessing
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data import shard_index, shard_set
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.shard_index import index_path
from megatron_evomoe.data.shard_set import ShardSet, draft_of, open_set
from megatron_evomoe.data.shards import ShardDataset, expand_paths, write_shards
from tests.faults import failing, matching

from .helpers import samples

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path):
    """Forty samples in twenty shards, without tables and indexes."""
    write_shards(samples(40), tmp_path / "shards", samples_per_shard=2)
    for path in (tmp_path / "shards").glob(".*"):
        path.unlink()
    return tmp_path / "shards"


def content(dataset):
    return [dataset.read(i) for i in range(len(dataset))]


def tables(folder):
    return list(folder.glob(".*.evomoe-set"))


@pytest.fixture
def indexed(monkeypatch):
    """The shards whose index was asked for to make a row."""
    found = []

    def load(tar, cache=None, load=shard_set.load_index):
        found.append(tar)
        return load(tar, cache)

    monkeypatch.setattr(shard_set, "load_index", load)
    return found


def test_only_what_has_changed_is_looked_at_again(folder, indexed):
    first = ShardDataset(folder)
    assert len(indexed) == 20 and len(tables(folder)) == 1
    truth, shards, digests = content(first), expand_paths(str(folder)), first.contents()
    indexed.clear()
    assert content(ShardDataset(folder)) == truth and not indexed
    os.utime(shards[3], (1, 1))
    assert ShardDataset(folder).contents() == digests and indexed == [shards[3]]
    indexed.clear()
    assert content(ShardDataset(shards[:7])) == truth[:14] and not indexed, "rows of the larger set are taken"
    assert len(tables(folder)) == 2
    shards[5].unlink()
    assert content(ShardDataset(folder)) == truth[:10] + truth[12:] and not indexed


def test_a_copy_and_a_moved_folder_have_the_same_digests(folder, tmp_path):
    digests = ShardDataset(folder).contents()
    shutil.copytree(folder, tmp_path / "copy")
    assert ShardDataset(tmp_path / "copy").contents() == digests
    os.rename(folder, tmp_path / "moved")
    moved = ShardDataset(tmp_path / "moved")
    assert moved.contents() == digests and moved.shard(0).parent == tmp_path / "moved"


def test_shards_of_several_folders(folder, tmp_path):
    other = tmp_path / "other"
    write_shards(samples(4), other, samples_per_shard=2)
    paths = [str(folder / "shard-000000.tar"), str(other)]
    for _ in range(2):
        dataset = ShardDataset(paths)
        assert [str(p) for p in dataset.paths] == [paths[0], *map(str, sorted(other.glob("*.tar")))]
        assert [raw.record["id"] for raw in content(dataset)] == [f"sample-{i}" for i in (0, 1, 0, 1, 2, 3)]


def open_there(folder, queue):
    made = []
    build = shard_index.build_index
    shard_index.build_index = lambda tar: made.append(tar.name) or build(tar)
    queue.put((ShardDataset(folder).contents(), made))


def test_processes_make_it_together(folder):
    queue = FORK.SimpleQueue()
    processes = [FORK.Process(target=open_there, args=(folder, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join(30)
    assert all(contents == found[0][0] for contents, _ in found)
    assert sorted(name for _, made in found for name in made) == sorted(p.name for p in folder.glob("*.tar"))
    assert not [p for p in folder.iterdir() if p.name.endswith((".parts", ".tmp"))]


def test_a_read_only_folder_is_indexed_in_the_cache(folder, tmp_path, monkeypatch, indexed):
    truth = content(ShardDataset(folder))
    for path in folder.glob(".*"):
        path.unlink()
    cache = tmp_path / "cache"
    # the failure is simulated, because tests may run as root, for whom file modes have no effect
    mkdir, write = type(folder).mkdir, type(folder).write_bytes

    def refusing(call):
        def called(self, *args, **kwargs):
            if folder in self.parents:
                raise PermissionError(30, "Read-only file system")
            return call(self, *args, **kwargs)

        return called

    monkeypatch.setattr(type(folder), "mkdir", refusing(mkdir))
    monkeypatch.setattr(type(folder), "write_bytes", refusing(write))
    indexed.clear()
    assert content(ShardDataset(folder, cache=cache)) == truth and len(indexed) == 20
    indexed.clear()
    assert content(ShardDataset(folder, cache=cache)) == truth and not indexed
    assert not list(folder.glob(".*")) and len(list(cache.rglob("*.evomoe-index"))) == 20


def test_a_full_disk_leaves_the_samples_readable(folder):
    truth = content(ShardDataset(folder))
    for path in folder.glob(".*"):
        path.unlink()
    with failing(matching("*evomoe-set*"), folder):
        assert content(ShardDataset(folder)) == truth
    assert not tables(folder)
    assert content(ShardDataset(folder)) == truth and len(tables(folder)) == 1


def test_a_missing_shard_is_named(folder):
    with pytest.raises(ConfigError, match=r"gone.tar cannot be read: No such file"):
        open_set([folder / "shard-000000.tar", folder / "gone.tar"])


def test_a_shard_that_changes_while_it_is_used_is_counted(folder):
    dataset = ShardDataset(folder)
    truth = content(ShardDataset(folder))
    shutil.copy(folder / "shard-000009.tar", folder / "shard-000002.tar")
    index_path(folder / "shard-000002.tar").unlink()
    for _ in range(2):
        with pytest.raises(SampleError, match=r"stale-index: .*shard-000002.tar was changed after"):
            dataset.read(4)
    assert dataset.read(6) == truth[6]
    assert ShardDataset(folder).read(4).record["id"] == "sample-18"


BYTES = st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_shards(samples(6), folder, samples_per_shard=2)
    dataset = ShardDataset(folder)
    (table,) = tables(folder)
    return folder, table.read_bytes(), dataset.contents()


@settings(derandomize=True, deadline=None, max_examples=100)
@given(BYTES, st.one_of(st.none(), st.floats(0, 0.999)))
def test_damaged_tables_are_made_again(whole, changes, cut):
    folder, data, contents = whole
    damaged = bytearray(data)
    for at, change in changes:
        damaged[int(at * len(data))] ^= change
    if cut is not None:
        del damaged[int(cut * len(data)) :]
    (table,) = tables(folder)
    table.unlink()
    table.write_bytes(damaged)
    assert ShardDataset(folder).contents() == contents


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**40, 2**62, -(2**63), 2**63 - 1])


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.sampled_from(["samples", "images", "starts", "ends", "names", "problems", "digests"]), st.data())
def test_forged_tables_do_no_harm(whole, name, data):
    """A table with a seal that fits: it is refused, or its samples are read right or counted."""
    folder, table, _ = whole
    arrays = {key: array.copy() for key, array in safetensors.numpy.load(table).items()}
    array = arrays[name]
    kind = data.draw(st.sampled_from(["number", "shape", "dtype", "shorter"]))
    if kind == "number":
        flat = array.reshape(-1)
        at = data.draw(st.integers(0, len(flat) - 1))
        flat[at] = np.array(data.draw(NUMBERS)).astype(array.dtype)
    else:
        arrays[name] = {"shape": array[None], "dtype": array.astype(np.uint32), "shorter": array[:-1]}[kind]
    arrays["seal"] = np.frombuffer(shard_set._seal(arrays), np.uint8)
    path = folder / "forged"
    path.write_bytes(safetensors.numpy.save({k: np.ascontiguousarray(a) for k, a in arrays.items()}))
    found = ShardSet.open(path, folder)
    path.unlink()
    if found is None:
        return
    dataset, truth = ShardDataset.of(found), ShardDataset(folder)
    for i in range(min(len(dataset), 9)):
        try:
            raw = dataset.read(i)
        except SampleError:
            continue
        assert i < len(truth) and raw.record == truth.read(i).record


def test_stamps_tell_what_is_current(folder):
    draft, places = draft_of(expand_paths(str(folder)))
    assert draft.path is None and len(draft.unknown()) == 20 and len(places) == 1
    ShardDataset(folder)
    draft, _ = draft_of(expand_paths(str(folder)))
    assert draft.path == places[0]
