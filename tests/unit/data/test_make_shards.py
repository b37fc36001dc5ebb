"""LLaVA JSON to shards: a resume gives the same bytes, and each skipped record has a reason."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_evomoe.commands import make_shards as make_shards_command
from megatron_evomoe.config import ConfigError
from megatron_evomoe.data import make_shards
from megatron_evomoe.data.shard_index import index_path
from megatron_evomoe.data.shards import ShardDataset

from .helpers import chat, jpeg

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def source(tmp_path):
    """A source with 36 usable records of all kinds and 9 that are not usable."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for i in range(8):
        (images / "sub" / f"{i}.jpg").write_bytes(jpeg(i))
    (images / "broken.jpg").write_bytes(jpeg()[:200])
    (images / "big.jpg").write_bytes(jpeg(0, (200, 100)))
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    records = [
        {"id": "same", "image": f"sub/{i % 8}.jpg", "conversations": chat()}
        if i % 3
        else {"id": "same", "image": ["sub/0.jpg", "sub/1.jpg"], "conversations": chat("<image> or <image>?")}
        if i % 2
        else {"id": "same", "conversations": chat("1 + 1?", "2"), "kind": "text"}
        for i in range(36)
    ]
    bad = [
        ("missing-image", {"image": "gone.jpg", "conversations": chat()}),
        ("corrupt-image", {"image": "broken.jpg", "conversations": chat()}),
        ("image-too-large", {"image": "big.jpg", "conversations": chat()}),
        ("image-path", {"image": "../secret.jpg", "conversations": chat()}),
        ("image-path", {"image": str(tmp_path / "secret.jpg"), "conversations": chat()}),
        ("image-count", {"image": "sub/1.jpg", "conversations": chat("no marker")}),
        ("no-conversation", {"image": "sub/1.jpg"}),
        ("no-conversation", "not a record"),
        ("empty-answer", {"conversations": chat("a", "")}),
    ]
    for i, (_, record) in enumerate(bad):
        records.insert(4 * i + 1, record)
    (tmp_path / "llava.json").write_text(json.dumps(records))
    return tmp_path, [reason for reason, _ in bad]


def args_for(folder, output, *more):
    parser = argparse.ArgumentParser()
    make_shards_command.add_arguments(parser)
    return parser.parse_args(
        [
            "--json",
            str(folder / "llava.json"),
            "--images",
            str(folder / "images"),
            "--output",
            str(folder / output),
            "--samples-per-shard",
            "10",
            "--max-image-pixels",
            "10000",
            "--workers",
            "1",
            *more,
        ]
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_shards_and_report(source, capsys):
    folder, reasons = source
    assert make_shards_command.run(args_for(folder, "out")) == 0
    report = json.loads((folder / "out" / "report.json").read_text())
    assert (report["records"], report["written"], report["shards"]) == (45, 36, 5)
    assert [entry["reason"] for entry in report["skipped"]] == reasons
    assert [entry["record"] for entry in report["skipped"]] == [4 * i + 1 for i in range(9)]
    assert report["skipped_by_reason"]["image-path"] == 2
    dataset = ShardDataset(folder / "out")
    keys = [dataset.key(i) for i in range(len(dataset))]
    assert len(set(keys)) == 36 and keys[:2] == ["000000000", "000000002"]
    for i in range(len(dataset)):
        raw = dataset.read(i)
        named = raw.record.get("image", [])
        expected = [
            (folder / "images" / name).read_bytes() for name in ([named] if isinstance(named, str) else named)
        ]
        assert raw.images == expected
    printed = capsys.readouterr().out
    assert "36 of 45 records" in printed and "missing-image" in printed and "gone.jpg" in printed
    assert all(index_path(folder / "out" / name).exists() for name in contents(folder / "out"))


def test_workers_change_nothing(source):
    folder, _ = source
    make_shards_command.run(args_for(folder, "one"))
    make_shards_command.run(args_for(folder, "two", "--workers", "2"))
    assert contents(folder / "one") == contents(folder / "two") != {}
    assert (folder / "one" / "report.json").read_bytes() == (folder / "two" / "report.json").read_bytes()


def test_continues_with_what_is_missing(source, monkeypatch):
    folder, _ = source
    make_shards_command.run(args_for(folder, "whole"))
    make_shards_command.run(args_for(folder, "out"))
    out = folder / "out"
    (out / "shard-000001.tar").unlink()  # a lost shard
    (out / "shard-000002.tar").write_bytes(b"short")  # a damaged shard
    (out / ".make-shards" / "000003.json").unlink()  # killed before the notes were written
    (out / ".shard-000004.tar.1.tmp").write_bytes(b"left over")
    wrote = []
    write = make_shards.write_shard
    monkeypatch.setattr(make_shards, "write_shard", lambda *item: wrote.append(item[1]) or write(*item))
    assert make_shards_command.run(args_for(folder, "out")) == 0
    assert wrote == [1, 2, 3] and contents(out) == contents(folder / "whole") and not list(out.glob(".*.tmp"))


def test_a_killed_run_continues_to_the_same_bytes(source):
    folder, _ = source
    records = json.loads((folder / "llava.json").read_text()) * 12
    (folder / "llava.json").write_text(json.dumps(records))
    make_shards_command.run(args_for(folder, "whole"))
    command = [
        sys.executable,
        ROOT / "tools" / "make_shards.py",
        "--json",
        folder / "llava.json",
        "--images",
        folder / "images",
        "--output",
        folder / "out",
        "--samples-per-shard",
        "10",
        "--max-image-pixels",
        "10000",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(contents(folder / "out")) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole, part = contents(folder / "whole"), contents(folder / "out")
    assert 3 <= len(part) < len(whole), "killed too late to show anything"
    assert all(whole[name] == data for name, data in part.items())  # no partial file has a final name
    assert make_shards_command.run(args_for(folder, "out")) == 0
    assert contents(folder / "out") == whole
    assert len(workers) == 2
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in workers)  # the workers do not wait forever for a dead parent


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_other_arguments_or_foreign_shards_are_not_mixed_in(source):
    folder, _ = source
    make_shards_command.run(args_for(folder, "out"))
    with pytest.raises(ConfigError, match=r"begun with other arguments.*samples_per_shard 10 -> 20"):
        make_shards_command.run(args_for(folder, "out", "--samples-per-shard", "20"))
    (folder / "foreign").mkdir()
    (folder / "foreign" / "x.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match="another origin"):
        make_shards_command.run(args_for(folder, "foreign"))


def test_nothing_usable(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "llava.json").write_text(json.dumps([{"id": 1}] * 3))
    assert make_shards_command.run(args_for(tmp_path, "out")) == 1
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("{}", "list of records"),
        ("[]", "empty"),
    ],
)
def test_unusable_json(tmp_path, text, message):
    (tmp_path / "images").mkdir()
    if text is not None:
        (tmp_path / "llava.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        make_shards_command.run(args_for(tmp_path, "out"))


def test_messages_and_records_that_cannot_be_stored(source):
    folder, _ = source
    os.mkfifo(folder / "images" / "pipe.jpg")

    def shown(*urls):
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return {
            "messages": [
                {"role": "user", "content": [*parts, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": "7"},
            ]
        }

    records = [
        (None, shown("sub/1.jpg", "sub/2.jpg")),
        (None, {**shown("https://host/1.jpg"), "images": ["sub/3.jpg"]}),
        (None, {"image": "sub/4.jpg", "caption": "a digit"}),
        ("image-url", shown("https://host/1.jpg")),
        ("image-url", shown("data:image/jpeg;base64,AA")),
        ("image-url", {"image": "s3://bucket/1.jpg", "conversations": chat()}),
        ("image-path", shown(None)),
        ("missing-image", {"image": "pipe.jpg", "conversations": chat()}),
        ("missing-image", {"image": "a\0", "conversations": chat()}),
        ("bad-text", {"image": "\udc80.jpg", "conversations": chat()}),
        ("unread-media", {"video": "a", "conversations": chat("hi")}),
        ("bad-text", {"id": "\ud800", "conversations": chat("hi")}),
        ("record-too-large", {"x": "y" * 9_000_000, "conversations": chat("hi")}),
        ("tool-turn", {"messages": [{"role": "tool", "content": "3"}]}),
    ]
    (folder / "llava.json").write_text(json.dumps([record for _, record in records]))
    assert make_shards_command.run(args_for(folder, "out")) == 0
    report = json.loads((folder / "out" / "report.json").read_text())
    assert [entry["reason"] for entry in report["skipped"]] == [reason for reason, _ in records if reason]
    dataset = ShardDataset(folder / "out")
    assert [len(dataset.read(i).images) for i in range(3)] == [2, 1, 1]
    assert [turn["value"] for turn in dataset.read(0).record["conversations"]] == ["<image><image>?", "7"]


def test_a_field_that_comes_twice_is_named(source):
    folder, _ = source
    (folder / "llava.json").write_text('[{"image": "a", "image": "b"}]')
    with pytest.raises(ConfigError, match=r"llava\.json is not valid JSON: the field 'image' appears twice"):
        make_shards_command.run(args_for(folder, "out"))
