"""Sharded safetensors files are written as a stream; the safetensors library reads them."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_evomoe.config import ConfigError
from megatron_evomoe.hf.to_hf.safetensors_writer import INDEX, ShardedWriter, parse_size

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed (extra [hf])")


def write(folder, tensors, dtype, max_bytes):
    writer = ShardedWriter(folder, {k: tuple(v.shape) for k, v in tensors.items()}, dtype, max_bytes)
    for name, tensor in tensors.items():
        writer.put(name, tensor)
    writer.finish()
    return writer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_bytes", [10**9, 300])
def test_safetensors_reads_what_was_written(tmp_path, dtype, max_bytes):
    g = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}": torch.randn(4 + i, 6, generator=g)[:, ::2] for i in range(9)}
    tensors["norm"] = torch.randn(5, generator=g)
    writer = write(tmp_path, tensors, dtype, max_bytes)
    found = {k: v for name in writer.file_names for k, v in safetensors.load_file(tmp_path / name).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v.to(dtype)) for k, v in tensors.items())
    assert writer.total_size == sum(v.numel() * dtype.itemsize for v in tensors.values())
    if max_bytes == 10**9:
        assert writer.file_names == ["model.safetensors"] and not (tmp_path / INDEX).exists()
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == writer.total_size
        for name in writer.file_names:
            held = safetensors.load_file(tmp_path / name)
            assert {k for k, file in index["weight_map"].items() if file == name} == held.keys()
            assert sum(t.numel() * t.element_size() for t in held.values()) <= max_bytes


def test_one_tensor_may_be_larger_than_a_file(tmp_path):
    writer = write(
        tmp_path, {"a": torch.ones(2), "b": torch.ones(1000), "c": torch.ones(2)}, torch.float32, 64
    )
    assert len(writer.file_names) == 3


def test_order_and_number_are_checked(tmp_path):
    writer = ShardedWriter(tmp_path, {"a": (2,), "b": (2,)}, torch.float32, 10**6)
    with pytest.raises(AssertionError, match="b comes where a should"):
        writer.put("b", torch.ones(2))
    with pytest.raises(AssertionError, match="2 tensors never came"):
        writer.finish()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 1572864), ("123", 123), ("20kb", 20000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0"])
def test_no_sizes(text):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)
