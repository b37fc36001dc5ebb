"""Reading and writing checkpoints without a process group.

What megatron-core wrote can be read, and megatron-core reads what is written.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_evomoe.checkpoint import contents, integrity
from megatron_evomoe.checkpoint.record import CheckpointError, Record, read
from megatron_evomoe.checkpoint.stream import CheckpointReader, CheckpointWriter
from tests.tiny import VOCAB, tiny_config

ROOT = Path(__file__).resolve().parents[3]


def record(**values) -> Record:
    defaults = {
        "stage": "imported",
        "kind": "pretrained",
        "step": 0,
        "position": 0,
        "finished": True,
        "layout": {"world": 1},
        "vocab_size": VOCAB,
        "tokenizer_fingerprint": "",
    }
    return Record(**{**defaults, **values})


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    with CheckpointWriter(folder, record(), "{}\n") as writer:
        for key, tensor in tensors.items():
            writer.put(key, tensor)
    return writer.path


TENSORS = {
    "a": torch.arange(24.0).reshape(2, 3, 4),
    "half": torch.randn(5, 7).bfloat16(),
    "one": torch.tensor(3.0),
    "view": torch.arange(100.0)[10:30].reshape(4, 5),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "empty": torch.zeros(0, 3),
}


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path, TENSORS)
    reader = CheckpointReader(path)
    for key, tensor in TENSORS.items():
        found = reader.read(key)
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype == reader.dtypes[key]
        assert reader.shapes[key] == tuple(tensor.shape)
    assert path.name == "iter_0000000" and (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "0"
    assert (path / "__0_0.distcp").stat().st_size < 20_000, "a view must not bring its whole storage along"


def test_checksums_are_those_of_the_files(tmp_path):
    path = write(tmp_path, TENSORS)
    files = read(path).files
    assert set(files) | {"evomoe.json"} == {p.name for p in path.iterdir()}
    assert integrity.mismatch(path, files) is None
    contents.require_safe(path)


@pytest.mark.parametrize("index", [None, 0, 2])
def test_chunks_are_put_together(tmp_path, index):
    """Chunks of one tensor are joined along any axis.

    Covered are experts in chunks of one with gate and value apart, as megatron-core writes them, and a matrix
    that is cut by columns.
    """
    experts, matrix = torch.randn(3, 4, 5), torch.randn(4, 6)
    with CheckpointWriter(tmp_path, record(), "{}\n") as writer:
        for e in range(3):
            for row in (0, 2):
                writer.put("experts", experts[e : e + 1, row : row + 2], shape=(3, 4, 5), offset=(e, row))
        for column in (0, 3):
            writer.put("matrix", matrix[:, column : column + 3], shape=(4, 6), offset=(0, column))
    reader = CheckpointReader(writer.path)
    assert torch.equal(reader.read("experts", index), experts if index is None else experts[index])
    assert torch.equal(reader.read("matrix"), matrix)
    assert torch.equal(reader.read("matrix", 1), matrix[1])


@pytest.fixture(scope="module")
def core_model(one_rank):
    from megatron_evomoe.parallel import topology
    from megatron_evomoe.train.built import build_stage

    config = tiny_config("route")
    topology.seed_everything(3)
    return build_stage(config.for_stage("route"), config.stages[0])


def plain(model) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if torch.is_tensor(v) and "_extra_state" not in k}


def test_reads_what_the_core_wrote(tmp_path, core_model):
    """The model's tensors are found under the sharded keys."""
    from megatron_evomoe.checkpoint.store import Saver
    from megatron_evomoe.config import CheckpointConfig

    model = core_model.modules[0]
    parts = {name: getattr(model, name) for name in ("vision_model", "vision_projection", "language_model")}
    path = Saver(CheckpointConfig()).save_weights(tmp_path, parts, record(kind="route"), "{}\n")
    reader, state = CheckpointReader(path), plain(model)
    layer = "language_model.decoder.layers.1.mlp."
    assert torch.equal(reader.read(f"{layer}router.phi"), state[f"{layer}router.phi"])
    for e in range(4):
        assert torch.equal(
            reader.read(f"{layer}experts.experts.linear_fc1.weight", e),
            state[f"{layer}experts.local_experts.{e}.linear_fc1.weight"],
        )


def test_the_core_reads_what_is_written(tmp_path, core_model):
    """`load_weights` reads every tensor in megatron-core's own chunks, with the same bits."""
    import re

    from megatron_evomoe.checkpoint import store

    model = core_model.modules[0]
    before = {k: v.clone() for k, v in plain(model).items()}
    sharded = model.sharded_state_dict(metadata=store.metadata())
    with CheckpointWriter(tmp_path, record(kind="route"), "{}\n") as writer:
        for entry in sharded.values():
            for part in entry.build() if hasattr(entry, "build_fn") else [entry]:
                if hasattr(part, "global_shape") and torch.is_tensor(part.data):
                    data = part.data.reshape((1,) * part.prepend_axis_num + tuple(part.data.shape))
                    writer.put(part.key, data, shape=part.global_shape, offset=part.global_offset)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    (loaded,), fresh = store.load_weights(
        writer.path, [model.sharded_state_dict(metadata=store.metadata())], may_be_fresh=re.compile("$^")
    )
    model.load_state_dict({k: v for k, v in loaded.items() if torch.is_tensor(v)}, strict=False)
    assert not fresh
    assert all(torch.equal(plain(model)[k], before[k]) for k in before)


def test_an_error_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        CheckpointWriter(tmp_path, record(), "{}\n") as writer,
    ):
        writer.put("a", TENSORS["a"])
        raise RuntimeError("on purpose")
    assert list(tmp_path.iterdir()) == []
    assert torch.serialization.get_crc32_options()


def test_chunks_must_cover_the_tensor(tmp_path):
    with (
        pytest.raises(AssertionError, match="do not cover"),
        CheckpointWriter(tmp_path, record(), "{}\n") as writer,
    ):
        writer.put("a", TENSORS["a"][:1], shape=(2, 3, 4), offset=(0,))
    assert list(tmp_path.iterdir()) == []


def test_unknown_key(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        CheckpointReader(write(tmp_path, TENSORS)).read("b")


class Bomb:
    def __reduce__(self):
        return os.system, ("echo boom > boom",)


def test_code_in_the_tensors_is_not_run(tmp_path, monkeypatch):
    """A tensor's bytes are replaced by a pickle that runs a command."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "saved", {"a": torch.zeros(500)})
    reader = CheckpointReader(path)
    data = bytearray((path / "__0_0.distcp").read_bytes())
    bomb = pickle.dumps(Bomb(), protocol=2)
    data[: len(bomb)] = bomb
    (path / "__0_0.distcp").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'a' in __0_0\.distcp is unsafe or damaged"):
        reader.read("a")
    assert not (tmp_path / "boom").exists()


def test_a_cut_file_is_no_checkpoint(tmp_path):
    path = write(tmp_path, TENSORS)
    with (path / "__0_0.distcp").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has 100 bytes"):
        CheckpointReader(path)


def test_megatron_core_is_not_imported():
    """Transformer Engine is not imported either, and no process group is needed."""
    code = (
        "import sys, json\nimport megatron_evomoe.checkpoint.stream, megatron_evomoe.hf.from_hf.importing, "
        "torch.distributed as d\n"
        "print(json.dumps([[m for m in sys.modules if m.startswith(('megatron.', 'transformer_engine', "
        "'transformers'))], "
        "d.is_initialized()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == [[], False]
