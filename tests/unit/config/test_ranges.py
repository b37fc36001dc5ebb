"""Each field's range is part of its type, so files, flags and stages share it."""

from __future__ import annotations

import itertools
import math

import pytest

from megatron_evomoe.config import ConfigError, from_mapping

WRONG = {
    "optimizer.lr": (math.nan, -1, math.inf, "fast", True, [1]),
    "optimizer.adam_beta2": (2, 1, -0.1),
    "optimizer.adam_eps": (-1, 0, 1e-60),
    "optimizer.weight_decay": (-1e-9, math.nan),
    "optimizer.clip_grad": (-1, math.inf),
    "optimizer.lr_warmup_fraction": (1.5, -0.1),
    "optimizer.lr_decay_iters": (0, -1, 1.5),
    "train.train_iters": (0, -1, 1.0, True, "5", 2**31),
    "train.seed": (-1, 2**32, 0.5, False),
    "train.micro_batch_size": (0, None),
    "train.eval_batch_size": (0,),
    "train.profile_ranks": ([-1], 0, [0.5]),
    "train.bf16": (1, 0, "true"),
    "train.recompute_modules": (["mpl"], "mlp", [1]),
    "train.trainable": (["visoin"], [None]),
    "train.exit_duration_in_mins": (0, -1, math.nan),
    "log.log_interval": (0, -5),
    "data.num_workers": (-1, 10**6),
    "data.prefetch_factor": (0,),
    "data.max_bad_sample_rate": (-0.1, 1.1),
    "data.train_data": ("data/x", [5], ["a\0b"], [""]),
    "data.max_image_pixels": (0,),
    "checkpoint.save": ("", "a\0b", "a\nb", 7, "\ud800"),
    "parallel.distributed_timeout_minutes": (-1, 0, math.nan, 1e300),
    "parallel.tensor_model_parallel_size": (0, True),
    "language.num_attention_heads": (0,),
    "language.hidden_size": (0, 2**40),
    "language.ffn_hidden_size": (0,),
    "language.num_query_groups": (0,),
    "language.rotary_percent": (0, 1.5),
    "language.rotary_base": (0, 1e4),
    "language.norm_epsilon": (0, -1),
    "vision.patch_size": (0,),
    "moe.moe_layer_freq": (0, [0, 2], [True, False], "2", [0.0, 1.0]),
    "moe.moe_expert_capacity_factor": (0, -1, math.inf),
    "moe.evolution_beta": ([[0.5]], [[0.1, 0.2, 0.3]], [[-0.1, 0.5]], [0.5], [[0.5, 1.1]]),
    "log.wandb_project": ("a/b", "x" * 200),
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in WRONG.items() for value in values]
)
def test_values_out_of_range_are_refused_by_name(field, value):
    section, name = field.split(".")
    with pytest.raises(ConfigError) as error:
        from_mapping({section: {name: value}})
    assert str(error.value).startswith(f"{field} = ")
    if section in ("optimizer", "train", "log", "data", "moe"):
        with pytest.raises(ConfigError, match=rf"stage 'align': {section}\.{name} = "):
            from_mapping({"stages": [{"name": "align", name: value}]})


@pytest.mark.parametrize("value", ["1e-5", "1.0e-5", "1E-05"])
def test_exponents_that_yaml_1_1_takes_for_text_are_numbers(value):
    assert from_mapping({"optimizer": {"lr": value}}).optimizer.lr == 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "a/b",
        "a\\b",
        "..",
        ".hidden",
        "-x",
        "a\0b",
        "a\nb",
        "",
        " a",
        "x" * 101,
        "profile",
        7,
        None,
        True,
    ],
)
def test_names_of_stages_are_names_of_folders(name):
    with pytest.raises(ConfigError, match="a stage's name"):
        from_mapping({"stages": [{"name": name, "kind": "align"}]})


@pytest.mark.parametrize("name", ["align", "stage 2", "étape", "a.b-c_d", "7"])
def test_other_names_are_taken(name):
    assert from_mapping({"stages": [{"name": name, "kind": "align"}]}).stages[0].name == name


@pytest.mark.parametrize(
    "raw",
    [
        {"stages": 5},
        {"stages": {}},
        {"stages": ""},
        {"stages": [[]]},
        {"data": 0},
        {"data": []},
        {"data": ""},
        {"preset": ["x"]},
        {"preset": 5},
        {5: {}},
        {"stages": [{"name": "a", "kind": []}]},
        [],
        None,
        5,
    ],
)
def test_other_shapes_are_refused(raw):
    with pytest.raises(ConfigError):
        from_mapping(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"language": {"hidden_size": 130, "num_attention_heads": 4}},
            "hidden_size 130 is not a multiple of num_attention_heads 4",
        ),
        (
            {"language": {"num_query_groups": 3}},
            "num_attention_heads 4 is not a multiple of num_query_groups 3",
        ),
        ({"language": {"kv_channels": 7}}, "RoPE would turn 7 of the 7 channels"),
        (
            {"vision": {"num_attention_heads": 3}},
            "vision hidden_size 64 is not a multiple of its num_attention_heads 3",
        ),
        ({"optimizer": {"min_lr": 1.0}}, "min_lr 1.0 is above lr 2e-05"),
        (
            {"train": {"recompute_granularity": "full", "recompute_num_layers": 3}},
            "recompute_num_layers 3 does not divide the 4 layers",
        ),
        (
            {"moe": {"moe_layer_freq": [0, 0, 0, 0]}, "stages": [{"name": "route"}]},
            "stage 'route': moe_layer_freq lists no MoE layer",
        ),
        ({"stages": [{"name": "align", "min_lr": 1.0}]}, "stage 'align': min_lr 1.0 is above lr"),
    ],
)
def test_fields_that_contradict_each_other(raw, message):
    with pytest.raises(ConfigError) as error:
        from_mapping(raw)
    assert message in str(error.value)


def test_beta_has_the_papers_ranges_and_others_between():
    def ranges(experts: int) -> list[tuple[float, float]]:
        return from_mapping({"moe": {"num_experts": experts}}).moe.evolution_ranges

    assert ranges(1) == []
    assert ranges(4) == [(0.9, 0.99), (0.8, 0.89), (0.7, 0.79)], "the paper's, to the bit"
    for experts in (2, 3, 5, 8, 64, 100):
        found = ranges(experts)
        assert len(found) == experts - 1
        assert all(0 <= low < high <= 1 for low, high in found)
        assert all(later[1] < earlier[0] for earlier, later in itertools.pairwise(found)), (
            "apart, and falling"
        )
        assert found[-1][0] == 0.7
    assert from_mapping({"moe": {"num_experts": 2, "evolution_beta": [[0.5, 0.6]]}}).moe.evolution_ranges == [
        (0.5, 0.6)
    ]
