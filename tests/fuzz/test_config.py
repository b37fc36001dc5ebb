"""Any configuration gives a checked `RunConfig` that reads back equal, or an error of one line."""

from __future__ import annotations

import argparse
import copy
import datetime
import math
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_evomoe.config import (
    SECTIONS,
    STAGE_KINDS,
    ConfigError,
    RunConfig,
    add_flags,
    flags_from,
    from_mapping,
    load_config,
)
from megatron_evomoe.config.run import FLAT, STAGE_SECTIONS
from tests.fuzz.config_values import FILE, VALUES
from tests.tiny import SMALL, VOCAB, rows, step_of

_RECURSIVE: list[Any] = []
_RECURSIVE.append(_RECURSIVE)
BAD = (
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    -1,
    -2,
    7,
    2**31,
    2**63,
    2**64,
    -(2**64),
    10**5000,
    0.0,
    0.5,
    1.0,
    -0.5,
    1e-5,
    1e300,
    5e-324,
    math.nan,
    math.inf,
    -math.inf,
    "",
    " ",
    "0",
    "1",
    "1e-5",
    "1e5",
    "true",
    "no",
    "null",
    "x",
    "x" * 5000,
    "a/../b",
    "../../x",
    "/etc/passwd",
    "\0",
    "a\nb",
    "\ud800",
    "${HOME}",
    "é",
    "💥",
    b"x",
    [],
    [0],
    [1],
    [0, 1],
    [None],
    [[]],
    [[0.1, 0.2]],
    [["a", "b"]],
    [[1, 2, 3]],
    ["x"],
    ["\0"],
    {},
    {"a": 1},
    {1: 2},
    (1, 2),
    {1, 2},
    datetime.date(2024, 1, 1),
    1j,
    object,
    _RECURSIVE,
)
GOOD = {"stages": [{"name": "align", "lr": 1e-3}, {"name": "last", "kind": "route", "train_iters": 7}]}


def named(error: ConfigError) -> str:
    """The outcome of a refused configuration, whose message must be one line of readable length."""
    message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 900
    return "named"


def reads_back(config: RunConfig, folder: Path, draw: random.Random) -> None:
    """Assert that the resolved configuration reads back equal, as a mapping and as a file.

    Only one case in ten is written to a file, because that takes longer.
    """
    assert from_mapping(config.to_dict()) == config
    if draw.random() > 0.1:
        return
    (folder / "run_config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(folder / "run_config.yaml") == config


def _with_a_strange_value(draw: random.Random) -> dict[str, Any]:
    raw: dict[str, Any] = copy.deepcopy(GOOD)
    for _ in range(draw.choice([1, 1, 1, 2])):
        key = draw.choice(list(FLAT))
        section, field = FLAT[key]
        likely = VALUES.get(section, {}).get(field, BAD)
        bad = draw.choice(draw.choice([BAD, likely]))
        where = draw.choice(
            ["field", "field", "field", "stage", "section", "entry", "name", "preset", "list"]
        )
        if where == "field":
            raw[section] = (
                {**raw[section], field: bad} if isinstance(raw.get(section), dict) else {field: bad}
            )
        elif where == "stage" and section in STAGE_SECTIONS and isinstance(raw["stages"], list):
            raw["stages"] = [*raw["stages"], {"name": "more", "kind": "align", key: bad}]
        elif where == "name":
            raw["stages"] = [
                {"name": bad, "kind": draw.choice(["align", bad]), "load": draw.choice([None, bad])}
            ]
        else:
            raw[{"section": section, "preset": "preset"}.get(where, "stages")] = (
                bad if where != "entry" else [bad]
            )
    return raw


def test_configuration_values(tally, tmp_path):
    for draw in tally.draws(quick=800):
        raw = _with_a_strange_value(draw)
        try:
            config = from_mapping(raw)
        except ConfigError as error:
            tally.add(named(error))
            continue
        reads_back(config, tmp_path, draw)
        tally.add("right")


FRAGMENTS = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\t",
    b"&a ",
    b"*a",
    b"<<: *a\n",
    b"!!python/object/apply:os.system [id]",
    b"!!int ",
    b"---\n",
    b"? ",
    b": ",
    b"- ",
    b"[" * 50,
    b"{" * 50,
    b"'",
    b'"',
    b"#",
    b"|\n",
    b"%YAML 3.0\n",
    b"9" * 5000,
    b"1e400",
    b"0x1f",
    b"010",
    b"1:30",
    b"no",
    b"2024-01-01",
    b".nan",
    b"${HOME}",
    b"${NOT_SET}",
    b"${NOT_SET:-5}",
    b"${A",
    b"=",
    b"~",
    b"\xed\xa0\x80",
    "é".encode(),
    b"\\u0000",
    b"optimizer: {lr: 1}\n",
    b"train: {seed: 1, seed: 2}\n",
    b"stages: 5\n",
    b"\r",
    b"\xc2\x85",
    "\ue000".encode(),
)


def _mutated(draw: random.Random) -> bytes:
    text = FILE.encode()
    for _ in range(draw.choice([1, 1, 2, 4])):
        at = draw.randrange(len(text) + 1)
        kind = draw.randrange(7)
        if kind > 4:  # replace digits by other digits
            text = b"".join(
                bytes([c]) if c not in b"0123456789" or draw.random() > 0.05 else b"%d" % draw.randrange(10)
                for c in text
            )
        elif kind == 0:
            text = text[:at] + draw.choice(FRAGMENTS) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + draw.randrange(1, 30) :]
        elif kind == 2:  # insert a fragment as a line of its own or as the value of a key
            lines = text.split(b"\n")
            lines.insert(
                draw.randrange(len(lines)), draw.choice([b"", b"  ", b"  x: "]) + draw.choice(FRAGMENTS)
            )
            text = b"\n".join(lines)
        elif kind == 3:
            lines = text.split(b"\n")
            text = b"\n".join([*lines, *draw.sample(lines, 2)])
        else:
            text = text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :]
    return text


def test_configuration_files(tally, tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    path = tmp_path / "run.yaml"
    for draw in tally.draws(quick=250):
        path.write_bytes(_mutated(draw))
        try:
            config = load_config(path)
        except ConfigError as error:
            tally.add(named(error))
            continue
        reads_back(config, tmp_path, draw)
        tally.add("right")


TEXTS = (
    "",
    "007",
    "123",
    "1e5",
    "no",
    "true",
    "null",
    "~",
    "2024-01-01",
    "1:30",
    "a: b",
    "[a, b",
    "[a, b]",
    "[007, no]",
    "{a: 1}",
    "@x",
    "%d",
    "*a",
    "&a",
    "!!int 5",
    "'q'",
    '"q"',
    "#x",
    "a #b",
    "- a",
    "-1",
    "-1e-3",
    "1_000",
    "0x10",
    "nan",
    "inf",
    ".inf",
    "9" * 5000,
    "x" * 5000,
    "\t",
    "a\tb",
    "é",
    "\udcff",
    "${HOME}",
    "5",
    "1",
    "0.5",
    "0",
    "[1, 0]",
    "[[0.1, 0.2]]",
    "core_attn",
    "[vision]",
    "seed,lr",
    "polynomial",
    "cosine",
    "gelu",
)
TEXT_FIELDS = (
    "save",
    "load",
    "tokenizer",
    "wandb_exp_name",
    "tensorboard_dir",
    "feature_cache_dir",
    "pretrained_checkpoint",
)


def test_configuration_flags(tally, tmp_path):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    for draw in tally.draws(quick=400):
        key = draw.choice([draw.choice(list(FLAT)), draw.choice(TEXT_FIELDS)])
        typed = draw.choice(TEXTS)
        try:
            config = from_mapping(GOOD, flags_from(parser.parse_args([f"--{key.replace('_', '-')}={typed}"])))
        except ConfigError as error:
            tally.add(named(error))
            continue
        section, field = FLAT[key]
        if key in TEXT_FIELDS:
            assert getattr(getattr(config, section), field) == (None if typed in ("", "~", "null") else typed)
        reads_back(config, tmp_path, draw)
        tally.add("right")


def _small(draw: random.Random) -> dict[str, Any]:
    """A small model with some of its values replaced by random ones."""
    raw = copy.deepcopy(SMALL)
    for _ in range(draw.choice([1, 2, 3, 5])):
        section = draw.choice(list(VALUES))
        field = draw.choice(list(VALUES[section]))
        raw.setdefault(section, {})[field] = draw.choice(VALUES[section][field])
    return raw


def _batch(config: RunConfig) -> dict[str, Any]:
    """Two rows of text without images, because no image fits every generated sequence length."""
    batch = rows([0, 0], length=min(24, config.data.seq_length))
    batch["tokens"] %= config.language.vocab_size
    batch["labels"] = batch["labels"].where(batch["labels"] < 0, batch["labels"] % config.language.vocab_size)
    return batch


@pytest.mark.usefixtures("one_rank")
def test_configurations_built(tally):
    """Every small model that the configuration checks accept can be built and takes two steps."""
    from megatron_evomoe.parallel import topology
    from megatron_evomoe.train import preflight
    from megatron_evomoe.train.built import build_stage
    from megatron_evomoe.train.step import NonFiniteError, take_step

    for draw in tally.draws(quick=80):
        raw, kind = _small(draw), draw.choice(STAGE_KINDS)
        try:
            config = from_mapping({**raw, "stages": [{"name": kind}]})
            preflight.check_stage(config.for_stage(kind), kind, world_size=1)
        except ConfigError as error:
            tally.add(named(error))
            continue
        topology.seed_everything(config.train.seed)
        built = build_stage(config, config.stages[0])
        for mlp in built.evolving:
            mlp.begin()
        if config.data.seq_length >= 8:
            try:
                for number in (1, 2):
                    take_step(built, step_of(_batch(config)), number)
                    built.evolve(number, config.train.seed)
            except NonFiniteError:
                tally.add("named")
                continue
        tally.add("right")


@pytest.mark.usefixtures("one_rank")
def test_configurations_planned(tally):
    """Every configuration that the checks accept, of any size, can be planned."""
    from megatron_evomoe.plan import report, search
    from megatron_evomoe.plan.step_time import Machine

    sizes = ("hidden_size", "ffn_hidden_size", "num_layers", "vocab_size")
    for draw in tally.draws(quick=60):
        raw = _small(draw)
        if draw.random() < 0.3:
            raw["language"] |= {
                draw.choice(sizes): draw.choice([1024, 4096, 2**20, 2**24]),
                "max_position_embeddings": 2**24,
            }
        kind = draw.choice(STAGE_KINDS)
        machine = Machine(nnodes=draw.choice([1, 2, 3]), gpus_per_node=draw.choice([1, 2, 8]))
        try:
            config = from_mapping({**raw, "stages": [{"name": kind}]})
            plan = search.plan_stage(config, config.stages[0], machine)
        except ConfigError as error:
            tally.add(named(error))
            continue
        assert list(report.lines([plan], machine, 5))
        assert math.isfinite(sum(estimate.time.total + estimate.total_bytes for estimate in plan.fits))
        tally.add("right")


def test_all_fields_are_among_those_tried():
    assert {(section, field) for section, fields in VALUES.items() for field in fields} <= set(FLAT.values())
    assert set(VALUES["language"]) == {f for s, f in FLAT.values() if s == "language"}
    assert SMALL["language"]["vocab_size"] == VOCAB
    assert set(SECTIONS) >= set(VALUES)
