"""A record protects itself: it reads back as written, or an error names the file."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import socket
from pathlib import Path

import pytest
import torch

from megatron_evomoe.checkpoint import find
from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.checkpoint.stream import CheckpointWriter


def record(step: int = 0, **values) -> Record:
    before = {"stage": "before", "kind": "pretrained", "step": 3, "path": "x/y", "run_id": ""}
    return Record(
        **{
            "stage": "align",
            "kind": "align",
            "step": step,
            "position": 4 * step,
            "finished": False,
            "layout": {"world": 2, "expert_model_parallel_size": 2},
            "vocab_size": 64,
            "tokenizer_fingerprint": "abc",
            "run_id": "7" * 32,
            "lineage": [before],
            **values,
        }
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A stage folder that holds two checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "align"
    for step in (1, 2):
        with CheckpointWriter(folder, record(step), "{}\n") as writer:
            writer.put("a", torch.arange(6.0))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the stage folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "align"))


def test_no_flipped_bit_changes_what_is_read(saved):
    """Every bit of the file is flipped in turn; a flip in white space may change nothing."""
    path = saved / "iter_0000002" / records.FILE_NAME
    content = path.read_bytes()
    wanted, refused = records.parse(content, path), 0
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert records.parse(bytes(flipped), path) == wanted, f"bit {bit}"
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 0.75 * 8 * len(content)


def test_what_is_written_is_read(tmp_path):
    wanted = record(5, files={name: [1, 2] for name in records.ESSENTIAL}, finished=True, wandb_run_id="w")
    wanted.write(tmp_path)
    assert records.read_unchecked(tmp_path) == wanted


@pytest.mark.parametrize(
    "values",
    [
        {"step": -1},
        {"position": True},
        {"stage": 3},
        {"layout": {"world": "2"}},
        {"lineage": [{}]},
        {"files": {}},
        {"vocab_size": 1 << 70},
        {"position": float("nan")},
    ],
)
def test_a_record_that_could_not_be_read_is_not_written(tmp_path, values):
    wanted = {"files": {name: [1, 2] for name in records.ESSENTIAL}, **values}
    with pytest.raises(CheckpointError, match=r"evomoe\.json"):
        record(**wanted).write(tmp_path)
    assert not list(tmp_path.iterdir())


def in_format_1(path: Path, **changes) -> None:
    """Rewrite a record in format 1, which has no digest."""
    data = json.loads((path / records.FILE_NAME).read_text())
    data.pop("digest", None), data.pop("run_id", None)
    (path / records.FILE_NAME).write_text(json.dumps({**data, "format": 1, **changes}))


def test_the_older_format_is_read_and_said_to_be_unprotected(folder, caplog):
    newest = folder / "iter_0000002"
    in_format_1(newest)
    for _ in range(3):
        assert records.read(newest) == dataclasses.replace(
            record(2), files=records.read(newest).files, run_id="", format=1
        )
    assert caplog.text.count("a change to it would not be noticed") == 1
    assert find.latest(folder, find.Owner("align", "7" * 32)) == newest
    records.read(newest).write(newest)  # a resumed run saves in the current format
    assert records.read(newest).format == records.FORMAT


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "2"},
        {"step": 2.0},
        {"finished": 1},
        {"files": []},
        {"files": {}},
        {"parts": {}},
        {"lineage": {}},
        {"lineage": [3]},
        {"layout": None},
        {"position": -4},
        {"stage": None},
        {"format": 0},
        {"format": 3},
        {"format": True},
        {"format": None},
        {"more": 1},
        {"digest": "0"},
        {"vocab_size": 10**30},
        {"position": 1e300},
    ],
)
def test_wrong_types_and_numbers_are_named(folder, caplog, changes):
    """The record is in the old format, where no digest catches the change first."""
    in_format_1(folder / "iter_0000002", **changes)
    with pytest.raises(CheckpointError, match=r"iter_0000002/evomoe\.json is damaged"):
        records.read(folder / "iter_0000002")
    assert find.latest(folder) == folder / "iter_0000001"
    assert "evomoe.json is damaged" in caplog.text


def socket_at(path: Path) -> None:
    """The socket is bound by a relative name, for a full path may exceed the address limit."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


INSTEAD = {
    "directory": Path.mkdir,
    "pipe": os.mkfifo,
    "socket": socket_at,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to("gone"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a whole one": lambda path: path.symlink_to(path.parent.parent / "iter_0000001" / path.name),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("name", [records.FILE_NAME, ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("what", INSTEAD)
def test_anything_but_a_regular_file_is_named(folder, caplog, name, what):
    path = folder / "iter_0000002" / name
    path.unlink()
    INSTEAD[what](path)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        records.read(folder / "iter_0000002")
    assert find.latest(folder) == folder / "iter_0000001"


CONTENTS = {
    "nothing": b"",
    "zeros": bytes(100),
    "a number": b"7",
    "a list": b"[]",
    "no UTF-8": b"\xff\xfe{",
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "a long number": b'{"step": ' + b"9" * 100_000 + b"}",
    "NaN": b'{"step": NaN}',
    "infinity": b'{"step": -Infinity}',
    "twice": b'{"format": 2, "format": 2}',
    "a surrogate": rb'{"stage": "\ud800", "format": 1}',
    "a BOM": b"\xef\xbb\xbf{}",
    "UTF-16": '{"format": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_anything_but_a_record_is_named(folder, what):
    (folder / "iter_0000002" / records.FILE_NAME).write_bytes(CONTENTS[what])
    with pytest.raises(CheckpointError, match=r"iter_0000002/evomoe\.json is damaged"):
        records.read(folder / "iter_0000002")
    assert find.latest(folder) == folder / "iter_0000001"


def test_a_huge_record_is_not_read(folder):
    with (folder / "iter_0000002" / records.FILE_NAME).open("r+b") as file:
        file.truncate(1 << 40)  # a sparse file
    with pytest.raises(CheckpointError, match=r"it has 1099511627776 bytes, at most"):
        records.read(folder / "iter_0000002")


@pytest.mark.parametrize(
    "name",
    [
        "/dev/zero",
        "../iter_0000001/.metadata",
        "..",
        ".",
        "",
        "a/b",
        "a\0b",
        "a\nb",
        records.FILE_NAME,
        "x" * 256,
    ],
)
def test_only_plain_names_are_listed(folder, name):
    path = folder / "iter_0000002"
    in_format_1(path, files={**records.read(path).files, name: [1, 1]})
    with pytest.raises(CheckpointError, match=r"evomoe\.json is damaged"):
        records.read(path)


def test_the_list_is_the_folder(folder):
    path = folder / "iter_0000002"
    (path / "more").write_text("")
    with pytest.raises(
        CheckpointError, match="holds 'more', which its record does not list; move it elsewhere"
    ):
        records.read(path)
    (path / "more").unlink()
    for name in records.ESSENTIAL:
        in_format_1(
            path, files={k: v for k, v in records.read(folder / "iter_0000001").files.items() if k != name}
        )
        with pytest.raises(CheckpointError, match=f"its list of files does not list {name}"):
            records.read(path)


def test_the_step_is_the_folders(folder):
    renamed = (folder / "iter_0000002").rename(folder / "iter_0000003")
    with pytest.raises(
        CheckpointError, match="iter_0000003 holds step 2, whose directory is called iter_0000002"
    ):
        records.read(renamed)
    assert find.latest(folder) == folder / "iter_0000001"


def test_another_stages_or_runs_is_named_and_the_one_before_is_taken(folder, caplog):
    mine, path = find.Owner("align", "7" * 32), folder / "iter_0000002"
    assert find.latest(folder, mine) == path
    for changes, message in [
        ({"stage": "warmup"}, "is of stage 'warmup', and is in the directory of stage 'align'"),
        ({"run_id": "8" * 32}, f"is of run {'8' * 32}, and is in the directory of run {'7' * 32}"),
    ]:
        dataclasses.replace(records.read(folder / "iter_0000001"), step=2, **changes).write(path)
        assert find.latest(folder) == path, "without an owner any will do"
        assert find.latest(folder, mine) == folder / "iter_0000001"
        assert message in caplog.text


def test_cut_lengthened_and_shuffled_records(saved):
    path = saved / "iter_0000002" / records.FILE_NAME
    content, draw = path.read_bytes(), random.Random(0)
    wanted = records.parse(content, path)
    for _ in range(2000):
        a, b, c = sorted(draw.randrange(len(content) + 1) for _ in range(3))
        damaged = draw.choice(
            [
                content[:a],
                content[a:],
                content[:a] + content[b:],
                content[:b] + content[a:],
                content[:a] + content[b:c] + content[a:b] + content[c:],
                content[:a] + draw.randbytes(b % 9) + content[a:],
            ]
        )
        try:
            assert records.parse(damaged, path) == wanted
        except CheckpointError as error:
            assert str(path) in str(error)
