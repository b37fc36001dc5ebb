"""Configuration: YAML, flags, stages, and the errors that users meet."""

from __future__ import annotations

import argparse

import pytest

from megatron_evomoe.config import ConfigError, add_flags, deprecated, flags_from, from_mapping, load_config
from megatron_evomoe.parallel.degrees import validate

STAGES = [
    {"name": "align", "lr": 1e-3},
    {"name": "tune", "kind": "route", "router": "linear", "train_iters": 7},
]


def parse(*argv: str):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return flags_from(parser.parse_args(argv))


def test_stage_overrides_reach_their_sections():
    config = from_mapping({"optimizer": {"lr": 5e-4}, "stages": STAGES})
    assert config.for_stage("align").optimizer.lr == 1e-3
    tune = config.for_stage("tune")
    assert (tune.optimizer.lr, tune.moe.router, tune.train.train_iters) == (5e-4, "linear", 7)
    assert config.optimizer.lr == 5e-4, "the run's own values stay"


def test_flags_win_over_file_and_stage(tmp_path):
    (tmp_path / "run.yaml").write_text("optimizer: {lr: 1.0e-4}\nstages: [{name: align, lr: 1.0e-3}]\n")
    config = load_config(tmp_path / "run.yaml", parse("--lr", "1e-5", "--vision-hidden-size", "32", "--bf16"))
    assert config.for_stage("align").optimizer.lr == 1e-5
    assert config.vision.hidden_size == 32 and config.language.hidden_size == 128
    assert config.train.bf16 is True


def test_resolved_configuration_reads_back_equal():
    config = from_mapping({"preset": "qwen-1.8b", "stages": STAGES, "moe": {"evolution_beta": [[0.5, 0.6]]}})
    assert from_mapping(config.to_dict()) == config


def test_environment_variables(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(
        "# ${NOT_READ_IN_COMMENTS}\ndata: {tokenizer: '${EVOMOE_TOK}', train_data: ['${EVOMOE_D:-d}/x']}\n"
    )
    with pytest.raises(ConfigError, match=r"EVOMOE_TOK.*does not set"):
        load_config(path)
    monkeypatch.setenv("EVOMOE_TOK", "t.model")
    data = load_config(path).data
    assert (data.tokenizer, data.train_data) == ("t.model", ["d/x"])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"optimiser": {}}, "unknown section 'optimiser' (did you mean 'optimizer'?)"),
        ({"optimizer": {"weight_deacy": 1}}, "'weight_deacy' (did you mean 'weight_decay'?)"),
        ({"stages": [{"name": "align", "train_itres": 3}]}, "'train_itres' (did you mean 'train_iters'?)"),
        ({"stages": [{"name": "x", "kind": "rout"}]}, "(did you mean 'route'?)"),
        ({"preset": "qwen-1.8"}, "(did you mean 'qwen-1.8b'?)"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr = 'fast'"),
        ({"moe": {"router": "dynamic"}}, "moe.router = 'dynamic'"),
        ({"vision": {"image_size": 30}}, "image_size 30 is not a multiple of patch_size 8"),
        ({"data": {"seq_length": 16}}, "one image takes 16 tokens"),
        ({"moe": {"moe_layer_freq": [0, 1]}}, "lists 2 layers, the model has 4"),
        ({"moe": {"evolution_beta": [[0.9, 0.1]]}}, "0 <= low <= high <= 1"),
        ({"stages": [{"name": "align"}, {"name": "align"}]}, "must be unique"),
        (
            {"parallel": {"tensor_model_parallel_size": 0}},
            "parallel.tensor_model_parallel_size = 0: must be at least 1",
        ),
    ],
)
def test_errors_name_the_value_and_the_remedy(raw, message):
    with pytest.raises(ConfigError) as error:
        from_mapping(raw)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("parallel", "moe", "world", "message"),
    [
        (
            {"tensor_model_parallel_size": 3},
            {},
            4,
            "does not divide the 4 ranks of this run; the product must be one of [1, 2, 4]",
        ),
        ({"expert_model_parallel_size": 4}, {}, 2, "EP x expert-TP must be one of [1, 2]"),
        ({"expert_model_parallel_size": 4}, {"num_experts": 6}, 4, "EP must be one of [1, 2, 3, 6]"),
        ({"pipeline_model_parallel_size": 8}, {}, 8, "PP must be one of [1, 2, 4]"),
        ({"tensor_model_parallel_size": 8}, {}, 8, "num_attention_heads 4 cannot be split over TP 8"),
    ],
)
def test_impossible_degrees_say_what_fits(parallel, moe, world, message):
    config = from_mapping({"parallel": parallel, "moe": moe, "train": {"global_batch_size": 8}})
    with pytest.raises(ConfigError) as error:
        validate(config, world)
    assert message in str(error.value)


def test_batch_that_does_not_divide():
    config = from_mapping({"train": {"micro_batch_size": 3, "global_batch_size": 8}})
    with pytest.raises(ConfigError, match="not a multiple of micro_batch_size 3 x data parallel 2 = 6"):
        validate(config, 2)


@pytest.mark.parametrize(
    "typed", ["007", "123", "1e5", "no", "true", "2024-01-01", "a: b", "[abc", "@x", "%d", "#x", "'q'"]
)
def test_text_flags_stay_what_was_typed(typed):
    flags = parse("--wandb-exp-name", typed, "--save", typed, "--train-data", "[007, no]")
    config = from_mapping({}, flags)
    assert (config.log.wandb_exp_name, config.checkpoint.save) == (typed, typed)
    assert config.data.train_data == ["007", "no"]


def test_null_and_nothing_unset_what_may_be_none():
    raw = {"checkpoint": {"save": "x", "load": "y"}, "moe": {"moe_z_loss_coeff": 0.1}}
    config = from_mapping(raw, parse("--save", "", "--load", "null", "--moe-z-loss-coeff", "~"))
    assert (config.checkpoint.save, config.checkpoint.load, config.moe.moe_z_loss_coeff) == (None, None, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train-iters", "true"], "train.train_iters = True: must be a whole number"),
        (["--train-iters", "010"], "train.train_iters = '010'"),
        (["--bf16", "1"], "train.bf16 = 1: must be true or false"),
        (["--train-data", "data/x"], "must be a list"),
        (["--moe-layer-freq", "[0, 1"], "the value of --moe-layer-freq is not valid YAML"),
        (["--lr", "nan"], "optimizer.lr = 'nan': must be a number"),
    ],
)
def test_flags_out_of_range_are_refused_by_name(argv, message):
    with pytest.raises(ConfigError) as error:
        from_mapping({}, parse(*argv))
    assert message in str(error.value)


def test_only_yes_or_no_flags_stand_alone():
    assert parse("--bf16") == {"bf16": True}
    with pytest.raises(SystemExit):
        parse("--save")


def test_a_replaced_value_still_loads(caplog):
    """`dtr_kernel: auto` of version 0.1.0 is accepted in a section, a stage and a flag."""
    deprecated._report.cache_clear()
    stage = {"name": "route", "dtr_kernel": "auto"}
    for raw, flags in (
        ({"moe": {"dtr_kernel": "auto"}}, {}),
        ({}, {"dtr_kernel": "auto"}),
        ({"stages": [stage]}, {}),
    ):
        config = from_mapping(raw, flags)
        config = config.for_stage("route") if config.stages else config
        assert config.moe.dtr_kernel == "torch"
    assert [r.message for r in caplog.records] == [
        "moe.dtr_kernel = auto is read as torch; release 0.3.0 will refuse it, so write torch"
    ]
