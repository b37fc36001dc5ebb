"""Configurations, flags and checkpoints of an earlier version are still read and mean the same.

tests/golden/README.md says how the files were made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_evomoe.checkpoint import renamed as renamed_tensors
from megatron_evomoe.checkpoint.stream import CheckpointReader
from megatron_evomoe.config import (
    ConfigError,
    RunConfig,
    add_flags,
    deprecated,
    flags_from,
    from_mapping,
    load_config,
)
from megatron_evomoe.config import renamed as renamed_fields
from megatron_evomoe.config.run import FLAT, flat_name
from tests.programs import ROOT
from tests.runs import metrics, run

GOLDEN = ROOT / "tests" / "golden"
VERSION = "0.1.0"
EXPECTED = json.loads((GOLDEN / f"{VERSION}.json").read_text())
# On the machine that made the files, the metrics are equal to the last bit. The bound is that of
# tests/distributed/test_layouts.py.
METRICS = 1e-5


@pytest.fixture
def unpacked(tmp_path, monkeypatch) -> Path:
    """The version's files, unpacked, and the environment variables that its configurations use."""
    with tarfile.open(GOLDEN / f"{VERSION}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "golden").symlink_to(GOLDEN)
    for name, value in {
        "GOLDEN": str(tmp_path),
        "DATA": "/data",
        "TOKENIZER": "/data/tokenizer.model",
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def present_value(config: RunConfig, section: str, field: str) -> Any:
    """The value of a field of that version, under its present name."""
    # the field now defaults to none, which stands for ranges that depend on the number of experts
    if field == "evolution_beta":
        return [list(limits) for limits in config.moe.evolution_ranges]
    name = flat_name(section, field)
    present_section, present_field = FLAT[renamed_fields.RENAMED.get(name, name)]
    return config.to_dict()[present_section][present_field]


@pytest.mark.parametrize("path", EXPECTED["configurations"])
def test_a_configuration_means_what_it_meant(path, unpacked):
    config = load_config(unpacked / path)
    recorded = json.loads(json.dumps(EXPECTED["configurations"][path]).replace("${GOLDEN}", str(unpacked)))
    for section, values in recorded.items():
        if isinstance(values, dict):
            found = {field: present_value(config, section, field) for field in values}
            expected = {field: deprecated.current(section, field, value) for field, value in values.items()}
            assert found == expected, section
        else:
            assert config.to_dict()[section] == values, section


def test_every_flag_is_still_taken():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    for name in EXPECTED["flags"]:
        parser.parse_args([f"--{name.replace('_', '-')}", "1"])


@pytest.mark.parametrize("path", EXPECTED["tensors"])
def test_a_checkpoint_holds_the_same_tensors(path, unpacked):
    reader = CheckpointReader(path.replace("${GOLDEN}", str(unpacked)))
    found = {}
    for key in reader.shapes:
        if not key.startswith("rng."):
            content = reader.read(key).contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found[key] = hashlib.sha256(content).hexdigest()
    assert found == {
        renamed_tensors.present_name(key): digest for key, digest in EXPECTED["tensors"][path].items()
    }


def test_its_stages_go_on_and_begin(unpacked):
    """`warmup` resumes after its second step and `route` begins from `evolve`, with the recorded losses."""
    config = str(GOLDEN / f"{VERSION}.yaml")
    for stage in ("warmup", "route"):
        done = run("train", "--config", config, "--stage", stage, GOLDEN=str(unpacked))
        assert "of format 1" in done.stdout + done.stderr
    found = {(line["stage"], line["step"]): line for line in metrics(unpacked / "run")}
    recorded = {(stage, step): values for stage, step, *values in EXPECTED["losses"]}
    assert set(found) == {("warmup", 3), ("warmup", 4), ("route", 1), ("route", 2)}
    for place, line in found.items():
        assert [line["lm loss"], line["grad-norm"]] == pytest.approx(recorded[place], rel=METRICS), place


@pytest.fixture
def a_renamed_field(monkeypatch):
    """Pretend that `clip_grad` was once `gradient_limit`, and the vision tower's layer count `depth`."""
    names = {"gradient_limit": "clip_grad", "vision_depth": "vision_num_layers"}
    monkeypatch.setattr(renamed_fields, "RENAMED", names)
    monkeypatch.setattr("megatron_evomoe.config.flags.RENAMED", names)


def test_a_renamed_field_is_read_and_its_present_name_said(a_renamed_field, caplog):
    raw = {
        "optimizer": {"gradient_limit": 0.5},
        "vision": {"depth": 3},
        "stages": [{"name": "warmup", "gradient_limit": 0.25}],
    }
    with caplog.at_level(logging.WARNING):
        config = from_mapping(raw)
    assert (config.optimizer.clip_grad, config.vision.num_layers) == (0.5, 3)
    assert config.for_stage("warmup").optimizer.clip_grad == 0.25
    assert "optimizer.gradient_limit is now called optimizer.clip_grad" in caplog.text
    assert "vision.depth is now called vision.num_layers" in caplog.text


def test_a_renamed_flag_is_taken(a_renamed_field, caplog):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    flags = flags_from(parser.parse_args(["--gradient-limit", "0.5"]))
    assert flags == {"clip_grad": 0.5}
    assert "gradient_limit is now called clip_grad" in caplog.text


def test_both_names_of_a_field_are_refused(a_renamed_field):
    with pytest.raises(ConfigError, match="gradient_limit is the former name of"):
        from_mapping({"optimizer": {"gradient_limit": 0.5, "clip_grad": 1.0}})


def test_a_renamed_tensor_is_read_under_its_present_name(unpacked, monkeypatch):
    path = unpacked / "run" / "warmup" / "iter_0000002"
    before = CheckpointReader(path)
    old = "language_model.embedding.word_embeddings.weight"
    names = {"word_embeddings": "tokens"}
    monkeypatch.setattr(renamed_tensors, "RENAMED", names)
    after = CheckpointReader(path)
    new = "language_model.embedding.tokens.weight"
    assert old in before.shapes and old not in after.shapes
    assert torch.equal(before.read(old), after.read(new))
    assert f"optimizer.state.exp_avg.{new}" in after.shapes
    monkeypatch.setitem(names, "word", "other")
    assert CheckpointReader(path).shapes.keys() == after.shapes.keys(), "only whole segments are renamed"
