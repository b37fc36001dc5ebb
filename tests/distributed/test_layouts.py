"""A layout changes the speed, never the result: every stage under every layout is compared with one rank.

Every difference comes from the order of summation in fp32. Measured over the whole matrix (docs/layouts.md),
metrics differ by at most 8e-7, relative, with default options, and by at most 5.4e-6 with other options and
after a change of layout; tensors differ by at most 5e-5 of their largest entry. The bounds leave a factor of
ten for other processors.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.campaign import STAGES, STEPS, Campaign, deviation
from tests.distributed.harness import COMBINED, LAYOUTS

METRICS = 1e-5
METRICS_OF_OPTIONS = 5e-5
TENSORS = 5e-4
WIDE = [name for name in LAYOUTS if name != "one rank"]
RESUMED = ["warmup", "evolve", "route, dtr", "route, experts too"]
MATRIX = ["warmup", "evolve", "route, linear", "route, dtr"]
OPTIONS: dict[str, dict[str, Any]] = {
    f"{recompute}, {'distributed' if distributed else 'plain'} optimizer": {
        "train": train,
        "parallel": {"use_distributed_optimizer": distributed},
    }
    for (recompute, train), distributed in itertools.product(
        {
            "no recompute": {},
            "full recompute": {"recompute_granularity": "full"},
            "selective recompute": {
                "recompute_granularity": "selective",
                "recompute_modules": ["core_attn", "moe"],
            },
        }.items(),
        (True, False),
    )
    if recompute != "no recompute" or not distributed
} | {f"{size} rows a microbatch": {"train": {"micro_batch_size": size}} for size in (1, 4)}

# head counts that TP 4 can split
HEADS = {
    "language": {"num_attention_heads": 8, "num_query_groups": 4},
    "vision": {"num_attention_heads": 4},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "two of 8, capacity 0.6": {
        "moe": {"num_experts": 8, "moe_router_topk": 2, "moe_expert_capacity_factor": 0.6},
        "optimizer": {"lr": 1e-4, "adam_eps": 1e-6},
    },
    "two of 8, capacity 0.6, full recompute, one row": {
        "moe": {"num_experts": 8, "moe_router_topk": 2, "moe_expert_capacity_factor": 0.6},
        "train": {"recompute_granularity": "full", "micro_batch_size": 1},
        "optimizer": {"lr": 1e-4, "adam_eps": 1e-6},
    },
}
SOME = ["TP 2", "TP 2 x ETP 2", "TP 2 x EP 2", "TP 2 x EP 2 x ETP 2", "PP 2, 2 chunks x DP 2, overlapped"]
"""Layouts for stages that differ from another stage only in the router or its capacity."""
IN_SOME = ["route, capacity", "route, cosine"]
FORMS: dict[str, dict[str, Any]] = {
    "sort": {"packing": "sort"},
    "pack": {"packing": "pack"},
    "pack, with empty microbatches": {"packing": "pack", "packing_replicas": 8},
}
IN_FORMS = ["warmup", "route, dtr", "route, experts too", "route, capacity"]
SOME_FORMS = ["one rank", "DP 2, overlapped", "PP 2, 2 chunks", "TP 2 x EP 2", "PP 2 x EP 2"]
"""Layouts in which each form of microbatches is compared; the others are compared by the slow tests."""
TRAINED = [(stage, layout) for stage in STAGES for layout in (SOME if stage in IN_SOME else WIDE)]


@pytest.fixture(scope="session")
def campaign(tmp_path_factory) -> Campaign:
    """Train all stages under all layouts, and resume every stage from and on one rank."""
    found = Campaign(tmp_path_factory.mktemp("campaign"))
    found.run_references(list(STAGES))
    found.run_pairs(TRAINED)
    found.run_resumes(
        RESUMED, [("one rank", layout) for layout in WIDE] + [(layout, "one rank") for layout in WIDE]
    )
    return found


@pytest.mark.parametrize(("stage", "layout"), TRAINED)
def test_layout_agrees_with_one_rank(campaign, stage, layout):
    """Compare the metrics of each step.

    They are loss, gradient norm, learning rate, token counts, shares by modality and auxiliary losses.
    """
    assert deviation(campaign.unbroken(stage)[:STEPS], campaign.trained[stage, layout]) < METRICS


@pytest.mark.parametrize("layout", WIDE)
@pytest.mark.parametrize("stage", RESUMED)
def test_state_moves_from_and_to_one_rank(campaign, stage, layout):
    """A stage resumed under another layout continues like the run that was never stopped."""
    for pair in [("one rank", layout), (layout, "one rank")]:
        assert deviation(campaign.unbroken(stage)[STEPS:], campaign.resumed[(stage, *pair)]) < METRICS, pair


@pytest.mark.parametrize(("stage", "layout"), TRAINED)
def test_checkpoints_hold_the_same_tensors(campaign, one_rank, stage, layout):
    """Weights, evolved experts and both Adam moments have equal names, shapes and values."""
    wanted, got = saved(campaign, stage, "one rank"), saved(campaign, stage, layout)
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert got[name].shape == tensor.shape, name
        # Adam divides by the root of the second moment, so where a gradient is all rounding, so is the update
        bound = TENSORS * float(tensor.abs().max())
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def saved(campaign: Campaign, stage: str, layout: str) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, unsharded, except the states of the random number generators."""
    from megatron.core import dist_checkpointing

    from megatron_evomoe.checkpoint import find
    from megatron_evomoe.checkpoint.reader import safe_reads

    with safe_reads():
        tensors = dist_checkpointing.load_plain_tensors(str(find.resolve(campaign.checkpoint(stage, layout))))
    return {k: v for k, v in tensors.items() if torch.is_tensor(v) and not k.startswith("rng.")}


@pytest.fixture(scope="session")
def dealt(tmp_path_factory, campaign) -> Callable[[str], Campaign]:
    """The stages trained on the same samples in other forms, from the same checkpoints."""

    @functools.cache
    def found(form: str) -> Campaign:
        forms = Campaign(tmp_path_factory.mktemp("dealt"), {"data": FORMS[form]}, start=campaign)
        forms.run_pairs([(stage, layout) for stage in IN_FORMS for layout in SOME_FORMS])
        return forms

    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", SOME_FORMS)
@pytest.mark.parametrize("stage", IN_FORMS)
def test_the_form_of_microbatches_changes_nothing(campaign, dealt, form, layout, stage):
    """Rows of their own length, packed rows, and additional empty microbatches give one rank's padded run.

    Loss, gradient norm, routing shares and auxiliary losses of each step are compared.
    """
    wanted, got = campaign.unbroken(stage)[:STEPS], dealt(form).trained[stage, layout]
    assert deviation(wanted, got) < METRICS


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_options_agree_with_one_rank(tmp_path, option, row):
    """Layouts agree with recomputation, without the distributed optimizer, and with other microbatches."""
    found = Campaign(tmp_path, OPTIONS[option])
    layouts = [name for name in WIDE if LAYOUTS[name].takes(OPTIONS[option])]
    found.run_references(MATRIX)
    found.run_layouts(MATRIX, layouts)
    report(
        row,
        option,
        {
            (stage, layout): deviation(found.unbroken(stage)[:STEPS], found.trained[stage, layout])
            for stage, layout in itertools.product(MATRIX, layouts)
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_forms_agree_under_every_layout(tmp_path, size, row):
    """Each form against one rank's padded run; of one row a microbatch, each packed row is one sample."""
    train = {"train": {"micro_batch_size": size}}
    padded, stages = Campaign(tmp_path / "padded", train), [*MATRIX, "route, experts too", "route, capacity"]
    padded.run_references(stages)
    layouts = [name for name in LAYOUTS if LAYOUTS[name].takes(train)]
    for form, data in FORMS.items():
        found = Campaign(tmp_path / form.replace(" ", ""), {"data": data, **train}, start=padded)
        found.run_layouts(stages, layouts)
        deviations = {
            (stage, layout): deviation(padded.unbroken(stage)[:STEPS], found.trained[stage, layout])
            for stage, layout in itertools.product(stages, layouts)
        }
        report(row, f"{form}, {size} rows a microbatch", deviations)


@pytest.mark.slow
@pytest.mark.parametrize("source", WIDE)
def test_state_moves_between_any_two_layouts(campaign, source, row):
    pairs = [(source, layout) for layout in WIDE]
    campaign.run_resumes(RESUMED, pairs)
    report(
        row,
        f"{source} →",
        {
            (stage, to): deviation(campaign.unbroken(stage)[STEPS:], campaign.resumed[stage, source, to])
            for stage, (_, to) in itertools.product(RESUMED, pairs)
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("experts", EXPERTS)
def test_combined_layouts_agree_with_one_rank(tmp_path, experts, row):
    """Combined degrees agree with one rank in settings that depend on how tokens are laid out on ranks.

    State is also moved from one rank to these layouts and back.
    """
    found = Campaign(tmp_path, HEADS | EXPERTS[experts])
    stages = ["warmup", *RESUMED[1:]] if experts == "as they are" else RESUMED[2:]
    layouts = [name for name in COMBINED if COMBINED[name].takes(EXPERTS[experts])]
    found.run_references(stages)
    found.run_layouts(stages, layouts)
    deviations = {
        (stage, layout): deviation(found.unbroken(stage)[:STEPS], found.trained[stage, layout])
        for stage, layout in itertools.product(stages, layouts)
    }
    if experts == "as they are":
        pairs = [("one rank", layout) for layout in layouts] + [(layout, "one rank") for layout in layouts]
        found.run_resumes(["route, experts too"], pairs)
        deviations |= {
            ("moved", f"{source} to {to}"): deviation(found.unbroken(stage)[STEPS:], steps)
            for (stage, source, to), steps in found.resumed.items()
        }
    report(row, f"combined, {experts}", deviations)


def report(row: Callable[[str], None], what: str, deviations: dict[tuple[str, str], float]) -> None:
    """Record a row of the table in docs/layouts.md and assert that the deviations are within the bound."""
    worst = max(deviations, key=lambda place: deviations[place])
    row(f"| {what} | {len(deviations)} | {deviations[worst]:.1e} | {', '.join(worst)} |")
    assert deviations[worst] < METRICS_OF_OPTIONS, {
        place: d for place, d in deviations.items() if not d < METRICS_OF_OPTIONS
    }
