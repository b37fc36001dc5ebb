"""The learning rate of a stage's first and last step, and what the log says of it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from megatron_evomoe.config import ConfigError
from megatron_evomoe.train.optimizer import build_scheduler, course
from tests.tiny import tiny_config


def schedule(steps: int, **optimizer):
    config = tiny_config(optimizer={"lr": 1.0, "lr_decay_style": "cosine", **optimizer}, train={"train_iters": steps})
    return build_scheduler(SimpleNamespace(param_groups=[{}]), config)


def rates(steps: int, **optimizer) -> list[float]:
    """The rate of each update: the scheduler is stepped after it."""
    scheduler = schedule(steps, **optimizer)
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return found


def cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def test_a_warmup_begins_at_0_and_the_last_step_is_one_short_of_min_lr():
    assert rates(10, lr_warmup_fraction=0.2) == pytest.approx([0, 0.5, 1, *(cosine(i / 8) for i in range(1, 8))])
    assert rates(4, lr_warmup_fraction=0.0) == pytest.approx([cosine(i / 4) for i in range(4)])


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 1.0])
def test_the_shortest_stages_take_a_step_above_0(steps, warmup):
    assert rates(steps, lr_warmup_fraction=warmup)[-1] > 0


def test_more_lr_decay_iters_end_a_stage_at_a_higher_rate():
    assert rates(4, lr_decay_iters=8) == pytest.approx([cosine(i / 8) for i in range(4)])
    assert rates(4, lr_decay_iters=8, lr_warmup_fraction=0.25)[:3] == pytest.approx([0, 0.5, 1]), "a share of lr_decay_iters"


def test_fewer_lr_decay_iters_stay_at_min_lr():
    assert rates(6, lr_decay_iters=3, min_lr=0.25)[2:] == pytest.approx([0.25 + 0.75 * cosine(2 / 3), 0.25, 0.25, 0.25])


def test_min_lr_is_where_the_decay_ends():
    assert rates(100, min_lr=0.5)[-1] == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ConfigError, match=r"min_lr 2\.0 is above lr 1\.0"):
        rates(4, min_lr=2.0)


def test_the_course_in_words():
    scheduler = schedule(10, lr_warmup_fraction=0.2)
    assert course(scheduler, 10) == "lr 0 at step 1, 1 at step 3, 0.0381 at step 10 of 10 (cosine, at min_lr 0 after step 10)"
    assert scheduler.num_steps == 0, "told, not stepped"
    constant = schedule(10, lr_decay_style="constant", lr_warmup_fraction=0.0)
    assert course(constant, 10) == "lr 1 at step 1, 1 at step 10 of 10 (constant)"
