"""Which layouts the search considers, refuses, finds too large, and ranks first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_evomoe.config import ConfigError, from_mapping
from megatron_evomoe.plan import layout as layouts
from megatron_evomoe.plan import report, search
from megatron_evomoe.plan.layout import Layout
from megatron_evomoe.plan.step_time import Machine, bubble_ratio

QWEN = {"preset": "qwen-1.8b", "train": {"bf16": True, "micro_batch_size": 4, "global_batch_size": 256}}


def planned(kind: str, nnodes: int = 2, held: dict | None = None, machine: dict | None = None, **sections):
    config = from_mapping({**QWEN, "stages": [{"name": kind}], **sections})
    machine = Machine(**{"nnodes": nnodes, **(machine or {})})
    return search.plan_stage(config, config.stages[0], machine, held)


def held(**fields):
    return {"tp": 1, "pp": 1, "ep": 1, "etp": 1, "layers_per_chunk": None, "recompute": "none", **fields}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tp": 3}, "TP 3 x PP 1 x CP 1 = 3 does not divide the 16 ranks"),
        ({"ep": 8}, "num_experts 4 cannot be split over EP 8"),
        (
            {"pp": 16},
            "num_layers 24 cannot be split over PP 16; PP must be one of [1, 2, 3",
        ),
        (
            {"pp": 2, "layers_per_chunk": 5},
            "num_layers_per_virtual_pipeline_stage 5 must split the 12 layers",
        ),
    ],
)
def test_the_infeasible_is_refused_with_the_reason(fields, reason):
    plan = planned("route", held=held(**fields), machine={"gpus_per_node": 8})
    assert not plan.fits and not plan.too_big
    assert reason in plan.refused[0].example and plan.refused[0].layouts == [Layout(**held(**fields))]


def test_widths_microbatches_and_evolution_are_checked():
    lm = {"language": {"ffn_hidden_size": 5503}}
    assert "ffn_hidden_size 5503" in planned("route", held=held(tp=2), **lm).refused[0].example
    train = {"bf16": True, "micro_batch_size": 4, "global_batch_size": 96}  # 8 replicas, 3 microbatches
    plan = planned("route", held=held(pp=2, layers_per_chunk=4), train=train)
    assert "microbatches (3) in multiples of PP 2" in plan.refused[0].example
    plan = planned("evolve", held=held(), moe={"evolution_rule": "printed"})
    assert "'printed' reads the whole gradient" in plan.refused[0].example
    plan = planned("route", held=held(tp=2), parallel={"sequence_parallel": False})
    assert "mixtures under TP 2 need sequence_parallel" in plan.refused[0].example
    assert planned("warmup", held=held(tp=2), parallel={"sequence_parallel": False}).fits
    plan = planned("route", held=held(tp=2, etp=2), preset="phi-2")
    assert "megatron-core refuses this configuration: Bias in Moe" in plan.refused[0].example


def test_features_of_a_tower_that_trains_are_not_cached():
    data = {"cache_vision_features": True}
    assert planned("align", held=held(), data=data).fits
    with pytest.raises(ConfigError, match="'align' trains the vision tower, so its features cannot be kept"):
        planned("align", data=data, train={**QWEN["train"], "trainable": ["vision"]})


def test_a_refusal_has_one_line_whatever_its_numbers():
    plan = planned("warmup")
    assert len(plan.refused) == len({r.example.split(" does not divide")[-1] for r in plan.refused}) <= 4
    assert sum(len(r.layouts) for r in plan.refused) > 500


def test_memory_is_respected():
    """Every layout that fits stays within the memory limit.

    Fewer layouts fit on cards of 24 GiB than of 80 GiB, and the others exceed the limit.
    """
    large, small = planned("warmup"), planned("warmup", machine={"gpu_memory": 24})
    assert 0 < len(small.fits) < len(large.fits)
    assert all(e.total_bytes <= 24 * 0.9 * 2**30 for e in small.fits)
    assert all(e.total_bytes > 24 * 0.9 * 2**30 for group in small.too_big for e in group.estimates)
    same = {e.layout: e for e in large.fits}
    assert all(same[e.layout] == e for e in small.fits)


@pytest.mark.parametrize(
    ("sections", "fields", "gpu_memory", "remedy"),
    [
        ({}, {}, 16, "recompute_granularity: full"),
        ({}, {"recompute": "full"}, 11, "micro_batch_size: 2"),
        (
            {"parallel": {"use_distributed_optimizer": False}},
            {"recompute": "full"},
            14,
            "use_distributed_optimizer: true",
        ),
        ({}, {"recompute": "full"}, 2, "more TP, PP or EP, or GPUs with more memory"),
    ],
)
def test_a_remedy_makes_it_fit(sections, fields, gpu_memory, remedy):
    """Each named remedy makes the layout fit once it is applied."""
    machine, given = {"gpu_memory": gpu_memory}, held(tp=2, **fields)
    if not fields:
        del given["recompute"]
    plan = planned("warmup", held=given, machine=machine, **sections)
    group = next(
        g for g in plan.too_big if any(e.layout == Layout(**{**held(tp=2), **fields}) for e in g.estimates)
    )
    assert group.remedy == remedy
    if remedy.startswith("more"):
        return
    name, _, value = remedy.partition(": ")
    if name == "recompute_granularity":
        again = planned("warmup", held={**given, "recompute": value}, machine=machine)
    elif name == "micro_batch_size":
        again = planned("warmup", held=given, machine=machine, train={**QWEN["train"], name: int(value)})
    else:
        again = planned("warmup", held=given, machine=machine, parallel={name: True})
    assert again.fits


def test_ranked_by_time_then_memory():
    plan = planned("route")
    keys = [(e.time.total, e.total_bytes) for e in plan.fits]
    assert keys == sorted(keys) and len(keys) > 100


def test_a_slower_network_turns_the_ranking():
    """The ranking depends on the network between nodes.

    Reducing 1.8B gradients over 16 replicas costs more than TP 2 inside a node, unless nodes are connected as
    well as GPUs are.
    """
    slow, fast = (planned("warmup", machine={"inter_bandwidth": b}).fits[0].layout for b in (10, 400))
    assert slow.tp > 1 or slow.pp > 1
    assert (fast.tp, fast.pp) == (1, 1)


def test_thousands_of_gpus():
    """With 512 nodes a batch of 8192 samples allows at most 2048 replicas, and some layouts fit."""
    plan = planned("route", nnodes=512, train={**QWEN["train"], "global_batch_size": 8192})
    assert plan.fits and all(e.data_parallel <= 2048 for e in plan.fits)
    assert any("is not a multiple of micro_batch_size" in r.example for r in plan.refused)


def test_one_set_of_degrees_for_the_whole_run():
    config = from_mapping(
        {**QWEN, "stages": [{"name": "warmup", "train_iters": 10}, {"name": "route", "train_iters": 30}]}
    )
    machine = Machine(nnodes=2)
    plans = [search.plan_stage(config, stage, machine, {"tp": 1}) for stage in config.stages]
    layout, (warmup, route), seconds = search.whole_run(plans)[0]
    assert warmup.layout.degrees == route.layout.degrees == layout.degrees
    assert seconds == pytest.approx(10 * warmup.time.total + 30 * route.time.total)
    every = {p.name: {e.layout.degrees for e in p.fits} for p in plans}
    assert {r[0].degrees for r in search.whole_run(plans)} == every["warmup"] & every["route"]


def test_stages():
    config = from_mapping(
        {**QWEN, "stages": [{"name": "a", "kind": "align"}, {"name": "b", "kind": "route"}]}
    )
    assert [s.kind for s in search.stages_of(config)] == ["align", "route"]
    assert [s.name for s in search.stages_of(config, ["b"])] == ["b"]
    assert [s.kind for s in search.stages_of(from_mapping(QWEN))] == [
        "align",
        "warmup",
        "dense",
        "evolve",
        "route",
    ]
    with pytest.raises(ConfigError, match="no stage 'c'; this run has a, b"):
        search.stages_of(config, ["c"])


def test_applying_and_reading_a_layout_agree():
    config = from_mapping(QWEN)
    for layout in layouts.candidates(config, world_size=16, gpus_per_node=8):
        assert layouts.of_config(layouts.applied(config, layout)) == layout
    always = replace(config, parallel=replace(config.parallel, sequence_parallel=True))
    assert layouts.applied(always, Layout()).parallel.sequence_parallel is None


def test_bubble():
    assert bubble_ratio(1, 1, 8) == 0
    assert bubble_ratio(4, 1, 8) == 3 / 8 and bubble_ratio(4, 2, 8) == 3 / 16


def test_report_names_what_it_ranks_by():
    plan = planned("route", machine={"gpu_memory": 24})
    text = "\n".join(report.lines([plan], Machine(nnodes=2, gpu_memory=24), top=3))
    assert "2 nodes x 8 GPUs x 24 GiB, of which 21.6 GiB" in text and "time: " in text
    assert "Would fit with: " in text and "cannot run: " in text and "as configured: TP 1, PP 1, EP 1" in text
    rows = [line for line in text.splitlines() if " s a step, bubble " in line]
    assert len(rows) == 3 and rows[0].startswith("  1. TP ") and "EP " in rows[0]
    assert (
        text.count("GiB ") >= 3 and text.count("activations ") >= 3 and text.count("gradient reduction ") == 3
    )


def test_context_parallelism_is_refused_as_the_trainer_does():
    """Context parallelism is refused, but its share of the activations is counted.

    The count is for a later version that splits samples over these ranks.
    """
    from megatron_evomoe.plan.activations import activation_bytes

    split, whole = (
        from_mapping(
            {
                "preset": "qwen-1.8b",
                "parallel": {"context_parallel_size": cp},
                "stages": [{"name": "warmup"}],
                "train": {"global_batch_size": 8},
            }
        )
        for cp in (2, 1)
    )
    assert activation_bytes(split, "warmup", 0, 1) < 0.6 * activation_bytes(whole, "warmup", 0, 1)
    with pytest.raises(ConfigError, match="context_parallel_size 2 cannot be used"):
        layouts.check(split, "warmup", 8)
