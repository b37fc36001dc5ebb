"""Damaged and forged checkpoints: their records, their `.metadata`, and the files in their folders."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_evomoe.checkpoint import contents, integrity, metadata
from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.checkpoint.stream import CheckpointReader, CheckpointWriter

TENSORS = {
    "a": torch.arange(6.0),
    "b": torch.zeros(2, 3).bfloat16(),
    "optimizer.state.exp_avg.b": torch.ones(2, 3),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    record = Record(
        stage="warmup",
        kind="warmup",
        step=12,
        position=96,
        finished=False,
        layout={"world": 2},
        vocab_size=8,
        tokenizer_fingerprint="abc",
        run_id="5" * 32,
        wandb_run_id="w1",
        lineage=[
            {
                "stage": "align",
                "kind": "align",
                "step": 3,
                "path": "run/align/iter_0000003",
                "run_id": "5" * 32,
            }
        ],
    )
    with CheckpointWriter(tmp_path_factory.mktemp("fuzz") / "warmup", record, "{}\n") as writer:
        for key, tensor in TENSORS.items():
            writer.put(key, tensor)
    return writer.path


def damaged(draw: random.Random, content: bytes, pieces: list[bytes]) -> bytes:
    """Return `content` with one to three faults.

    A fault flips bits, cuts, repeats or exchanges blocks, or inserts one of `pieces` anywhere.
    """
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        a, b, c = sorted(draw.randrange(len(content) + 1) for _ in range(3))
        piece, gone = draw.choice(pieces), draw.randint(1, 8)
        content = draw.choice(
            [
                flipped(draw, content),
                content[:b],
                content[:a] + content[c:],
                content[:b] + content[a:],
                content[:a] + content[b:c] + content[a:b] + content[c:],
                content[:a] + piece + content[a:],
                content[:a] + piece + content[a + gone :],
            ]
        )
    return content


def flipped(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content or b"\0")
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


VALUES = [
    None,
    True,
    -1,
    0,
    2,
    2.5,
    1e300,
    10**40,
    "",
    "x",
    "../x",
    "/dev/zero",
    "a\0",
    "\ud800",
    [],
    {},
    [[]],
    {"a": 1},
    [1, 2],
]


def places(value: Any) -> list[tuple[dict[str, Any], str]]:
    """Every key of every object in a JSON value, with the object that holds it."""
    if isinstance(value, list):
        return [place for item in value for place in places(item)]
    return [p for k, v in value.items() for p in [(value, k), *places(v)]] if isinstance(value, dict) else []


def invented(draw: random.Random, data: dict[str, Any]) -> dict[str, Any]:
    """A record with another value somewhere, and either without its digest or with a matching one."""
    data = json.loads(json.dumps(data))
    for _ in range(draw.randint(1, 2)):
        owner, key = draw.choice(places(data))
        if draw.random() < 0.2:
            owner.pop(key, None)
        else:
            owner[key if draw.random() < 0.8 else draw.choice(["y", "step", "../z", "new.distcp"])] = (
                draw.choice(VALUES)
            )
    if draw.random() < 0.5:
        data |= {"format": 1}
        data.pop("run_id", None), data.pop("digest", None)
    else:
        data.pop("digest", None)
        data["digest"] = records._digest_of(data)
    return data


def test_checkpoint_records(saved, tally):
    """A damaged record is never read as another record.

    A record that was rewritten together with its digest is read as it is written.
    """
    path = saved / records.FILE_NAME
    content = path.read_bytes()
    wanted, pieces = (
        records.parse(content, path),
        [b'"', b"{", b"}", b",", b"\\", b"0", b"e9", b"null", b"\xff", b"[" * 2000],
    )
    for draw in tally.draws(3000):
        is_damage = draw.random() < 0.7
        data = invented(draw, json.loads(content))
        try:
            found = records.parse(
                damaged(draw, content, pieces) if is_damage else json.dumps(data).encode(), path
            )
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            tally.add("named")
            continue
        data.pop("digest", None)
        assert (
            found == wanted
            if is_damage
            else dataclasses.asdict(found) == {**dataclasses.asdict(Record(**data)), **data}
        )
        tally.add("right")


OPCODES = [bytes([code]) for code in range(256)] + [
    b"cos\nsystem\n",
    b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93",
    b"X\x04\x00\x00\x00echo\x85R",
    b"\x8a\xff",
    b"(" * 500,
    b"\x95" + struct.pack("<Q", 1 << 50),
    b"r\xff\xff\xff\x7f",
    b"j\xff\xff\xff\x7f",
    b"N}h\x01h\x02s\x86b",
    b")\x81",
    b"X\x08\x00\x00\x00builtinsX\x07\x00\x00\x00getattr\x93",
    b"h\x00h\x01\x86R",
    b"\x8d" + b"\xff" * 8,
    b"]\x94h\x00a",
    b"h\x03h\x03\x86",
    b"\x85" * 5000,
]


def test_checkpoint_metadata(saved, tally):
    """Whatever is read from `.metadata` is valid.

    It refers only to places inside the files, it stays the same when written and read again, and no name in
    it was looked up.
    """
    content = (saved / metadata.FILE_NAME).read_bytes()
    sizes = {path.name: path.stat().st_size for path in saved.iterdir()}
    wanted = metadata.parse(content, sizes)
    for draw in tally.draws(3000):
        try:
            found = metadata.parse(damaged(draw, content, OPCODES), sizes)
        except ValueError:
            tally.add("named")
            continue
        assert all(p.offset + p.length <= sizes[p.relative_path] for p in found.storage_data.values())
        assert metadata.parse(pickle.dumps(found, protocol=4), sizes) == found
        assert {type(v) for v in found.state_dict_metadata.values()} <= {
            type(v) for v in wanted.state_dict_metadata.values()
        }
        tally.add("right")


def _other(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def _changed(draw: random.Random, path: Path) -> None:
    path.write_bytes(flipped(draw, path.read_bytes()))


def _changed_knowingly(draw: random.Random, path: Path) -> None:
    """Damage a file and make its checksum and the digest match again."""
    path.write_bytes(damaged(draw, path.read_bytes(), OPCODES))
    if path.name != records.FILE_NAME:
        record = records.read_unchecked(path.parent)
        record.files[path.name] = [path.stat().st_size, zlib.crc32(path.read_bytes())]
        record.write(path.parent)


FAULTS: list[Callable[[random.Random, Path], Any]] = [
    lambda draw, path: path.unlink(),
    lambda draw, path: _other(path, Path.mkdir),
    lambda draw, path: _other(path, os.mkfifo),
    lambda draw, path: _other(
        path, lambda p: p.symlink_to(draw.choice(["/dev/zero", "gone", p.name, "/etc/passwd", "common.pt"]))
    ),
    lambda draw, path: _other(path, lambda p: p.write_bytes(b"")),
    lambda draw, path: os.truncate(path, draw.randrange(2 * path.stat().st_size + 1)),
    lambda draw, path: path.rename(path.with_name(draw.choice(["x", "__1_0.distcp", ".metadata.bck"]))),
    lambda draw, path: (path.parent / draw.choice(["x", "__0_1.distcp", "evomoe.json.new"])).write_bytes(
        b"x"
    ),
    lambda draw, path: path.parent.rename(
        path.parent.with_name(draw.choice(["iter_0000011", "iter_12", "iter_00000012"]))
    ),
    _changed,
    _changed_knowingly,
    _changed_knowingly,
]


def test_checkpoint_folders(saved, tmp_path, tally):
    """A damaged folder is read as a run reads it on loading, and then every tensor is read."""
    for i, draw in enumerate(tally.draws(400)):
        folder = Path(shutil.copytree(saved, tmp_path / str(i) / saved.name))
        draw.choice(FAULTS)(draw, draw.choice(sorted(folder.iterdir())))
        folder = next(folder.parent.iterdir())
        try:
            if problem := integrity.mismatch(folder, records.read(folder).files):
                raise CheckpointError(problem)
            contents.require_safe(folder)
            reader = CheckpointReader(folder)
            found = {key: reader.read(key) for key in reader.shapes}
        except CheckpointError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            tally.add("named")
        else:
            assert all(tensor.shape == reader.shapes[key] for key, tensor in found.items())
            tally.add("right")
        shutil.rmtree(folder.parent)
