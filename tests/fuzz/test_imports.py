"""Models to import, with headers, indices, pickles and config.json changed at random.

They go through the functions that `tools/convert_from_hf.py` calls. A try is right if the written tensors
equal, bit for bit, those of the unchanged model, or those that transformers reads from the changed one (a few
fields of its configuration do not affect the tensors). A try is named if it ends in one of the converter's
own errors and leaves no files behind.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.checkpoint.stream import CheckpointReader
from megatron_evomoe.config import ConfigError
from megatron_evomoe.hf.from_hf.config_sections import language_section
from megatron_evomoe.hf.from_hf.importing import Request, import_model
from tests.unit.hf.sources import TEXT, tensors, write

INDEX = "model.safetensors.index.json"
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3.5,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    -(2**70),
    10**400,
    "",
    "4",
    "linear",
    "\ud800",
    "../../etc/passwd",
    "\0",
    [],
    [[]],
    [1],
    {},
    {"a": 1},
    {"type": "yarn"},
    ["x"] * 50,
    "x" * 5000,
]
KEYS = [
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "quantization_config",
    "layer_types",
    "use_sliding_window",
    "sliding_window",
    "head_dim",
    "auto_map",
    "text_config",
    "vision_config",
    "model_type",
    "attention_bias",
    "mlp_bias",
    "num_local_experts",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "tie_word_embeddings",
    "partial_rotary_factor",
    "evomoe_config",
    "projector_hidden_act",
    "image_grid_pinpoints",
    "no_rope_layers",
    "final_logit_softcapping",
    "num_key_value_heads",
]
KINDS = ["llama", "mistral", "qwen2", "qwen3", "stablelm", "phi"]
ROPES = [
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 4},
    {"rope_type": "default"},
    {
        "rope_type": "llama3",
        "factor": 8,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_theta": 500000.0},
    16,
    500000,
    0.5,
]


def deep(levels: int) -> Any:
    found: Any = 0
    for _ in range(levels):
        found = {"a": found}
    return found


def paths_in(value: Any, before: tuple = ()) -> list[tuple]:
    """Paths to every place in a JSON value, including the value itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [before, *(place for key, v in inner for place in paths_in(v, (*before, key)))]


def changed(value: Any, rng: random.Random) -> Any:
    """A copy in which one place is replaced, is removed, or gets another key beside it."""
    value = json.loads(json.dumps(value))
    place = rng.choice(paths_in(value))
    new = rng.choice([*ODD, deep(30)])
    if not place:
        return new if rng.random() < 0.2 else {**value, rng.choice([*KEYS, "x"]): new}
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    kind = rng.random()
    if kind < 0.7:
        holder[place[-1]] = new
    elif kind < 0.85 and isinstance(holder, dict):
        del holder[place[-1]]
    elif isinstance(holder, dict):
        holder[rng.choice(KEYS)] = new
    return value


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("fuzz") / "hf")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    content = {k: v for k, v in tensors().items() if k.startswith("language_model.")}
    return write(tmp_path_factory.mktemp("fuzz") / "lm", TEXT, content)


def written(folder: Path, output: Path, what: str = "model") -> dict[str, torch.Tensor]:
    imported = import_model(Request(output=str(output), **{what: str(folder)}))
    reader = CheckpointReader(imported.checkpoint)
    return {key: reader.read(key) for key in reader.shapes}


def outcome(folder: Path, place: Path, reference: dict[str, torch.Tensor], what: str = "model") -> str:
    """Import a changed source and return the outcome: right, or named if no files are left behind."""
    try:
        found = written(folder, place / "out", what)
    except (ConfigError, CheckpointError) as error:
        assert str(error).strip() and len(str(error)) < 20_000
        assert not [p for p in place.iterdir() if "out" in p.name], "something was left behind"
        return "named"
    shutil.rmtree(place / "out")
    assert found.keys() == reference.keys()
    for key, tensor in found.items():
        assert tensor.dtype == reference[key].dtype and torch.equal(tensor, reference[key]), (
            f"{key} is not what it was"
        )
    return "right"


def mutants(
    tally: Any,
    source: Path,
    folder: Path,
    quick: int,
    spoil: Callable[[Path, random.Random], None],
    what: str = "model",
) -> None:
    """Import randomly changed copies of a source and tally their outcomes."""
    reference = written(source, folder / "reference", what)
    for rng in tally.draws(quick):
        copy = folder / "hf"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        spoil(copy, rng)
        tally.add(outcome(copy, folder, reference, what))


def test_config_of_an_import(tally, source, tmp_path):
    def spoil(folder: Path, rng: random.Random) -> None:
        config = json.loads((folder / "config.json").read_text())
        for _ in range(rng.choice((1, 1, 2))):
            config = changed(config, rng) if isinstance(config, dict) else config
        (folder / "config.json").write_text(json.dumps(config))

    mutants(tally, source, tmp_path, 60, spoil)


def test_config_of_a_decoder(tally, decoder, tmp_path):
    def spoil(folder: Path, rng: random.Random) -> None:
        config = json.loads((folder / "config.json").read_text())
        if rng.random() < 0.3:
            config["model_type"] = rng.choice([*KINDS, "gpt_neox", "unheard_of"])
        (folder / "config.json").write_text(json.dumps(changed(config, rng)))

    mutants(tally, decoder, tmp_path, 60, spoil, "language_model")


def test_reading_of_a_configuration(tally):
    """A configuration is read as transformers' own class reads it, wherever transformers accepts it too."""
    transformers = pytest.importorskip("transformers")
    for rng in tally.draws(250):
        config: Any = {**TEXT, "model_type": rng.choice(KINDS), "layer_norm_eps": 1e-5}
        for _ in range(rng.choice((1, 2))):
            config = {**config, rng.choice([*KEYS[:9], *KEYS[12:16], *TEXT]): rng.choice([*ODD, *ROPES])}
        try:
            ours = language_section(config)
        except ConfigError:
            tally.add("named")
            continue
        try:
            theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(config))).to_dict()
        except Exception:  # transformers may raise any class; its refusal says nothing about our reading
            theirs = config
        assert language_section(theirs) == ours, config
        tally.add("right")


def spoil_bytes(file: Path, rng: random.Random) -> None:
    """Flip, cut, duplicate or insert bytes of a text file, or of the header of a safetensors file."""
    data = bytearray(file.read_bytes())
    end = (
        min(len(data), 8 + int.from_bytes(data[:8], "little")) if file.suffix == ".safetensors" else len(data)
    )
    for _ in range(rng.choice((1, 1, 3))):
        i = rng.randrange(end)
        kind = rng.random()
        if kind < 0.6:
            data[i] ^= 1 << rng.randrange(8)
        elif kind < 0.8:
            data[i : i + rng.randrange(1, 20)] = b""
        else:
            data[i:i] = bytes(data[i : i + rng.randrange(1, 40)])
        end = min(end, len(data))
    file.write_bytes(bytes(data))


def test_header_of_an_import(tally, source, tmp_path):
    """Damage the bytes of the header's text, or change values of its JSON."""

    def spoil(folder: Path, rng: random.Random) -> None:
        file = folder / "model.safetensors"
        if rng.random() < 0.4:
            spoil_bytes(file, rng)
            return
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(changed(json.loads(data[8 : 8 + length]), rng)).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])

    mutants(tally, source, tmp_path, 60, spoil)


def in_shards(source: Path, folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    content = load_file(folder / "model.safetensors")
    names = sorted(content)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in files.items():
        save_file({name: content[name] for name in inside}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {
        "metadata": {"total_size": 3},
        "weight_map": {name: file for file, inside in files.items() for name in inside},
    }
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_index_of_an_import(tally, source, tmp_path):
    """Change an index's names, files, types or text, or replace or remove one of its files."""

    def spoil(folder: Path, rng: random.Random) -> None:
        index, kind = folder / INDEX, rng.random()
        if kind < 0.5:
            index.write_text(json.dumps(changed(json.loads(index.read_text()), rng)))
        elif kind < 0.7:
            spoil_bytes(index, rng)
        else:
            file = folder / rng.choice(("model-1.safetensors", "model-2.safetensors"))
            data = file.read_bytes()
            file.unlink()
            rng.choice(
                (
                    lambda: None,
                    file.mkdir,
                    lambda: file.write_bytes(data[: rng.randrange(len(data))]),
                    lambda: file.symlink_to("/dev/zero"),
                    lambda: shutil.copyfile(next(folder.glob("model-*")), file),
                )
            )()

    mutants(tally, in_shards(source, tmp_path / "shards"), tmp_path, 50, spoil)


def test_pickle_of_an_import(tally, source, tmp_path):
    """Change bytes of pytorch_model.bin.

    Its archive format has checksums of its own, and a pickle may name any function.
    """
    from safetensors.torch import load_file

    shutil.copytree(source, tmp_path / "bin")
    content = load_file(source / "model.safetensors")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(content, tmp_path / "bin" / "pytorch_model.bin")
    pickled = (tmp_path / "bin" / "pytorch_model.bin").read_bytes().index(b"data.pkl")

    def spoil(folder: Path, rng: random.Random) -> None:
        file = folder / "pytorch_model.bin"
        data = bytearray(file.read_bytes())
        i = pickled + rng.randrange(6000)
        if rng.random() < 0.5:
            data[i] ^= 1 << rng.randrange(8)
        else:
            data = data[: rng.randrange(len(data))]
        file.write_bytes(bytes(data))

    mutants(tally, tmp_path / "bin", tmp_path, 30, spoil)
