"""A checkpoint is compared with the current run, on disk and in one process."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_evomoe.checkpoint import record as records
from megatron_evomoe.checkpoint import store
from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.config import SECTIONS, RunConfig
from megatron_evomoe.config.resume import OnResume, on_resume
from megatron_evomoe.config.run import FLAT
from megatron_evomoe.train import compare, data_order, resume_check
from tests.tiny import tiny_config
from tests.unit.checkpoint.test_store import built_for, record_for, save, train
from tests.unit.train.test_compare import other_value, with_field

pytestmark = pytest.mark.usefixtures("one_rank")

DATA = {
    "order": "argsort of Philox",
    "seed": 1234,
    "samples": 30,
    "shards": [("a.tar", 10, "1"), ("b.tar", 20, "2")],
}


CONFIG = tiny_config("route")


def saved(
    directory: Path, config: RunConfig, kind: str, *, trained: int = 1, data: dict | None = DATA, **sections
) -> Path:
    """Save a checkpoint of a stage of `kind` under `config`, after some steps."""
    _, built = built_for(kind, trained=trained, **sections)
    record = dataclasses.replace(record_for(kind, trained), data=data)
    return save(directory, built, kind, trained, record=record, config_yaml=config.to_yaml())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, one_rank) -> Path:
    return saved(tmp_path_factory.mktemp("saved"), tiny_config("route"), "route", trained=2)


def held(folder: Path, config: RunConfig, data: dict | None = DATA) -> resume_check.Comparison:
    record = records.read(folder)
    return resume_check._compare(
        folder,
        record,
        resume_check.stored(folder, record.stage),
        config.stages[0],
        config.for_stage(config.stages[0].name),
        data,
    )


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.sampled_from(sorted(FLAT.values())), st.data())
def test_each_field_is_refused_said_or_silent_as_its_class_says(checkpoint, place, data):
    section, field = place
    before = CONFIG
    value = getattr(getattr(before, section), field)
    other = other_value(section, field, value, data.draw)
    now = with_field(before, section, field, other)
    record = _record(checkpoint)
    changed = compare.changes(before, now, "route")
    if field == "train_iters" and other < record.step:
        with pytest.raises(CheckpointError, match=f"has done 2 steps, and train_iters is {other}"):
            _held(checkpoint, record, now)
    elif changed and changed[0].kind is OnResume.MUST_EQUAL:
        with pytest.raises(CheckpointError) as error:
            _held(checkpoint, record, now)
        assert (
            f"{section}.{field} was {compare.show(compare.plain(value))}, is now "
            f"{compare.show(compare.plain(other))}" in str(error.value)
        )
        assert str(error.value).endswith(f"--allow-changed {changed[0].flag}") and "\n" not in str(
            error.value
        )
        allowed = dataclasses.replace(
            now, checkpoint=dataclasses.replace(now.checkpoint, allow_changed=[changed[0].flag])
        )
        assert _held(checkpoint, record, allowed).fields()["changed"].keys() == {changed[0].flag}
    else:
        found = _held(checkpoint, record, now)
        is_said = bool(changed) and on_resume(SECTIONS[section], field) is not OnResume.FREE
        assert [c.flag for c in found.changes] == ([changed[0].flag] if is_said else [])
        assert bool(found.line()) == is_said


def _held(folder: Path, record: Record, config: RunConfig) -> resume_check.Comparison:
    return resume_check._compare(folder, record, _stored(folder), config.stages[0], config, DATA)


@functools.cache
def _stored(folder: Path) -> RunConfig | None:
    return resume_check.stored(folder, "route")


@functools.cache
def _record(folder: Path) -> Record:
    return records.read(folder)


DATA_CASES = [
    ({"samples": 29, "shards": [("a.tar", 9, "3"), ("b.tar", 20, "2")]}, r"a.tar holds 9 samples, 10 before"),
    ({"shards": [("b.tar", 20, "2"), ("a.tar", 10, "1")]}, "the same 2 shards in another order"),
    ({"shards": [("a.tar", 10, "1"), ("b.tar", 20, "4")]}, "b.tar holds other contents in its 20 samples"),
    ({"samples": 10, "shards": [("a.tar", 10, "1")]}, r"b.tar \(20 samples\) is gone"),
]


@pytest.mark.parametrize(("change", "message"), DATA_CASES)
def test_changed_data_is_refused_by_name_and_allowed_with_its_meaning(checkpoint, change, message):
    with pytest.raises(CheckpointError, match=f"was trained on other data .*{message}.*--allow-changed-data"):
        held(checkpoint, tiny_config("route"), {**DATA, **change})
    found = held(
        checkpoint, tiny_config("route", checkpoint={"allow_changed_data": True}), {**DATA, **change}
    )
    assert "come again before it ends" in found.line() and found.fields()["notes"]


def test_renamed_shards_are_the_same_data(checkpoint):
    renamed = {**DATA, "shards": [(f"copy-{name}", n, d) for name, n, d in DATA["shards"]]}
    assert held(checkpoint, tiny_config("route"), renamed).line() == ""


def test_another_rule_of_order_is_refused(checkpoint):
    record = dataclasses.replace(records.read(checkpoint), data={**DATA, "order": "a new one"})
    with pytest.raises(
        CheckpointError,
        match=r"took its samples in the order 'a new one'.*has 'mixed-radix Feistel' and 'argso",
    ):
        resume_check._compare_data(checkpoint, record, data_order.resumed(DATA, record), tiny_config("route"))


def test_what_cannot_be_compared_is_said(tmp_path):
    path = saved(tmp_path, tiny_config("warmup"), "route", trained=1, data=None)
    line = held(path, tiny_config("route")).line()
    assert "has no stage 'route', so no configuration could be compared" in line
    assert "does not say which samples it was trained on" in line


def test_another_kind_of_stage_is_refused(checkpoint):
    with pytest.raises(
        CheckpointError, match="belongs to a 'route' stage, 'warmup' is 'warmup'; choose another --save"
    ):
        held(checkpoint, tiny_config("warmup"))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"a: [", b"&a [*a]", b"a: 1\na: 2\n", b"- 1\n", b"", b"{" * 5000]
)
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / resume_check.CONFIG_FILE).write_bytes(content)
    try:
        assert resume_check.stored(tmp_path, "route") is None
    except CheckpointError as error:
        assert resume_check.CONFIG_FILE in str(error) and "\n" not in str(error)


def test_the_record_keeps_the_data(checkpoint):
    data = json.loads((checkpoint / "evomoe.json").read_text())["data"]
    assert (
        data["shards"] == [["a.tar", 10, "1"], ["b.tar", 20, "2"]] and records.read(checkpoint).data == DATA
    )


@pytest.mark.parametrize(("distributed", "bf16"), [(True, False), (False, False), (False, True)])
def test_the_optimizer_takes_the_present_values(tmp_path, distributed, bf16):
    """Betas, epsilon and weight decay take the current values, not only what the schedule sets.

    The next update therefore differs.
    """

    def build(**optimizer):
        return built_for("align", optimizer=optimizer, **options)[1]

    def loaded(**optimizer):
        built = build(**optimizer)
        store.load_training_state(
            path,
            modules=built.modules,
            optimizer=built.optimizer,
            scheduler=built.scheduler,
            record=records.read(path),
        )
        return built

    options = {"parallel": {"use_distributed_optimizer": distributed}, "train": {"bf16": bf16}}
    path = saved(tmp_path, tiny_config("align"), "align", trained=2, **options)
    unbroken = built_for("align", trained=2, **options)[1]
    assert train(loaded(), 3, 5) == train(unbroken, 3, 5)
    given_values = {"lr": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.75, "adam_eps": 0.25, "weight_decay": 0.125}
    built = loaded(**given_values)
    groups = [
        g
        for part in getattr(built.optimizer, "chained_optimizers", [built.optimizer])
        for g in part.optimizer.param_groups
    ]
    assert groups
    for group in groups:
        assert (tuple(group["betas"]), group["eps"], group["lr"]) == ((0.5, 0.75), 0.25, 0.5)
        assert group["weight_decay"] == 0.125 * group.get("wd_mult", 1.0)
    for name, value in given_values.items():
        assert train(loaded(**{name: value}), 3, 4) != train(loaded(), 3, 4), name


@pytest.mark.parametrize(
    ("kind", "before", "now", "key"),
    [
        ("warmup", {"num_layers": 3}, {"num_layers": 2}, "decoder.layers.2."),
        ("warmup", {"add_qkv_bias": True}, {}, "linear_qkv.bias"),
        ("warmup", {"qk_layernorm": True}, {}, "_layernorm.weight"),
        ("warmup", {"tie_word_embeddings": False}, {}, "output_layer.weight"),
        ("route", {"num_layers": 4}, {"num_layers": 2}, "decoder.layers.2."),
    ],
)
def test_a_part_of_a_checkpoint_is_never_loaded_alone(tmp_path, kind, before, now, key):
    from megatron_evomoe.train.transition import start_from

    path = saved(tmp_path, tiny_config(kind, language=before), kind, language=before)
    config, built = built_for(kind, language=now)
    with pytest.raises(CheckpointError, match=rf"holds '[^']*{key}.*smaller than the checkpoint's"):
        store.load_training_state(
            path,
            modules=built.modules,
            optimizer=built.optimizer,
            scheduler=built.scheduler,
            record=records.read(path),
        )
    with pytest.raises(CheckpointError, match=rf"holds '[^']*{key}.*smaller than the checkpoint's"):
        start_from(path, built, config.for_stage(kind), config.stages[0], fingerprint="abc")


def test_what_starts_fresh_is_named(tmp_path):
    from megatron_evomoe.train.transition import start_from

    path = saved(tmp_path, tiny_config("route"), "route")
    assert (
        start_from(
            path,
            built_for("route")[1],
            tiny_config("route"),
            tiny_config("route").stages[0],
            fingerprint="abc",
        )[1]
        == []
    )
    config, built = built_for("route", moe={"router": "linear"})
    _, fresh = start_from(path, built, config, config.stages[0], fingerprint="abc")
    assert fresh == ["language_model.decoder.layers.*.mlp.router.weight"]
    assert torch.isfinite(torch.tensor(train(built, 1, 1)[0])).all()
