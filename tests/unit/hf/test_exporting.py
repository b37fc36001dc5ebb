"""What an export writes, refuses and leaves behind; an import restores the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_evomoe.checkpoint.record import CheckpointError, read
from megatron_evomoe.checkpoint.stream import CheckpointReader, CheckpointWriter
from megatron_evomoe.config import ConfigError, LanguageConfig
from megatron_evomoe.data.tokenizer import train_sentencepiece
from megatron_evomoe.hf import verification
from megatron_evomoe.hf.from_hf.importing import Request as ImportRequest
from megatron_evomoe.hf.from_hf.importing import import_model
from megatron_evomoe.hf.to_hf import hub, verify_export
from megatron_evomoe.hf.to_hf.config_files import stock_text_config
from megatron_evomoe.hf.to_hf.exporting import Request, export_model
from megatron_evomoe.hf.to_hf.origin import find_checkpoint
from tests import programs
from tests.parity.export_models import CUSTOM, saved_model

pytest.importorskip(
    "transformers", minversion="4.56", reason="transformers 4.56 or later is not installed (extra [hf])"
)
pytestmark = pytest.mark.usefixtures("one_rank")
ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "convert_to_hf.py"
LINES = [
    "USER: <image>\nWhich digit is this? ASSISTANT: It is seven.",
    "A chat between a curious user and an assistant.",
] * 20


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return train_sentencepiece(LINES, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer_path):
    """A function that gives the saved model of a kind, which is made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = saved_model(tmp_path_factory.mktemp(kind), tokenizer_path, kind)
        return made[kind]

    return get


def request(saved, out, **values):
    return Request(checkpoint=str(saved.folder), output=str(out), **values)


def run_tool(*argv):
    nowhere = programs.environment(HF_ENDPOINT="http://127.0.0.1:9")
    return programs.run(str(TOOL), *map(str, argv), env=nowhere, expect=None)


def test_everything_a_directory_needs_is_there(saved, tmp_path):
    exported = export_model(request(saved("route"), tmp_path / "out"))
    names = {p.name for p in exported.output.iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "configuration_evomoe.py",
        "generation_config.json",
        "image_processing_evomoe.py",
        "model.safetensors",
        "modeling_evomoe.py",
        "picture_evomoe.py",
        "preprocessor_config.json",
        "processor_config.json",
        "routing_evomoe.py",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vision_evomoe.py",
    }
    card = (exported.output / "README.md").read_text()
    assert (
        "| align | align | 3 |\n| route | route | 7 |" in card
        and "trust_remote_code=True" in card
        and "gone/" not in card
    )
    assert "evomoe_config" in json.loads((exported.output / "config.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_plain_export_has_no_code_and_never_writes_the_image_token(saved, tmp_path):
    exported = export_model(request(saved("warmup"), tmp_path / "out"))
    config = json.loads((exported.output / "config.json").read_text())
    generation = json.loads((exported.output / "generation_config.json").read_text())
    assert not list(exported.output.glob("*.py")) and "auto_map" not in config
    true = exported.config.language.vocab_size
    assert config["image_token_index"] == true and config["text_config"]["vocab_size"] == true + 1
    assert generation["suppress_tokens"] == [true] and generation["eos_token_id"] == [2]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("align", {}),
        ("warmup", {"format": "evomoe"}),
        ("evolve", {}),
        ("evolve", {"dense": True}),
        ("route", {}),
    ],
)
def test_there_and_back_are_the_same_bits(saved, kind, values, tmp_path):
    there = export_model(request(saved(kind), tmp_path / "out", **values))
    back = import_model(ImportRequest(model=str(there.output), output=str(tmp_path / "back")))
    before, after = CheckpointReader(find_checkpoint(saved(kind).folder)), CheckpointReader(back.checkpoint)
    weights = {k for k in before.shapes if "_extra_state" not in k and ".evolution." not in k}
    if values.get("dense"):
        weights = {k for k in weights if ".mlp.experts." not in k}
    assert set(after.shapes) == weights
    rows = there.config.language.vocab_size  # rows from here on are padding
    ends = {k: rows for k in weights if "word_embeddings" in k or "output_layer" in k}
    assert all(torch.equal(before.read(k)[: ends.get(k)], after.read(k)[: ends.get(k)]) for k in weights)
    again = export_model(
        Request(checkpoint=str(back.output), output=str(tmp_path / "again"), format=there.format)
    )  # type: ignore[arg-type]
    assert (again.output / "model.safetensors").read_bytes() == (
        there.output / "model.safetensors"
    ).read_bytes()


def test_a_target_that_is_not_empty_is_left_alone(saved, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="is not empty"):
        export_model(request(saved("warmup"), tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    export_model(request(saved("warmup"), tmp_path / "out"))  # an empty target is accepted


def test_a_failure_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    def fail(self, key, index=None):
        raise CheckpointError("the disk went away")

    monkeypatch.setattr(CheckpointReader, "read", fail)
    with pytest.raises(CheckpointError, match="went away"):
        export_model(request(saved("route"), tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("route", {"dense": True}, "which uses all experts"),
        ("route", {"format": "llava"}, "has no experts"),
        ("evolve", {"format": "llava"}, "or --dense for its first expert"),
        ("warmup", {"dtype": "float8"}, "dtype 'float8' is unknown"),
        ("warmup", {"tokenizer": "/nowhere.model"}, "give its path with --tokenizer"),
    ],
)
def test_contradictions_are_refused(saved, kind, values, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export_model(request(saved(kind), tmp_path / "out", **values))
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_refused(saved, tmp_path):
    other = train_sentencepiece(["something else entirely"] * 20, tmp_path / "other.model", 280)
    with pytest.raises(ConfigError, match="is not the tokenizer"):
        export_model(request(saved("warmup"), tmp_path / "out", tokenizer=str(other)))


def test_a_run_without_saying_which_stage_is_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match="it holds the stages warmup"):
        export_model(Request(checkpoint=str(saved("warmup").folder.parent), output=str(tmp_path / "out")))
    with pytest.raises(CheckpointError, match="is not a directory"):
        export_model(Request(checkpoint=str(tmp_path / "none"), output=str(tmp_path / "out")))


def rewritten(saved, folder, change):
    """Copy the checkpoint; `change` edits the dictionary of its tensors in place."""
    reader = CheckpointReader(find_checkpoint(saved.folder))
    tensors = {k: reader.read(k) for k in reader.shapes}
    change(tensors)
    config = (reader.directory / "run_config.yaml").read_text()
    with CheckpointWriter(folder, read(reader.directory), config) as writer:
        for key, tensor in tensors.items():
            writer.put(key, tensor)
    return writer.path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"language_model.decoder.layers.1.mlp.shared.weight": torch.ones(2)}),
            "mlp.shared.weight is there",
        ),
        (lambda t: t.pop("vision_model.conv1.weight"), "vision_model.conv1.weight is missing"),
        (
            lambda t: t.update({"vision_projection.encoder.linear_fc1.bias": torch.ones(3)}),
            r"linear_fc1.bias has shape \(3,\)",
        ),
    ],
)
def test_leftover_missing_and_misshapen_tensors_are_fatal(saved, change, message, tmp_path):
    path = rewritten(saved("route"), tmp_path / "changed", change)
    with pytest.raises(CheckpointError, match=message):
        export_model(Request(checkpoint=str(path), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_flipped_bytes_are_found(saved, tmp_path):
    path = rewritten(saved("warmup"), tmp_path / "copy", lambda tensors: None)
    data = path / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        export_model(Request(checkpoint=str(path), output=str(tmp_path / "out")))


def test_what_no_stock_class_computes_is_custom_code(tokenizer_path, tmp_path):
    phi = saved_model(tmp_path / "run", tokenizer_path, "warmup", language=CUSTOM["phi"])
    assert export_model(request(phi, tmp_path / "out")).format == "evomoe"
    with pytest.raises(ConfigError, match="use --format evomoe"):
        export_model(request(phi, tmp_path / "plain", format="llava"))


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "llama"),
        ({"add_bias_linear": True}, "llama"),
        ({"window_size": 8}, "mistral"),
        ({"add_qkv_bias": True}, "qwen2"),
        ({"qk_layernorm": True, "kv_channels": 48}, "qwen3"),
        ({"normalization": "LayerNorm", "rotary_percent": 0.25}, "stablelm"),
        ({"activation": "gelu"}, None),
        ({"gated_linear_unit": False}, None),
        ({"rotary_percent": 0.5}, None),
        ({"lm_head_bias": True, "tie_word_embeddings": False}, None),
        ({"normalization": "LayerNorm", "qk_layernorm": True}, None),
        ({"qk_layernorm": True, "window_size": 4}, None),
        ({"add_qkv_bias": True, "kv_channels": 48}, None),
    ],
)
def test_stock_classes(fields, kind):
    language = LanguageConfig(vocab_size=64, **fields)
    if kind is None:
        with pytest.raises(ConfigError, match="no language model of transformers' LLaVA"):
            stock_text_config(language)
    else:
        assert stock_text_config(language)["model_type"] == kind


def test_verify_tells_a_good_export_from_a_bad_one(saved, tmp_path):
    exported = export_model(request(saved("route"), tmp_path / "out"))
    rows = verify_export.compare(exported)
    assert all(row.good for row in rows) and len(rows) == 3 * 5 + 2
    assert "experts in mixture 2" in verification.table(rows)
    file = exported.output / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-50_000:] = bytes(50_000)
    file.write_bytes(content)
    assert "FAILED" in verification.table(verify_export.compare(exported))


def test_the_command(saved, tmp_path):
    done = run_tool(
        saved("evolve").folder,
        "--output",
        tmp_path / "out",
        "--dense",
        "--dtype",
        "bfloat16",
        "--verify",
        "--max-shard-size",
        "100KB",
    )
    assert done.returncode == 0, done.stderr
    assert "no custom code" in done.stdout and "FAILED" not in done.stdout and "logits" in done.stdout
    done = run_tool(saved("evolve").folder, "--output", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "not empty" in done.stderr


def test_the_hub_out_of_reach(saved, tmp_path, monkeypatch):
    exported = export_model(request(saved("warmup"), tmp_path / "out"))
    api = pytest.importorskip("huggingface_hub").HfApi

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(api, "create_repo", refuse)
    with pytest.raises(ConfigError, match=r"no route to host.*hf auth login"):
        hub.push(exported.output, "me/model")
    uploaded = {}
    monkeypatch.setattr(api, "create_repo", lambda self, repo, **kwargs: uploaded.update(repo=repo, **kwargs))
    monkeypatch.setattr(api, "upload_folder", lambda self, **kwargs: uploaded.update(kwargs))
    assert hub.push(exported.output, "me/model", private=True) == "https://huggingface.co/me/model"
    assert (
        uploaded["private"]
        and uploaded["folder_path"] == str(exported.output)
        and uploaded["repo_id"] == "me/model"
    )


def test_conversion_loads_neither_transformers_nor_megatron_core(saved, tmp_path):
    code = (
        f"import sys; from megatron_evomoe.hf.to_hf.exporting import *; "
        f"export_model(Request(checkpoint={str(saved('route').folder)!r}, "
        f"output={str(tmp_path / 'out')!r})); "
        "bad = {'transformers', 'megatron.core', 'transformer_engine'} & set(sys.modules); assert not bad, "
        "bad; "
        "import torch; assert not torch.distributed.is_initialized()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_memory_is_that_of_the_largest_tensor(tmp_path, tokenizer_path):
    """An export needs memory for its largest tensor, not for the whole model.

    The model has ten layers of 50 MB each and an embedding of 4 MB; the process's peak stays far below half a
    gigabyte.
    """
    size = {"num_layers": 10, "hidden_size": 1024, "ffn_hidden_size": 2730, "num_attention_heads": 8}
    big = saved_model(tmp_path / "run", tokenizer_path, "warmup", language=size, moe={"moe_layer_freq": 2})
    code = (
        f"import resource, sys; from megatron_evomoe.hf.to_hf.exporting import *; "
        f"before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"out = export_model(Request(checkpoint={str(big.folder)!r}, output={str(tmp_path / 'out')!r})); "
        "print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, out.size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    before, after, total = map(int, done.stdout.split())
    largest = 2 * 1024 * 2730 * 4
    assert total > 400e6 and (after - before) * 1024 < 3 * largest + 50e6
