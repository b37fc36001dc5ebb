"""The lengths of samples are those of the rows that training makes, however the counting went."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_evomoe.config import ConfigError, DataConfig
from megatron_evomoe.data import lengths_file, lengths_work
from megatron_evomoe.data.batch import Preparer, truncate
from megatron_evomoe.data.conversation import check_length, encode, parse_turns
from megatron_evomoe.data.errors import DataError, SampleError
from megatron_evomoe.data.lengths import open_lengths
from megatron_evomoe.data.lengths_file import file_content
from megatron_evomoe.data.sample_length import REASONS
from megatron_evomoe.data.shards import ShardDataset, write_shards
from megatron_evomoe.data.shared_work import parts_folder
from tests.faults import failing, matching
from tests.fuzz.samples import reasons

from .helpers import TEMPLATES, TOKENS_PER_IMAGE, forked_children, samples, write_tar

SETTINGS = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
WORDS = ["Is it even?", " There are 7.", "é", "<image>", "\n", "漢字", "</s>", " " * 200, "<|im_end|>", ""]
TEXT = st.lists(st.sampled_from(WORDS), max_size=5).map("".join)


@st.composite
def conversations(draw):
    """Turns of which some are not allowed, and how many images stand in the text or do not."""
    turns = []
    if draw(st.booleans()):
        turns.append({"from": "system", "value": draw(TEXT)})
    for _ in range(draw(st.integers(0, 3))):
        turns += [{"from": "human", "value": draw(TEXT)}, {"from": "gpt", "value": draw(TEXT)}]
    if draw(st.integers(0, 3)) == 0:
        turns.append({"from": draw(st.sampled_from(["gpt", "human", "tool"])), "value": draw(TEXT)})
    shown = sum(turn["value"].count("<image>") for turn in turns if turn["from"] == "human")
    return turns, max(0, shown + draw(st.sampled_from([0, 0, 0, 0, 1, -1])))


def prepared(dataset, tokenizer, template, seq_length, long_samples):
    """Length of each row of training, 0 where it has none; reasons and messages of those."""
    preparer = Preparer(dataset, tokenizer, None, template, TOKENS_PER_IMAGE, seq_length, long_samples, 10**6)
    found, problems = [], {}
    for i in range(len(dataset)):
        try:
            found.append(len(preparer._encode(i)[0].tokens))
        except SampleError as error:
            found.append(0)
            problems[i] = error.reason, error.message
    return found, problems


def cut(dataset, i, tokenizer, template, length):
    """Tokens that `truncate` leaves of a usable sample; 0 where it is refused."""
    turns, sample = encoded(dataset, i, tokenizer, template)
    try:
        check_length(turns, length)
        if len(sample.tokens) > length:
            sample, _ = truncate(sample, length, TOKENS_PER_IMAGE)
        return len(sample.tokens)
    except SampleError:
        return 0


@functools.lru_cache(maxsize=64)
def encoded(dataset, i, tokenizer, template):
    turns, images = dataset.record(i)["conversations"], len(dataset.images_of(i)[1])
    return parse_turns(turns), encode(turns, images, tokenizer, template, TOKENS_PER_IMAGE)


def opened(dataset, tokenizer, template="v1", folder=None, **more):
    config = DataConfig(conversation_template=template)
    return open_lengths(dataset, tokenizer, config, TOKENS_PER_IMAGE, folder=folder, **{"workers": 1, **more})


@pytest.mark.parametrize("template", TEMPLATES)
def test_lengths_are_those_of_rows(tokenizer, template, tmp_path):
    path = tmp_path / "a.tar"

    @settings(max_examples=12, **SETTINGS)
    @given(st.lists(conversations(), min_size=1, max_size=6), st.integers(1, 90))
    def run(drawn, seq_length):
        members = []
        for i, (turns, images) in enumerate(drawn):
            members += [(f"{i}.{j}.jpg", b"not decoded") for j in range(images)]
            members.append((f"{i}.json", json.dumps({"conversations": turns}).encode()))
        dataset = ShardDataset(write_tar(path, members))
        measured = opened(dataset, tokenizer, template)
        everything = range(len(dataset))
        whole, problems = prepared(dataset, tokenizer, template, 10**9, "skip")
        found = measured[everything].tolist()
        assert [max(length, 0) for length in found] == whole
        assert {i: REASONS[-length - 1] for i, length in enumerate(found) if length < 0} == {
            i: reason for i, (reason, _) in problems.items()
        }
        examples = {i: (reason, m) for reason, p in measured.problems.items() for i, m in p.examples}
        assert examples.items() <= problems.items()
        assert sum(p.count for p in measured.problems.values()) == len(problems)
        for rule in ("skip", "truncate"):
            expected, _ = prepared(dataset, tokenizer, template, seq_length, rule)
            assert measured.usable(everything, seq_length, rule).tolist() == expected
        longest = max(whole)
        for length in (*range(1, 60), longest - 1, longest, longest + 1):
            expected = [cut(dataset, i, tokenizer, template, length) if whole[i] else 0 for i in everything]
            assert measured.usable(everything, length, "truncate").tolist() == expected
        measured.path.unlink()

    run()


def test_every_documented_reason_has_a_code():
    """A reason without a code would stop the counting."""
    of_pictures = {"corrupt-image", "image-too-large", "image-shape", "image-path"}
    of_reading = {"too-long", "stale-length", "bad-kind"}
    assert set(REASONS) == reasons() - of_pictures - of_reading
    assert len(set(REASONS)) == len(REASONS)


# ---- many blocks and pieces


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks, and therefore pieces of the work, of 4 samples."""
    monkeypatch.setattr(lengths_file, "BLOCK", 4)
    monkeypatch.setattr(lengths_work, "BLOCK", 4)


@pytest.fixture
def shards(tmp_path):
    """50 samples with no, one or two images in 3 shards, of which every seventh is unusable."""
    found = samples(50)
    for record, _ in found[3::7]:
        record["conversations"][1]["value"] = ""
    write_shards(found, tmp_path / "shards", samples_per_shard=20)
    return ShardDataset(tmp_path / "shards")


def is_right(measured, dataset, tokenizer, template="v1"):
    everything = np.arange(len(dataset))
    for length, rule in ((10**6, "skip"), (60, "skip"), (60, "truncate"), (9, "truncate")):
        expected, _ = prepared(dataset, tokenizer, template, length, rule)
        assert measured.usable(everything, length, rule).tolist() == expected
    assert measured.problems["empty-answer"].count == len(range(3, 50, 7))
    assert [i for i, _ in measured.problems["empty-answer"].examples] == list(range(3, 50, 7))[:5]
    return True


@pytest.mark.parametrize("workers", [1, 3])
def test_pieces_are_put_together(small_blocks, shards, sp, workers):
    lines = []
    measured = opened(shards, sp, workers=workers, say=lines.append)
    assert is_right(measured, shards, sp)
    assert measured.path.parent == shards.paths[0].parent and measured.path.name.startswith(
        ".evomoe-lengths-"
    )
    assert not parts_folder(measured.path, 13).exists()
    assert lines[0].endswith("0 of 50 samples") and "50 of 50 samples" in lines[-2]
    assert "empty-answer: 7 of 50, for example 000000003 of " in lines[-1]
    assert measured.usable(np.array([4, 4, 0]), 10**6, "skip").tolist() == measured[[4, 4, 0]].tolist()
    with pytest.raises(IndexError, match="50"):
        measured[[50]]
    with pytest.raises(IndexError, match="-1"):
        measured[[-1]]


def test_file_is_read_again_and_its_name_hides_it_from_readers_of_tars(small_blocks, shards, sp):
    first, lines = opened(shards, sp), []
    time = first.path.stat().st_mtime_ns
    again = opened(shards, sp, say=lines.append)
    assert first.path.stat().st_mtime_ns == time and not lines and again.digest == first.digest
    assert len(ShardDataset(shards.paths[0].parent)) == 50


def test_other_data_tokenizers_and_templates_have_files_of_their_own(small_blocks, shards, tokenizers):
    sp = tokenizers["sp"]
    mine = opened(shards, sp)
    others = [
        opened(shards, tokenizers["hf-gpt"]),
        opened(shards, sp, "phi"),
        open_lengths(shards, sp, DataConfig(), TOKENS_PER_IMAGE + 1),
        opened(ShardDataset(shards.paths[:2]), sp),
    ]
    assert len({mine.path, *(other.path for other in others)}) == 5
    assert is_right(mine, shards, sp) and is_right(others[0], shards, tokenizers["hf-gpt"])
    assert (others[2][range(50)] - mine[range(50)]).tolist() == [
        i % 3 if mine[[i]][0] > 0 else 0 for i in range(50)
    ]


def test_file_of_another_tokenizer_is_not_used_under_this_name(small_blocks, shards, tokenizers, caplog):
    right, wrong = opened(shards, tokenizers["sp"]), opened(shards, tokenizers["hf-gpt"])
    shutil.copy(wrong.path, right.path)
    assert is_right(opened(shards, tokenizers["sp"]), shards, tokenizers["sp"])
    assert f"{right.path} holds lengths of other samples, of another tokenizer" in caplog.text


def test_lengths_do_not_depend_on_where_the_shards_lie(small_blocks, shards, sp, tmp_path):
    measured = opened(shards, sp)
    shutil.copytree(shards.paths[0].parent, tmp_path / "copy")
    lines = []
    assert opened(ShardDataset(tmp_path / "copy"), sp, say=lines.append).digest == measured.digest
    assert not lines


# ---- damage


def test_damaged_file_is_named_and_counted_again(small_blocks, shards, sp, caplog):
    measured = opened(shards, sp)
    whole = measured.path.read_bytes()

    @settings(max_examples=30, **SETTINGS)
    @given(st.integers(0, len(whole) - 1), st.sampled_from(["flip", "cut", "zero", "more", "swap"]))
    def run(at, kind):
        data = bytearray(whole)
        if kind == "flip":
            data[at] ^= 1 << at % 8
        elif kind == "cut":
            del data[at:]
        elif kind == "zero":
            data[at:] = bytes(len(data) - at)
        elif kind == "more":
            data += bytes(at + 1)
        else:
            data = data[-at - 1 :] + data[: -at - 1]
        if data == whole:
            return
        caplog.clear()
        measured.path.write_bytes(data)
        assert is_right(opened(shards, sp), shards, sp)
        assert str(measured.path) in caplog.text
        assert measured.path.read_bytes() == whole

    run()


def test_damage_that_is_met_in_training_names_the_file(small_blocks, shards, sp, monkeypatch):
    monkeypatch.setattr(
        lengths_file, "_WHOLE", 0
    )  # as a file that is too large to be read whole at the start
    path = opened(shards, sp).path
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + 16 * 30] ^= 1  # the length of sample 30, in the block of 28 … 31
    path.write_bytes(data)
    measured = opened(shards, sp)
    assert (measured[[27, 32]] > 0).all()
    for _ in range(2):
        with pytest.raises(DataError, match=f"{path} is damaged.*delete it"):
            measured.usable([3, 28], 100, "skip")


def forge_part(path, tokenizer, dataset, first, length):
    """Write a sound part of lengths that are not right, which tells where it was used."""
    rows = np.array([[length, 1, 0, -1]] * 4, np.int32)
    fingerprint = lengths_file_fingerprint(path)
    name = parts_folder(path, 13) / f"{first // 4}.part"
    name.parent.mkdir(exist_ok=True)
    content = file_content(fingerprint, first, [(rows, np.zeros(0, np.int32))], {})
    name.write_bytes(b"".join(content))
    return name


def lengths_file_fingerprint(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["about"])["fingerprint"]


def test_parts_of_earlier_attempts_are_used_if_they_are_sound(small_blocks, shards, sp, caplog):
    measured = opened(shards, sp)
    kept = forge_part(measured.path, sp, shards, 8, 1000)
    cut = forge_part(measured.path, sp, shards, 16, 2000)
    cut.write_bytes(cut.read_bytes()[:-3])
    forge_part(measured.path, sp, shards, 20, 3000).rename(kept.with_name("6.part"))  # of other samples
    measured.path.unlink()
    found = opened(shards, sp)[range(50)]
    right = measured[range(50)].tolist()
    assert found.tolist() == [*right[:8], *[1000] * 4, *right[12:]]


# ---- interruption


class Stop(Exception):
    pass


def test_interrupted_work_goes_on(small_blocks, shards, sp):
    whole = opened(shards, sp)
    right = whole[range(50)].tolist()
    for wanted in (1, 6, 12):
        whole.path.unlink()

        def stop(wanted=wanted):
            folder = parts_folder(whole.path, 13)
            if folder.exists() and len(list(folder.glob("*.part"))) >= wanted:
                raise Stop

        try:
            opened(shards, sp, meanwhile=stop)
        except Stop:
            parts = list(parts_folder(whole.path, 13).glob("*.part"))
            assert len(parts) >= wanted
        assert not forked_children()
        assert opened(shards, sp)[range(50)].tolist() == right
        assert not parts_folder(whole.path, 13).exists()


def test_processes_share_the_work(small_blocks, shards, sp):
    """As several ranks do: each piece is counted by one of them, and all get the same lengths."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def one_rank():
        measured = opened(shards, sp, workers=2)
        queue.put((measured.digest, measured[range(50)].tolist()))

    ranks = [context.Process(target=one_rank) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = [queue.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert found[0] == found[1] == found[2]
    assert is_right(opened(shards, sp), shards, sp)


def kill_once_there_is_a_part(path, how_many):
    """A `meanwhile` that kills some of the counting processes."""
    done = []

    def look():
        children = forked_children()
        if not done and children and list(parts_folder(path, 13).glob("*.part")):
            done.append(len(children))
            for child in children[:how_many]:
                os.kill(child.pid, signal.SIGKILL)

    return look


@pytest.fixture
def slow_counting(monkeypatch):
    """Each piece takes a moment, so that a test can act between two."""
    count = lengths_work.LengthsWork._count

    def slowly(self, piece):
        time.sleep(0.1)
        return count(self, piece)

    monkeypatch.setattr(lengths_work.LengthsWork, "_count", slowly)


def test_others_do_the_work_of_a_killed_process(small_blocks, slow_counting, shards, sp):
    path = opened(shards, sp).path
    path.unlink()
    assert is_right(opened(shards, sp, workers=2, meanwhile=kill_once_there_is_a_part(path, 1)), shards, sp)


def test_work_of_killed_processes_is_kept(small_blocks, slow_counting, shards, sp):
    path = opened(shards, sp).path
    path.unlink()
    with pytest.raises(DataError, match=r"were killed .*The lengths of \d+ of 50 samples are kept"):
        opened(shards, sp, workers=2, meanwhile=kill_once_there_is_a_part(path, 2))
    assert list(parts_folder(path, 13).glob("*.part"))
    assert is_right(opened(shards, sp), shards, sp)


# ---- disks


@pytest.mark.parametrize("pattern", [".[5-9].part.*", "*evomoe-lengths*.tmp"], ids=["part", "whole"])
@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_named_and_what_was_counted_is_kept(small_blocks, shards, sp, pattern, workers):
    folder = shards.paths[0].parent
    with (
        failing(matching(pattern), folder),
        pytest.raises(
            DataError, match=f"written to {folder}: No space left on device. The lengths of"
        ) as told,
    ):
        opened(shards, sp, workers=workers)
    (kept,) = folder.glob(".evomoe-lengths-*.parts")
    parts = {part.name for part in kept.glob("*.part")}
    assert f"lengths of {min(4 * len(parts), 50)} of 50 samples are kept in {kept}; make" in str(told.value)
    assert parts.isdisjoint(f"{n}.part" for n in range(5, 10)) == (pattern != "*evomoe-lengths*.tmp")
    assert not list(folder.rglob("*.tmp"))
    assert is_right(opened(shards, sp), shards, sp)
    assert not kept.exists()


def test_read_only_folder(small_blocks, shards, sp, tmp_path, monkeypatch):
    """Lengths of shards that lie in a read-only folder are kept in the folder that the caller gives."""
    touch, data = lengths_work.Path.touch, shards.paths[0].parent

    def read_only(path, *arguments, **more):
        if path.parent == data:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        touch(path, *arguments, **more)

    monkeypatch.setattr(lengths_work.Path, "touch", read_only)
    with pytest.raises(ConfigError, match=f"cannot be written to {data}; make"):
        opened(shards, sp)
    measured = opened(shards, sp, folder=tmp_path / "run")
    assert measured.path.parent == tmp_path / "run" and is_right(measured, shards, sp)
    lines = []
    assert opened(shards, sp, folder=tmp_path / "run", say=lines.append).path == measured.path and not lines
