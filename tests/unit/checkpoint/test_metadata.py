"""The `.metadata` file is read as data only.

What torch's and megatron-core's writers produce is read back; anything else in the file is refused and has no
effect on the process.
"""

from __future__ import annotations

import copyreg
import dataclasses
import enum
import io
import os
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_evomoe.checkpoint import contents, metadata
from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.checkpoint.stream import CheckpointReader, CheckpointWriter


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint that holds three tensors, one of them in two chunks."""
    record = Record(
        stage="imported",
        kind="pretrained",
        step=0,
        position=0,
        finished=True,
        layout={"world": 1},
        vocab_size=8,
        tokenizer_fingerprint="",
    )
    with CheckpointWriter(tmp_path / "run", record, "{}\n") as writer:
        writer.put("a", torch.arange(6.0))
        writer.put("b", torch.zeros(2, 3).bfloat16())
        writer.put("c", torch.ones(2, 3), shape=(4, 3))
        writer.put("c", torch.ones(2, 3), shape=(4, 3), offset=(2,))
    return writer.path


def put(path: Path, content: bytes) -> None:
    """Overwrite a file and its recorded checksum, as an attacker would."""
    path.write_bytes(content)
    record = records.read_unchecked(path.parent)
    record.files[path.name] = [len(content), zlib.crc32(content)]
    record.write(path.parent)


# Malicious pickles, written in opcodes. `c` is a shell command that creates a file.


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


RECORD = ("torch.distributed.checkpoint.metadata", "MetadataIndex")
GETATTR = name("builtins", "getattr")


def got(owner: bytes, *attributes: str) -> bytes:
    for attribute in attributes:
        owner = GETATTR + owner + text(attribute) + b"\x86R"
    return owner


def run(command: str) -> bytes:
    return name("os", "system") + text(command) + b"\x85R"


KINDS: dict[str, Callable[[str], bytes]] = {
    "reduce": run,
    "global, the old way": lambda c: b"cos\nsystem\n" + text(c) + b"\x85R",
    "inst": lambda c: b"(" + text(c) + b"ios\nsystem\n",
    "obj": lambda c: b"(" + name("os", "system") + text(c) + b"o",
    "newobj": lambda c: name("os", "system") + text(c) + b"\x85\x81",
    "newobj_ex": lambda c: (
        name("subprocess", "Popen") + b")}" + text("args") + text(c) + b"s" + text("shell") + b"\x88s\x92"
    ),
    "state on a class": lambda c: name(*RECORD) + b"N}" + text("__init__") + name("os", "system") + b"s\x86b",
    "state on a class that may be named": lambda c: (
        name(*RECORD) + b"N}" + text("fqn") + text("x") + b"s\x86b"
    ),
    "a setter of state, given by state": lambda c: (
        name(*RECORD)
        + b"N}"
        + text("__setstate__")
        + GETATTR
        + b"s\x86b"
        + name(*RECORD)
        + b")\x81"
        + text(c)
        + b"b"
    ),
    "slots of an object": lambda c: (
        name(*RECORD) + b")\x81N}" + text("__class__") + name("os", "system") + b"s\x86b"
    ),
    "getattr, in a chain": lambda c: got(name(*RECORD), "__init__", "__globals__"),
    "getattr to a module": lambda c: (
        got(name("torch.distributed.checkpoint.filesystem", "os"), "system") + text(c) + b"\x85R"
    ),
    "getattr of a member's method": lambda c: got(
        GETATTR
        + name("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")
        + text("TORCH_CHANNELS_LAST")
        + b"\x86R",
        "__class__",
        "__base__",
        "__subclasses__",
    ),
    "getattr of an enumeration's": lambda c: got(
        name("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"), "mro"
    ),
    "a dotted name": lambda c: (
        name("torch.distributed.checkpoint.metadata", "Metadata.__init__") + text(c) + b"\x85R"
    ),
    "a dotted module": lambda c: (
        name("torch.distributed.checkpoint.filesystem.os", "system") + text(c) + b"\x85R"
    ),
    "a name that is no text": lambda c: b"K\x01K\x02\x93",
    "a name that is a tuple": lambda c: text("os") + text("system") + b"\x86" + text("x") + b"\x93",
    "a name with a surrogate": lambda c: name("os", "sys\ud800tem"),
    "persistent id": lambda c: text(c) + b"Q",
    "persistent id, as text": lambda c: b"P" + c.encode() + b"\n",
    "extension": lambda c: b"\x82\x01" + text(c) + b"\x85R",
    "extension, long": lambda c: b"\x84\x01\x00\x00\x00" + text(c) + b"\x85R",
    "buffers": lambda c: b"\x97",
    "a pickle in a pickle": lambda c: (
        name("pickle", "loads") + b"B" + struct.pack("<I", len(p := pickle.dumps(Shell(c)))) + p + b"\x85R"
    ),
    "torch's own opener": lambda c: name("torch.storage", "_load_from_bytes") + text(c) + b"\x85R",
    "a call of a record": lambda c: name(*RECORD) + text(c) + b"\x85R",
    "a call of an import": lambda c: (
        name("torch.distributed.checkpoint.filesystem", "partial") + name("os", "system") + b"\x85R"
    ),
    "copyreg": lambda c: name("copyreg", "add_extension") + text("os") + text("system") + b"K\x01\x87R",
    "a memo that swaps": lambda c: (
        name(*RECORD)
        + b"\x94h\x00h\x00)\x81"
        + b"0"
        + name("os", "system")
        + b"q\x00h\x00"
        + text(c)
        + b"\x85R"
    ),
    "the memo, out of order": lambda c: text("x") + b"r\xff\xff\xff\x7f" + run(c),
    "a memo that is not there": lambda c: b"j\xff\xff\xff\xff",
    "eval": lambda c: name("builtins", "eval") + text(f"__import__('os').system({c!r})") + b"\x85R",
    "setattr": lambda c: name("builtins", "setattr") + name(*RECORD) + text("x") + b"K\x01\x87R",
    "stack underflow": lambda c: b"R" + run(c),
    "a mark as a value": lambda c: b"(\x85" + run(c),
    "nothing but a mark": lambda c: b"(",
    "deep tuples": lambda c: b")" + b"\x85" * 50_000 + run(c),
    "deep tuples, well made": lambda c: b")" + b"\x85" * 50_000,
    "deep states": lambda c: name(*RECORD) + b")\x81" * 1 + (name(*RECORD) + b")\x81") * 5000 + b"b" * 5000,
    "a list in itself": lambda c: b"]\x94h\x00a",
    "laughs": lambda c: (
        b"]\x94"
        + b"".join(b"]" + b"h" + bytes([i]) * 1 + b"h" + bytes([i]) + b"\x86\x94" for i in range(200))
    ),
    "a frame of 2^60 bytes": lambda c: b"\x95" + struct.pack("<Q", 1 << 60) + run(c),
    "a text of 2^60 bytes": lambda c: b"\x8d" + struct.pack("<Q", 1 << 60),
    "bytes of 2^60": lambda c: b"\x8e" + struct.pack("<Q", 1 << 60),
    "a number of 2^31 bytes": lambda c: b"\x8b\xff\xff\xff\x7f",
    "a number in digits": lambda c: b"I" + b"9" * 100_000 + b"\n",
    "a float in digits": lambda c: b"Fnan\n",
    "sets": lambda c: b"\x8f(K\x01\x90",
    "no end": lambda c: run(c)[:-1],
}


class Shell:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def state_of_the_process() -> list[Any]:
    """Snapshot of the global state that unpickling could change for later code."""
    owners = [
        torch_metadata,
        planner,
        filesystem,
        *(
            v
            for m in (torch_metadata, planner, filesystem)
            for v in vars(m).values()
            if isinstance(v, type) and v.__module__ == m.__name__
        ),
        torch.Size,
        torch,
    ]
    return [
        [(o, sorted((k, id(v)) for k, v in vars(o).items() if k != "_abc_impl")) for o in owners],
        dict(copyreg.dispatch_table),
        dict(copyreg._extension_registry),
        sys.getrecursionlimit(),
        set(sys.modules),
    ]


# The reader does not descend into these values where the field is ignored.
HARMLESS_WHERE_IGNORED = {
    "deep tuples, well made",
    "deep states",
    "a list in itself",
}


@pytest.mark.parametrize("place", ["whole", "key", "value", "ignored"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_pickle_has_no_effect_and_is_named(saved, tmp_path, kind, place):
    """A malicious pickle in any place of the file is refused, and the error names the file.

    The pickle is the whole file, or stands inside valid metadata: as a tensor's name, as a value, or in a
    field that the reader skips.
    """
    canary = tmp_path / "ran"
    harm, good = (
        KINDS[kind](f"touch {canary}"),
        unframed(dataclasses.replace(metadata.read(saved), storage_meta=None)),
    )
    before, after = {
        "whole": (b"", b""),
        "key": (b"state_dict_metadata\x94}\x94(", b"N"),
        "value": (b"version\x94", b""),
        "ignored": (b"storage_meta\x94", b""),
    }[place]
    at = good.index(before) + len(before)
    end = {"whole": len(good) - 1, "key": at, "value": len(good) - 3, "ignored": at + 1}[place]
    start = 2 if place == "whole" else at
    put(saved / ".metadata", good[:start] + harm + after + good[end:])
    whole_process = state_of_the_process()
    if place == "ignored" and kind in HARMLESS_WHERE_IGNORED:
        assert sorted(metadata.read(saved).state_dict_metadata) == ["a", "b", "c"]
    else:
        for opener in (metadata.read, CheckpointReader, contents.require_safe):
            with pytest.raises(CheckpointError, match=r"\.metadata") as caught:
                opener(saved)
            assert str(saved) in str(caught.value) and "\n" not in str(caught.value)
    assert state_of_the_process() == whole_process
    assert not canary.exists()


def unframed(found: Metadata) -> bytes:
    content = pickle.dumps(found, protocol=4)
    assert content[2:3] == b"\x95"
    return content[:2] + content[11:]


def test_the_harm_is_real(tmp_path):
    """The same pickles run their code in Python's own unpickler, so the test above is meaningful."""
    for kind in (
        "reduce",
        "global, the old way",
        "inst",
        "obj",
        "eval",
        "a pickle in a pickle",
        "getattr to a module",
    ):
        canary = tmp_path / kind
        try:
            pickle.loads(b"\x80\x04" + KINDS[kind](f"touch '{canary}'") + b".")
        except Exception as error:  # the command has run before the error
            print(error)
        assert canary.exists(), kind


class OldPickler(pickle.Pickler):
    """Pickles enum members as Python 3.11.0 to 3.11.3 do (Debian 12 ships 3.11.2)."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


@pytest.mark.parametrize("pickler", [OldPickler, pickle.Pickler])
@pytest.mark.parametrize("protocol", [4, 5])
def test_what_any_python_writes_is_read(saved, pickler, protocol):
    """The file includes the save plans, as megatron-core's background writer stores them."""
    wanted, content = metadata.read(saved), io.BytesIO()
    item = planner.WriteItem(
        MetadataIndex("a", torch.Size([0]), 0),
        planner.WriteItemType.SHARD,
        tensor_data=planner.TensorWriteData(
            chunk=wanted.state_dict_metadata["a"].chunks[0],
            properties=wanted.state_dict_metadata["a"].properties,
            size=torch.Size([6]),
        ),
    )
    found = dataclasses.replace(
        wanted, planner_data={"a": ("a",)}, storage_meta=torch_metadata.StorageMeta("somewhere", "x")
    )
    found.all_local_plans = [planner.SavePlan([item], storage_data=filesystem._StoragePrefix("__0_"))]
    pickler(content, protocol).dump(found)
    assert (b"getattr" in content.getvalue()) == (pickler is OldPickler)
    put(saved / ".metadata", content.getvalue())
    read = metadata.read(saved)
    assert read == wanted and not hasattr(read, "all_local_plans")
    assert torch.equal(CheckpointReader(saved).read("c"), torch.ones(4, 3))


def first(found: Metadata) -> TensorStorageMetadata:
    return found.state_dict_metadata["a"]


def with_place(found: Metadata, **values: Any) -> None:
    index = next(i for i in found.storage_data if i.fqn == "a")
    found.storage_data[index] = dataclasses.replace(found.storage_data[index], **values)


WRONG: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "a file elsewhere": (
        lambda m: with_place(m, relative_path="../other.distcp"),
        "not a tensor file of the record",
    ),
    "a file of the system": (
        lambda m: with_place(m, relative_path="/dev/zero"),
        "not a tensor file of the record",
    ),
    "a file that is not listed": (
        lambda m: with_place(m, relative_path="__1_0.distcp"),
        "not a tensor file of the record",
    ),
    "a file of another kind": (
        lambda m: with_place(m, relative_path="run_config.yaml"),
        "not a tensor file of the record",
    ),
    "a negative offset": (lambda m: with_place(m, offset=-1), "-1 is no count"),
    "bytes past the end": (lambda m: with_place(m, length=10**6), "points to bytes"),
    "too few bytes": (lambda m: with_place(m, length=23), "too small"),
    "an offset that is a bool": (lambda m: with_place(m, offset=True), "bool is no count"),
    "a transformation": (lambda m: with_place(m, transform_descriptors=["zip"]), "transformed"),
    "a place for nothing": (
        lambda m: m.storage_data.update({MetadataIndex("x"): next(iter(m.storage_data.values()))}),
        "not have",
    ),
    "no place": (lambda m: m.storage_data.popitem(), "has no place"),
    "no places": (lambda m: setattr(m, "storage_data", None), "a dictionary is missing"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", []), "a dictionary is missing"),
    "a key that is a number": (lambda m: m.state_dict_metadata.update({3: first(m)}), "int for a name"),
    "no chunks": (lambda m: setattr(first(m), "chunks", []), "do not cover"),
    "a chunk outside": (
        lambda m: setattr(first(m).chunks[0], "offsets", torch.Size([1])),
        "does not lie in its tensor",
    ),
    "a chunk of more axes": (
        lambda m: setattr(first(m).chunks[0], "sizes", torch.Size([6, 1])),
        "does not lie in its tensor",
    ),
    "a negative size": (lambda m: setattr(first(m), "size", torch.Size([-6])), "-6 is no count"),
    "a huge tensor": (
        lambda m: setattr(first(m), "size", torch.Size([1 << 40, 1 << 40])),
        "it has a tensor of shape",
    ),
    "a size that is a tuple": (lambda m: setattr(first(m), "size", (6,)), "a size is missing"),
    "a dtype that is none": (lambda m: setattr(first(m).properties, "dtype", "float32"), "dtype is missing"),
    "another layout": (
        lambda m: setattr(first(m).properties, "layout", torch.sparse_coo),
        "a way that no checkpoint needs",
    ),
    "another memory format": (
        lambda m: setattr(first(m).properties, "memory_format", torch.channels_last),
        "not strided and",
    ),
    "an index that is a text": (
        lambda m: m.storage_data.update(a=next(iter(m.storage_data.values()))),
        "MetadataIndex is missing",
    ),
    "other metadata": (lambda m: setattr(m, "version", 3), "int for a name"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_named(saved, what):
    change, message = WRONG[what]
    found = metadata.read(saved)
    change(found)
    put(saved / ".metadata", pickle.dumps(found, protocol=4))
    with pytest.raises(CheckpointError, match=rf"\.metadata is unsafe or damaged .*{message}"):
        metadata.read(saved)


def test_sharing_does_not_make_it_large(saved):
    """Very many tensors share one list of chunks; visiting each chunk would take a day."""
    found, count = metadata.read(saved), 3000
    chunk = torch_metadata.ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))
    shared = [chunk] * count
    found.state_dict_metadata.update(
        {
            f"t{i}": TensorStorageMetadata(first(found).properties, torch.Size([count]), shared)
            for i in range(count)
        }
    )
    put(saved / ".metadata", pickle.dumps(found, protocol=4))
    with pytest.raises(CheckpointError, match="one value appears in too many places"):
        metadata.read(saved)


def test_only_the_bytes_that_were_saved_are_read(saved):
    """The bytes read must match the checksum, even if the file changed after the comparison."""
    content = bytearray((saved / ".metadata").read_bytes())
    content[-10] ^= 1
    (saved / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the bytes of \.metadata are not those that were saved"):
        metadata.read(saved)


def test_nothing_else_opens_a_checkpoint():
    """megatron-core loads in one place, inside `safe_reads`; other loads set `weights_only=True`."""
    package = Path(metadata.__file__).parents[1]
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    assert [path.name for path, source in sources.items() if "dist_checkpointing.load(" in source] == [
        "store.py"
    ]
    assert sources[package / "checkpoint" / "store.py"].count("dist_checkpointing.load") == 1
    for path, source in sources.items():
        assert not re.search(
            r"pickle\.loads?\(|Unpickler|read_metadata\((?!self)|dcp\.load|checkpoint\.load\(", source
        ), path
        for call in re.findall(r"torch\.load\((.*)", source):
            assert "weights_only=True" in call, path


def test_what_megatron_core_allows_is_not_built(saved):
    """An enum member exists once per process, so state set on it would outlive the file."""
    from megatron.core.enums import ModelType

    allowed, member, before = (
        torch.serialization.get_safe_globals(),
        next(iter(ModelType)),
        dict(vars(next(iter(ModelType)))),
    )
    harm = (
        b"\x80\x02c"
        + f"{ModelType.__module__}\n{ModelType.__qualname__}\n".encode()
        + b"K"
        + bytes([member.value])
        + b"\x85R}X\x04\x00\x00\x00evilK\x01sb."
    )
    assert ModelType in allowed
    buffer = io.BytesIO()
    torch.save({"a": 1}, buffer)
    archive, other = zipfile.ZipFile(buffer), io.BytesIO()
    with zipfile.ZipFile(other, "w") as file:
        for entry in archive.namelist():
            file.writestr(entry, harm if entry.endswith("data.pkl") else archive.read(entry))
    put(saved / "common.pt", other.getvalue())
    with pytest.raises(CheckpointError, match=r"common\.pt is unsafe or damaged"):
        contents.require_safe(saved)
    assert dict(vars(member)) == before and set(torch.serialization.get_safe_globals()) == set(allowed)
    torch.load(io.BytesIO(other.getvalue()), weights_only=True)  # without our check, torch builds it
    assert vars(member).pop("evil") == 1


def test_another_run_s_history_of_fp8_scales_is_not_opened(caplog):
    from megatron_evomoe.checkpoint.store import without_history

    harm = torch.frombuffer(bytearray(pickle.dumps(Shell("false"))), dtype=torch.uint8)
    state = {
        "a.weight": torch.ones(2),
        "a._extra_state": harm,
        "b._extra_state": torch.empty(0, dtype=torch.uint8),
        "c._extra_state1": io.BytesIO(b"x"),
        "d._extra_state": None,
    }
    found = without_history(state, Path("there"))
    assert (
        found.keys() == state.keys()
        and found["a.weight"] is state["a.weight"]
        and found["d._extra_state"] is None
    )
    assert all(
        found[f"{name}"].numel() == 0 for name in ("a._extra_state", "b._extra_state", "c._extra_state1")
    )
    assert "there is of another run: the history of FP8 scales is not taken" in caplog.text


def test_common_state_that_never_ends_is_named(saved):
    laughs: list[Any] = [1]
    for _ in range(100):
        laughs = [laughs, laughs]
    endless: dict[str, Any] = {}
    endless["x"] = endless
    for value in ({"a": laughs}, endless):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        put(saved / "common.pt", buffer.getvalue())
        with pytest.raises(CheckpointError, match=r"common\.pt is unsafe or damaged .*too many places"):
            contents.require_safe(saved)
