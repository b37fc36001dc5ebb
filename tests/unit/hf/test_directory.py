"""Weights in Hugging Face directories are read, and damage is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import ConfigError
from megatron_evomoe.generate.loading import ModelError, check_directory
from megatron_evomoe.hf.from_hf.directory import HfDirectory

safetensors = pytest.importorskip("safetensors.torch")

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.randn(5).bfloat16(),
    "c": torch.tensor(2.0).half(),
    "d": torch.zeros(0, 3),
}


def directory(path: Path, files: dict[str, dict[str, torch.Tensor]], index: str | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    for name, tensors in files.items():
        if name.endswith(".safetensors"):
            safetensors.save_file(tensors, path / name, metadata={"format": "pt"})
        else:
            torch.save(tensors, path / name)
    if index:
        weight_map = {key: name for name, tensors in files.items() for key in tensors}
        (path / index).write_text(json.dumps({"weight_map": weight_map}))
    return path


def split(first: str, second: str) -> dict[str, dict[str, torch.Tensor]]:
    return {first: {k: TENSORS[k] for k in "ab"}, second: {k: TENSORS[k] for k in "cd"}}


@pytest.mark.parametrize(
    ("files", "index"),
    [
        ({"model.safetensors": TENSORS}, None),
        (split("model-1.safetensors", "model-2.safetensors"), "model.safetensors.index.json"),
        ({"pytorch_model.bin": TENSORS}, None),
        (split("pytorch_model-1.bin", "pytorch_model-2.bin"), "pytorch_model.bin.index.json"),
    ],
)
def test_every_tensor_is_read(tmp_path, files, index):
    found = HfDirectory(directory(tmp_path / "m", files, index))
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        place = found.tensors[name]
        assert place.shape == tuple(tensor.shape) and place.dtype == tensor.dtype
        assert torch.equal(found.read(name), tensor)


def test_what_is_read_may_be_written_to_without_a_trace(tmp_path):
    path = directory(tmp_path / "m", {"model.safetensors": TENSORS})
    HfDirectory(path).read("a").fill_(7.0)
    assert torch.equal(HfDirectory(path).read("a"), TENSORS["a"])


def rewrite_header(path: Path, change) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def header_as(text: bytes):
    """A damage function that replaces the header and keeps the tensors' bytes."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        rest = data[8 + int.from_bytes(data[:8], "little") :]
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)

    return damage


def entry(**change):
    """A damage function that changes values in the header's entry of `a`."""
    return lambda path: rewrite_header(path, lambda header: header["a"].update(change))


def twice(path: Path) -> None:
    """Add an earlier header entry of `a` as integers; a JSON reader would keep only the last."""
    text = path.read_bytes()[8:].split(b"}}")[0] + b"}}"
    header_as(b'{"a":{"dtype":"I32","shape":[3,4],"data_offsets":[0,48]},' + text[1:])(path)


DAMAGE = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-8]), "damaged.*not fully covered"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"12345678"), "damaged.*not fully covered"),
    "empty": (lambda p: p.write_bytes(b""), "damaged.*header too small"),
    "almost nothing": (lambda p: p.write_bytes(b"abc"), "damaged.*header too small"),
    "header bomb": (lambda p: p.write_bytes(b"\xff" * 200), "damaged.*header too large"),
    "header longer than the file": (
        lambda p: p.write_bytes((10**6).to_bytes(8, "little") + b"{}"),
        "damaged.*header",
    ),
    "no text": (lambda p: p.write_bytes((50).to_bytes(8, "little") + b"\xfe" * 100), "damaged.*header"),
    "a list": (header_as(b"[]"), "damaged.*header"),
    "deep": (header_as(b'{"a":' * 10**5), "damaged.*recursion"),
    "shape": (entry(shape=[3, 5]), "damaged"),
    "negative shape": (entry(shape=[-3, -4]), "damaged.*-3"),
    "null shape": (entry(shape=None), "damaged.*null"),
    "float shape": (entry(shape=[3.0, 4]), "damaged.*float"),
    "shape beyond counting": (entry(shape=[2**62, 2**62]), "damaged.*overflow"),
    "offsets": (entry(data_offsets=[10**6, 10**6 + 48]), "damaged.*offset"),
    "offsets backwards": (entry(data_offsets=[48, 0]), "damaged.*offset"),
    "text offsets": (entry(data_offsets=["0", "48"]), "damaged.*string"),
    "a list as dtype": (entry(dtype=["F32"]), "damaged.*sequence"),
    "unknown dtype": (entry(dtype="F33"), "damaged.*F33"),
    "overlap": (lambda p: rewrite_header(p, lambda h: h.update(e={**h["a"]})), "damaged.*offset"),
    "twice": (twice, "damaged.*'a' occurs twice"),
    "quantised": (entry(dtype="F8_E4M3", shape=[48]), "a has dtype F8_E4M3.*quantised"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_named(tmp_path, name):
    damage, message = DAMAGE[name]
    path = directory(tmp_path / "m", {"model.safetensors": TENSORS})
    damage(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        HfDirectory(path)


def test_a_file_is_opened_anew_after_so_many_bytes(tmp_path, monkeypatch):
    """A file is reopened after a number of bytes, so that pages already read leave memory.

    Every tensor is right, whichever opening it is read through.
    """
    from megatron_evomoe.hf.from_hf import safetensors_reader

    openings = []
    monkeypatch.setattr(safetensors_reader, "_BYTES_PER_OPENING", 100)
    monkeypatch.setattr(
        safetensors_reader,
        "safe_open",
        lambda *a, _f=safetensors_reader.safe_open, **k: openings.append(a) or _f(*a, **k),
    )
    tensors = {f"t{i}": torch.randn(10) for i in range(9)}
    found = HfDirectory(directory(tmp_path / "m", {"model.safetensors": tensors}))
    del openings[:]
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())
    assert len(openings) == 3


def test_the_largest_import_does_not_stay_in_memory(tmp_path):
    """Reading 300 MB leaves at most one opening's share and one tensor in memory."""
    tensors = {f"t{i}": torch.ones(3_000_000) for i in range(25)}
    path = directory(tmp_path / "m", {"model.safetensors": tensors})
    del tensors
    script = f"""
from megatron_evomoe.hf.from_hf.directory import HfDirectory
from megatron_evomoe.generate.loading import ModelError, check_directory
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
found, before = HfDirectory({str(path)!r}), resident()
for name in found.tensors: assert found.read(name).sum() == 3_000_000
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**26 + 2 * 12_000_000 + 20_000_000


class Bomb:
    def __reduce__(self):
        return os.system, ("echo boom > boom",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is unsafe or damaged.*safetensors"):
        HfDirectory(directory(tmp_path / "m", {"pytorch_model.bin": {"a": Bomb()}}))
    assert not (tmp_path / "boom").exists()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a directory"):
        HfDirectory(tmp_path / "nowhere")
    path = directory(
        tmp_path / "m", split("model-1.safetensors", "model-2.safetensors"), "model.safetensors.index.json"
    )
    (path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-2\.safetensors, which does not exist"):
        HfDirectory(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        HfDirectory(path)
    (path / "config.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        HfDirectory(path)
    (path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        HfDirectory(path)


INDICES = {
    "out of the directory": (
        {"a": "../other/model.safetensors"},
        "'../other/model.safetensors' as a weight file",
    ),
    "absolute": ({"a": "/etc/model.safetensors"}, "'/etc/model.safetensors' as a weight file"),
    "a pickle": ({"a": "pytorch_model.bin"}, "'pytorch_model.bin' as a weight file"),
    "itself": ({"a": "model.safetensors.index.json"}, "as a weight file"),
    "a directory": ({"a": "folder.safetensors"}, "folder.safetensors, which does not exist"),
    "a number": ({"a": 1}, "weight_map must name"),
    "a list": (["model-1.safetensors"], "weight_map must name"),
    "null": (None, "weight_map must name"),
    "nothing": ({}, "weight_map must name"),
    "a stranger": ({"x": "model-1.safetensors"}, "places x in model-1.safetensors, which has no such"),
    "another file": (
        {"a": "model-2.safetensors", "c": "model-1.safetensors"},
        "places a in model-2.safetensors, but it is in",
    ),
    "a name as long as none can be": ({"a": "x" * 5000 + ".safetensors"}, "which does not exist"),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_lies_is_named(tmp_path, name):
    weight_map, message = INDICES[name]
    directory(tmp_path / "other", {"model.safetensors": TENSORS})
    path = directory(
        tmp_path / "m", split("model-1.safetensors", "model-2.safetensors") | {"pytorch_model.bin": TENSORS}
    )
    (path / "folder.safetensors").mkdir()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=f"index.json.*{message}"):
        HfDirectory(path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 10**5,
        "[]",
        '{"weight_map": 3}',
        *(
            json.dumps({"weight_map": found})
            for found in (
                [],
                {"a": 1},
                {"a": []},
                {"a": "../other/model.safetensors"},
                {"a": "/etc/x.safetensors"},
                {"a": "pytorch_model.bin"},
            )
        ),
    ],
)
def test_a_directory_that_is_to_answer_has_its_files_beside_its_index(tmp_path, content):
    """`evaluate` and `generate` check the directory that they load in the same way."""
    path = directory(tmp_path / "m", {"pytorch_model.bin": TENSORS})
    directory(tmp_path / "other", {"model.safetensors": TENSORS})
    (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json (is not an index of weights|names)"):
        check_directory(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**5, "recursion"),
        ('{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}', "'a' occurs twice"),
        ("\udcff", "decode"),
        ("3", "but holds a int"),
    ],
)
def test_an_index_that_is_none_is_named(tmp_path, text, message):
    path = directory(tmp_path / "m", {"model-1.safetensors": TENSORS})
    (path / "model.safetensors.index.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=f"index.json.*{message}"):
        HfDirectory(path)


def test_a_total_that_is_wrong_is_said(tmp_path, caplog):
    """A wrong total only logs a warning: published indices have them, and nothing uses them."""
    path = directory(
        tmp_path / "m", split("model-1.safetensors", "model-2.safetensors"), "model.safetensors.index.json"
    )
    index = json.loads((path / "model.safetensors.index.json").read_text())
    (path / "model.safetensors.index.json").write_text(json.dumps({**index, "metadata": {"total_size": 7}}))
    assert HfDirectory(path).tensors.keys() == TENSORS.keys()
    assert "together have 7 bytes, but they have 60" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(3).to_sparse()}, "a is a torch.sparse"),
        ({3: torch.ones(3)}, "dictionary of tensors"),
        ([torch.ones(3)], "dictionary of tensors"),
        ({"a": torch.ones(3, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.empty(3, device="meta")}, "on meta"),
    ],
)
def test_pickles_of_something_else_are_named(tmp_path, content, message):
    path = directory(tmp_path / "m", {"pytorch_model.bin": content})
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin.*{message}"):
        HfDirectory(path)


def test_a_flipped_bit_in_an_archive_is_named(tmp_path):
    """A flipped bit in the pickle or in the numbers is named.

    In the pickle it would change the strides. torch itself notices neither.
    """
    path = directory(tmp_path / "m", {"pytorch_model.bin": TENSORS}) / "pytorch_model.bin"
    data = path.read_bytes()
    for where in (data.index(b"data.pkl") + 300, data.index(TENSORS["a"].numpy().tobytes()) + 5):
        path.write_bytes(data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])
        with pytest.raises(
            CheckpointError, match=r"pytorch_model\.bin is damaged: its contents do not fit its checksums"
        ):
            HfDirectory(path.parent)


def test_pickles_of_before_archives_are_read(tmp_path):
    path = directory(tmp_path / "m", {})
    torch.save(TENSORS, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = HfDirectory(path)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in TENSORS.items())


def test_one_tensor_in_two_files(tmp_path):
    files = {
        "model-1.safetensors": {"a": TENSORS["a"]},
        "model-2.safetensors": {"a": TENSORS["a"], "b": TENSORS["b"]},
    }
    path = directory(tmp_path / "m", files)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"a is in both model-1\.safetensors and model-2\.safetensors"):
        HfDirectory(path)
