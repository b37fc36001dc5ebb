"""Rates after a resume follow the current configuration, or else the checkpoint's schedule.

In the first case they are those of a run that had the current configuration from its start.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import RunConfig
from megatron_evomoe.train.optimizer import Schedule, build_scheduler
from tests.tiny import tiny_config

BASE = tiny_config()
KEEP = {"use_checkpoint_opt_param_scheduler": True}


def schedule(config: RunConfig, steps: int = 0) -> Schedule:
    """The schedule of a run that has done `steps`.

    It uses a real optimizer whose parameter groups have megatron-core's keys.
    """
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [torch.nn.Parameter(torch.zeros(1))],
                "max_lr": config.optimizer.lr,
                "min_lr": config.optimizer.min_lr,
            }
        ]
    )
    found = build_scheduler(optimizer, config)  # type: ignore[arg-type]
    found.step(steps)
    return found


def state(found: Schedule) -> tuple[float, float]:
    group = found.optimizer.param_groups[0]
    return group["lr"], group["weight_decay"]


@st.composite
def configs(draw) -> RunConfig:
    lr = draw(st.sampled_from([1e-3, 2e-3, 0.5]))
    optimizer = dataclasses.replace(
        BASE.optimizer,
        lr=lr,
        min_lr=draw(st.sampled_from([0.0, lr / 10])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        lr_decay_style=draw(st.sampled_from(["cosine", "linear", "constant", "inverse-square-root"])),
        lr_warmup_fraction=draw(st.sampled_from([0.0, 0.1, 0.5])),
    )
    return dataclasses.replace(
        BASE, optimizer=optimizer, train=dataclasses.replace(BASE.train, train_iters=draw(st.integers(1, 30)))
    )


@settings(derandomize=True, deadline=None, max_examples=200)
@given(configs(), configs(), st.integers(0, 30))
def test_a_resumed_schedule_is_that_of_a_run_so_configured_from_its_start(old, new, done):
    resumed, unbroken = schedule(new), schedule(new, done)
    resumed.load_state_dict(schedule(old, done).state_dict())
    for _ in range(5):
        assert state(resumed) == state(unbroken)
        resumed.step(1)
        unbroken.step(1)
    expected = {
        "max_lr": old.optimizer.lr != new.optimizer.lr,
        "lr_decay_style": old.optimizer.lr_decay_style != new.optimizer.lr_decay_style,
        "start_wd": old.optimizer.weight_decay != new.optimizer.weight_decay,
        "lr_decay_steps": old.train.train_iters != new.train.train_iters,
    }
    assert {name: name in resumed.changed for name in expected} == expected
    assert bool(str(resumed)) == bool(resumed.changed)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(configs(), configs(), st.integers(0, 30))
def test_the_checkpoints_schedule_goes_on_or_is_refused_where_it_ends_early(old, new, done):
    new = dataclasses.replace(new, optimizer=dataclasses.replace(new.optimizer, **KEEP))
    resumed, unbroken = schedule(new), schedule(old, done)
    if old.train.train_iters < new.train.train_iters and old.optimizer.lr_decay_style != "constant":
        with pytest.raises(
            CheckpointError, match=f"schedule ends at step {old.train.train_iters}, and steps"
        ):
            resumed.load_state_dict(unbroken.state_dict())
        return
    resumed.load_state_dict(unbroken.state_dict())
    for _ in range(5):
        assert state(resumed) == state(unbroken)
        resumed.step(1)
        unbroken.step(1)


def test_more_steps_are_never_silently_at_rate_zero():
    old, new = (
        dataclasses.replace(
            BASE,
            train=dataclasses.replace(BASE.train, train_iters=n),
            optimizer=dataclasses.replace(BASE.optimizer, lr_decay_style="cosine", min_lr=0.0),
        )
        for n in (10, 20)
    )
    resumed = schedule(new)
    resumed.load_state_dict(schedule(old, 10).state_dict())
    rates = []
    for _ in range(10):
        rates.append(state(resumed)[0])
        resumed.step(1)
    assert min(rates) > 0 and rates == sorted(rates, reverse=True)
    assert "lr_decay_steps 10 → 20" in str(resumed)
