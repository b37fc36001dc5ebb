"""Comparing configurations: every field has a class, and every change is found and named.

Values with the same meaning are equal.
"""

from __future__ import annotations

import copy
import dataclasses
import typing

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_evomoe.config import SECTIONS, STAGE_KINDS, ConfigError, RunConfig, from_mapping
from megatron_evomoe.config.resume import OnResume, on_resume
from megatron_evomoe.config.run import FLAT, flat_name
from megatron_evomoe.train import compare
from tests.tiny import tiny_config

FIELDS = sorted(FLAT.values())
UNUSED = {
    "evolve": ("router", "moe_router_topk"),
    "warmup": ("num_experts", "router"),
    "route": ("evolution_rule",),
}


def with_field(config: RunConfig, section: str, field: str, value) -> RunConfig:
    """A configuration with one field set, whether or not it could run."""
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
    )


def other_value(section: str, field: str, value, draw):
    """A value of the field's type whose meaning differs from that of `value`."""
    hint = typing.get_type_hints(SECTIONS[section])[field]
    options = [*typing.get_args(hint)] if typing.get_origin(hint) in (typing.Union,) else [hint]
    literals = [v for option in options for v in typing.get_args(option) if isinstance(v, str)]
    if literals:
        return draw(st.sampled_from([v for v in literals if v != value]))
    if isinstance(value, bool) or options[0] is bool:
        return not value
    if isinstance(value, float) or float in options:
        return draw(st.floats(0.001, 1e6).filter(lambda x: x != value))
    if isinstance(value, str) or str in options:
        return draw(st.text("abc", min_size=1).filter(lambda x: x != value))
    if isinstance(value, list) or any(typing.get_origin(o) is list for o in options):
        return {"moe_layer_freq": [1, 0], "evolution_beta": [[0.1, 0.2]], "profile_ranks": [5]}.get(
            field, ["experts"]
        )
    return draw(st.integers(1, 10**6).filter(lambda x: x != value))


def found_for(section: str, field: str, data, kind: str) -> tuple[list[compare.Change], object, object]:
    before = CONFIGS[kind]
    value = getattr(getattr(before, section), field)
    other = other_value(section, field, value, data.draw)
    return compare.changes(before, with_field(before, section, field, other), kind), value, other


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_every_field_declares_a_class(section, field):
    assert isinstance(on_resume(SECTIONS[section], field), OnResume)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.sampled_from(FIELDS), st.sampled_from(STAGE_KINDS), st.data())
def test_any_changed_field_is_found_and_named_with_both_values(place, kind, data):
    section, field = place
    found, value, other = found_for(section, field, data, kind)
    if not found:
        assert section != "optimizer"
        assert field in {
            "rope_scaling_type",
            "rope_scaling_factor",
            "recompute_modules",
            "recompute_num_layers",
            "feature_layer",
            "num_layers",
            "kv_channels",
            "num_query_groups",
            "trainable",
            "sequence_parallel",
        }, (field, value, other)
        return
    (change,) = found
    assert (change.section, change.field) == place and change.flag == flat_name(section, field)
    assert (change.before, change.now) == (compare.plain(value), compare.plain(other))
    declared = on_resume(SECTIONS[section], field)
    assert change.kind is declared or (declared is OnResume.MUST_EQUAL and section == "moe" and change.note)
    assert all(compare.show(compare.plain(v)) in str(change) for v in (value, other))


@pytest.mark.parametrize("kind", sorted(UNUSED))
def test_what_a_stage_does_not_use_is_said_and_not_refused(kind):
    other = {"num_experts": 8, "moe_router_topk": 2, "router": "linear", "evolution_rule": "ema"}
    for field in UNUSED[kind]:
        (change,) = compare.changes(
            tiny_config(kind), with_field(tiny_config(kind), "moe", field, other[field]), kind
        )
        assert change.kind is OnResume.LOGGED and kind in change.note
    (change,) = compare.changes(
        tiny_config("evolve"), with_field(tiny_config("evolve"), "moe", "num_experts", 8), "evolve"
    )
    assert change.kind is OnResume.MUST_EQUAL


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"language": {"num_query_groups": None}}, {"language": {"num_query_groups": 2}}),
        ({"language": {"kv_channels": None}}, {"language": {"kv_channels": 16}}),
        ({"moe": {"moe_layer_freq": 2}}, {"moe": {"moe_layer_freq": [0, 1]}}),
        (
            {"vision": {"feature_layer": -2, "num_layers": 3}},
            {"vision": {"feature_layer": 2, "num_layers": 3}},
        ),
        (
            {"vision": {"feature_layer": -2, "num_layers": 3}},
            {"vision": {"feature_layer": -1, "num_layers": 2}},
        ),
        ({"language": {"rope_scaling_type": "linear"}}, {"language": {"rope_scaling_type": None}}),
        ({"train": {"trainable": ["router", "experts"]}}, {"train": {"trainable": ["experts", "router"]}}),
        ({"train": {"trainable": []}}, {"train": {"trainable": ["router"]}}),
        ({"optimizer": {"lr_decay_iters": None}}, {"optimizer": {"lr_decay_iters": 10}}),
    ],
)
def test_one_meaning_in_two_spellings_is_no_change(one, other):
    assert compare.changes(tiny_config("route", **one), tiny_config("route", **other), "route") == []
    assert compare.changes(tiny_config("route", **other), tiny_config("route", **one), "route") == []


def test_a_preset_equals_its_fields_spelled_out():
    preset = from_mapping({"preset": "qwen2-0.5b", "stages": [{"name": "align"}]})
    spelled = from_mapping(yaml.safe_load(preset.to_yaml()))
    spelled.preset = None
    assert compare.changes(preset, spelled, "align") == []


def test_the_papers_evolution_ranges_are_the_default_of_four_experts():
    spelled = tiny_config("evolve", moe={"evolution_beta": [[0.9, 0.99], [0.8, 0.89], [0.7, 0.79]]})
    assert compare.changes(spelled, tiny_config("evolve"), "evolve") == []


@pytest.mark.parametrize("kind", STAGE_KINDS)
def test_what_a_checkpoint_keeps_is_read_back_as_it_was(kind):
    raw = {
        "language": {"num_layers": 2},
        "optimizer": {"lr": 1e-5, "adam_eps": 1e-12},
        "data": {"train_data": ["a", "b"]},
        "stages": [
            {"name": "one", "kind": kind, "lr": 0.5, "seq_length": 300},
            {"name": "two", "kind": "align"},
        ],
    }
    config = from_mapping(raw)
    stored = compare.stored_config(yaml.safe_load(config.to_yaml()), "one")
    assert compare.changes(stored, config.for_stage("one"), kind) == []
    assert [c.flag for c in compare.changes(stored, config.for_stage("two"), kind)] == ["seq_length", "lr"]


def test_configurations_of_other_versions_are_read():
    raw = yaml.safe_load(tiny_config("warmup").to_yaml())
    raw["train"] |= {"of_the_future": 3, "seed": "no number"}
    raw["another_section"] = {"a": 1}
    del raw["train"]["bf16"], raw["gpu"]
    stored = compare.stored_config(raw, "warmup")
    assert [(c.flag, c.before) for c in compare.changes(stored, tiny_config("warmup"), "warmup")] == [
        ("seed", "no number")
    ]
    for nothing in (
        {},
        {"stages": 5},
        {"language": {}, "stages": [{"name": "align"}]},
        {"language": 3, "stages": []},
    ):
        assert compare.stored_config(nothing, "warmup") is None


TEXT = st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
CONFIGS = {kind: tiny_config(kind) for kind in STAGE_KINDS}
STORED = {kind: config.to_dict() for kind, config in CONFIGS.items()}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.sampled_from(FIELDS), JSON, st.sampled_from(STAGE_KINDS))
def test_any_value_in_a_checkpoint_is_compared_without_a_traceback(place, value, kind):
    section, field = place
    raw = copy.deepcopy(STORED[kind])
    raw[section][field] = value
    for change in compare.changes(compare.stored_config(raw, kind), CONFIGS[kind], kind):
        assert str(change)


FRESH_MODEL = [
    ("language", "rotary_base", 5000),
    ("language", "norm_epsilon", 1e-5),
    ("language", "activation", "gelu"),
    ("language", "window_size", 8),
    ("language", "num_attention_heads", 4),
    ("vision", "norm_epsilon", 1e-6),
]


@pytest.mark.parametrize(("section", "field", "value"), FRESH_MODEL)
def test_a_beginning_stage_finds_another_model_whose_shapes_agree(section, field, value):
    before = tiny_config("warmup")
    now = with_field(before, section, field, value)
    every = ["vision_model", "vision_projection", "language_model"]
    assert [c.field for c in compare.model_changes(before, now, "align", "warmup", every)] == [field]
    left = [p for p in every if not p.startswith(section)]
    assert (
        compare.model_changes(
            before, now, "pretrained", "warmup", left if section == "language" else every[2:]
        )
        == []
    )


def test_a_beginning_stage_may_choose_what_the_checkpoint_does_not_fix():
    before, every = tiny_config("warmup"), ["vision_model", "vision_projection", "language_model"]
    for section, field, value in [
        ("train", "seed", 9),
        ("data", "conversation_template", "plain"),
        ("moe", "num_experts", 8),
        ("language", "init_method_std", 0.1),
        ("train", "bf16", True),
        ("moe", "moe_layer_freq", 1),
    ]:
        assert (
            compare.model_changes(before, with_field(before, section, field, value), "warmup", "route", every)
            == []
        )
    deeper = with_field(before, "vision", "feature_layer", -1)
    assert [c.field for c in compare.model_changes(before, deeper, "align", "warmup", every)] == [
        "feature_layer"
    ]
    assert compare.model_changes(before, deeper, "pretrained", "align", every[:1]) == []
    router = with_field(with_field(before, "moe", "router", "linear"), "moe", "moe_router_topk", 2)
    assert [c.field for c in compare.model_changes(before, router, "route", "route", every)] == [
        "moe_router_topk"
    ]
    assert compare.model_changes(before, router, "evolve", "route", every) == []


def test_values_are_shown_as_a_file_spells_them():
    assert [compare.show(v) for v in (None, True, 1, 0, False, 1e-5, "x" * 99)] == [
        "none",
        "true",
        "1",
        "0",
        "false",
        "1e-05",
        "x" * 77 + "…",
    ]


def test_names_to_allow_are_checked_and_may_be_one_text():
    assert tiny_config(checkpoint={"allow_changed": "seed, rotary_base"}).checkpoint.allow_changed == [
        "seed",
        "rotary_base",
    ]
    with pytest.raises(
        ConfigError, match=r"unknown field in allow_changed: 'rotary_bse' \(did you mean 'rotary_base'"
    ):
        tiny_config(checkpoint={"allow_changed": ["rotary_bse"]})
    with pytest.raises(ConfigError, match="contradict each other"):
        tiny_config(
            optimizer={"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True}
        )
