"""Raw directories: what is read, and what damage is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import ConfigError
from megatron_evomoe.hf.directory import HfDirectory

safetensors = pytest.importorskip("safetensors.torch")

TENSORS = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.tensor(2.0).half(), "d": torch.zeros(0, 3)}


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


@pytest.mark.parametrize(("files", "index"), [
    ({"model.safetensors": TENSORS}, None),
    (split("model-1.safetensors", "model-2.safetensors"), "model.safetensors.index.json"),
    ({"pytorch_model.bin": TENSORS}, None),
    (split("pytorch_model-1.bin", "pytorch_model-2.bin"), "pytorch_model.bin.index.json"),
])
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


DAMAGE = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-8]), "damaged.*cannot be bytes"),
    "almost nothing": (lambda p: p.write_bytes(b"abc"), "damaged.*header claims"),
    "long header": (lambda p: p.write_bytes(b"\xff" * 200), "damaged.*header claims"),
    "no JSON": (lambda p: p.write_bytes((50).to_bytes(8, "little") + b"\xfe" * 100), "header cannot be read"),
    "a list": (lambda p: p.write_bytes((2).to_bytes(8, "little") + b"[]"), "header cannot be read"),
    "shape": (lambda p: rewrite_header(p, lambda h: h["a"].update(shape=[3, 5])), r"a, F32 of shape \(3, 5\)"),
    "offsets": (lambda p: rewrite_header(p, lambda h: h["a"].update(data_offsets=[10**6, 10**6 + 48])), "a, F32"),
    "dtype": (lambda p: rewrite_header(p, lambda h: h["a"].update(dtype="F8_E4M3")), "a has dtype F8_E4M3.*quantised"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_named(tmp_path, name):
    damage, message = DAMAGE[name]
    path = directory(tmp_path / "m", {"model.safetensors": TENSORS})
    damage(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        HfDirectory(path)


class Bomb:
    def __reduce__(self):
        return os.system, ("echo boom > boom",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is unsafe or damaged.*safetensors"):
        HfDirectory(directory(tmp_path / "m", {"pytorch_model.bin": {"a": Bomb()}}))
    assert not (tmp_path / "boom").exists()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no directory"):
        HfDirectory(tmp_path / "nowhere")
    path = directory(tmp_path / "m", split("model-1.safetensors", "model-2.safetensors"), "model.safetensors.index.json")
    (path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-2\.safetensors, which is not there"):
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


def test_an_index_cannot_lead_out_of_the_directory(tmp_path):
    directory(tmp_path / "other", {"model.safetensors": TENSORS})
    path = directory(tmp_path / "m", {})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))
    with pytest.raises(CheckpointError, match="not there"):
        HfDirectory(path)


def test_one_tensor_in_two_files(tmp_path):
    files = {"model-1.safetensors": {"a": TENSORS["a"]}, "model-2.safetensors": {"a": TENSORS["a"], "b": TENSORS["b"]}}
    path = directory(tmp_path / "m", files)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors",
                                                                                  "b": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"a is in both model-1\.safetensors and model-2\.safetensors"):
        HfDirectory(path)
