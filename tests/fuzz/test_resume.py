"""A run's configuration and data compared with randomly changed ones in a checkpoint.

Every difference is either reported or refused by name.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_evomoe.checkpoint.record import CheckpointError, Record, TrainingData
from megatron_evomoe.config import SECTIONS, STAGE_KINDS, RunConfig
from megatron_evomoe.config.resume import OnResume, on_resume
from megatron_evomoe.config.run import FLAT
from megatron_evomoe.train import compare, resume_check
from tests.fuzz.conftest import Tally
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")

CONFIGS = {kind: tiny_config(kind) for kind in STAGE_KINDS}
ALLOWING = {kind: tiny_config(kind, checkpoint={"allow_changed_data": True}) for kind in STAGE_KINDS}
RAW = {kind: config.to_dict() for kind, config in CONFIGS.items()}
ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    7,
    2**70,
    0.5,
    -0.25,
    float("nan"),
    "",
    "a",
    "auto",
    [],
    [1],
    ["x"],
    [[0.1, 0.2]],
    {},
    {"a": 1},
]


def record_of(kind: str, data: TrainingData | None) -> Record:
    return Record(
        stage=kind,
        kind=kind,
        step=3,
        position=12,
        finished=False,
        layout={"world": dist.get_world_size()},
        vocab_size=64,
        tokenizer_fingerprint="abc",
        data=data,
    )


def test_changed_configurations(tally: Tally, tmp_path: Path) -> None:
    """One to four fields of the checkpoint's configuration get random values.

    A field that must be equal and is not is refused with its section and name, and no other field is refused;
    a field that may change is named in the printed line.
    """
    for draw in tally.draws(2000):
        kind = draw.choice(STAGE_KINDS)
        raw, places = copy.deepcopy(RAW[kind]), draw.sample(sorted(FLAT.values()), draw.randint(1, 4))
        for section, field in places:
            raw[section][field] = draw.choice(ODD)
        tally.add(outcome(tmp_path, kind, raw, places))


def outcome(folder: Path, kind: str, raw: dict[str, Any], places: list[tuple[str, str]]) -> str:
    now = CONFIGS[kind]
    before = compare.stored_config(raw, kind)
    assert before is not None
    differ = [(s, f) for s, f in places if value(before, s, f) != value(now, s, f)]
    try:
        found = resume_check._compare(folder, record_of(kind, None), before, now.stages[0], now, None)
    except CheckpointError as error:
        refused = [(s, f) for s, f in differ if f" {s}.{f} was " in str(error)]
        assert refused and "\n" not in str(error) and "--allow-changed " in str(error)
        assert all(on_resume(SECTIONS[s], f) is OnResume.MUST_EQUAL for s, f in refused)
        assert str(error).count(" was ") - 1 == len(refused), (
            f"one 'was saved', and one 'was' a field: {error}"
        )
        return "named"
    said = {(c.section, c.field) for c in found.changes}
    assert said <= set(differ)
    for section, field in set(differ) - said:
        old, new = (compare._meaning(section, field, config, kind) for config in (before, now))
        assert on_resume(SECTIONS[section], field) is OnResume.FREE or old == new, (section, field)
    return "right"


def value(config: RunConfig, section: str, field: str) -> Any:
    return compare.plain(getattr(getattr(config, section), field))


def test_changed_data(tally: Tally, tmp_path: Path) -> None:
    """Shards are dropped, added, moved, updated or renamed, and samples are dropped.

    Whatever changes the order of samples is refused, or is allowed and reported.
    """
    for draw in tally.draws(2000):
        shards = [
            (f"{i}.tar", draw.randint(1, 9), f"{draw.randint(0, 9**9)}") for i in range(draw.randint(1, 6))
        ]
        before, now = data_of(shards), data_of(changed(draw, shards))
        kind = draw.choice(STAGE_KINDS)
        record = record_of(kind, before)
        same = [d for *_, d in before["shards"]] == [d for *_, d in now["shards"]]
        try:
            found = resume_check._compare_data(tmp_path, record, now, CONFIGS[kind])
            assert same and found == []
            tally.add("right")
        except CheckpointError as error:
            assert not same and "--allow-changed-data" in str(error) and "\n" not in str(error)
            sizes = (
                f"({before['samples']} samples in {len(shards)} shards; now {now['samples']} in "
                f"{len(now['shards'])})"
            )
            assert sizes in str(error)
            allowed = resume_check._compare_data(tmp_path, record, now, ALLOWING[kind])
            assert "come again before it ends" in allowed[-1]
            tally.add("named")


def data_of(shards: list[tuple[str, int, str]]) -> TrainingData:
    return {
        "order": "argsort of Philox",
        "seed": 1,
        "samples": sum(n for _, n, _ in shards),
        "shards": shards,
    }


def changed(draw: random.Random, shards: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """The shards after up to two changes; at least one shard remains."""
    found = list(shards)
    for _ in range(draw.randint(0, 2)):
        i = draw.randrange(len(found))
        name, count, digest = found[i]
        what = draw.choice(["rename", "drop", "add", "move", "renew", "shorten"])
        if what == "rename":
            found[i] = (f"{name}.copy", count, digest)
        elif what == "drop" and len(found) > 1:
            del found[i]
        elif what == "add":
            found.insert(i, (f"new-{name}", draw.randint(1, 9), f"{draw.randint(0, 9**9)}"))
        elif what == "move":
            found.insert(draw.randrange(len(found)), found.pop(i))
        elif what == "renew":
            found[i] = (name, count, digest + "x")
        elif what == "shorten" and count > 1:
            found[i] = (name, count - 1, digest + "y")
    return found
