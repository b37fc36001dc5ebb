"""The evolution rules as formulas, the draws of β, and the checks of a user's settings."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_evomoe.config import ConfigError
from megatron_evomoe.moe import evolution_rules
from megatron_evomoe.moe.evolution_rules import RULES, check_rule, draw_beta, rule_named, validate_ranges

STEPS = 400
RANGE = (0.7, 0.79)
FLOAT64 = {"rtol": 0.0, "atol": 1e-14}
"""Tolerance of float64 over 400 steps; the error measured is 1.2e-15.

Each step rounds by at most three half units in the last place of 0.08 (7e-18 each), 8e-15 in all.
"""


def walk(dtype: torch.dtype = torch.float32, size: int = 4096) -> list[torch.Tensor]:
    """A trajectory of θ_1 over `STEPS` steps, as of an FFN at the paper's learning rate.

    Weights are of order 0.02 and updates of order 2e-5.
    """
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(size, generator=generator, dtype=torch.float64) * 0.02
    drift = torch.randn(size, generator=generator, dtype=torch.float64)
    path = [exact]
    for _ in range(STEPS):
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        path.append(path[-1] + 2e-5 * torch.sign(drift + noise))
    return [theta.to(dtype) for theta in path]


def run(rule: str, path: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """θ_n after the whole path, computed in `dtype`; each step's update serves as its gradient."""
    theta_n = path[0].to(dtype, copy=True)
    for step in range(1, len(path)):
        beta = draw_beta(1, step, 2, 3, *RANGE)
        now, before = path[step].to(dtype), path[step - 1].to(dtype)
        RULES[rule].function(theta_n, now, before, now - before, beta)
    return theta_n


def test_delta_keeps_its_share_of_every_update() -> None:
    """The delta rule computes θ_n = θ(0) + Σ (1−β_t)·Δ_t."""
    path = walk(torch.float64)
    expected = path[0].clone()
    for t in range(1, len(path)):
        expected += (1 - draw_beta(1, t, 2, 3, *RANGE)) * (path[t] - path[t - 1])
    torch.testing.assert_close(run("delta", path, torch.float64), expected, **FLOAT64)
    assert (expected - path[-1]).norm() > 0.5 * (path[-1] - path[0]).norm()  # θ_n differs clearly from θ_1


def test_delta_with_a_constant_beta_telescopes() -> None:
    path, theta_n = walk(torch.float64), walk(torch.float64)[0]
    for before, now in itertools.pairwise(path):
        evolution_rules.delta(theta_n, now, before, None, 0.75)
    torch.testing.assert_close(theta_n, 0.75 * path[0] + 0.25 * path[-1], **FLOAT64)


def test_ema_is_the_weighted_sum_of_the_past() -> None:
    """The ema rule computes θ_n = Π β·θ(0) + Σ_t (1−β_t)·Π_{u>t} β_u · θ_1(t)."""
    path = walk(torch.float64)
    betas = [draw_beta(1, t, 2, 3, *RANGE) for t in range(1, len(path))]
    expected = math.prod(betas) * path[0]
    for t, beta in enumerate(betas):
        expected += (1 - beta) * math.prod(betas[t + 1 :]) * path[t + 1]
    torch.testing.assert_close(run("ema", path, torch.float64), expected, **FLOAT64)


def test_ema_of_a_resting_expert_decays_geometrically() -> None:
    theta_1, theta_n = torch.full((8,), 2.0), torch.full((8,), 3.0)
    for _ in range(10):
        evolution_rules.ema(theta_n, theta_1, None, None, 0.5)
    assert torch.equal(theta_n, torch.full((8,), 2.0 + 0.5**10))  # exact for powers of two


def test_printed_is_the_last_step_only() -> None:
    path = walk(torch.float64)
    beta = draw_beta(1, STEPS, 2, 3, *RANGE)
    expected = beta * path[-1] + (1 - beta) * (path[-1] - path[-2])
    torch.testing.assert_close(run("printed", path, torch.float64), expected, **FLOAT64)


@pytest.mark.parametrize("rule", ["delta", "ema"])
def test_beta_zero_gives_expert_one_and_beta_one_keeps_the_start(rule: str) -> None:
    """Both ends of β match the paper's Tables 3 and 15; dyadic numbers make the arithmetic exact."""
    path = [torch.arange(8.0) * 2**-k for k in range(4)]
    for beta, expected in ((0.0, path[-1]), (1.0, path[0])):
        theta_n = path[0].clone()
        for before, now in itertools.pairwise(path):
            RULES[rule].function(theta_n, now, before, None, beta)
        assert torch.equal(theta_n, expected)


@pytest.mark.parametrize("rule", list(RULES))
def test_fp32_state_over_a_bf16_expert_follows_float64(rule: str) -> None:
    """The fp32 state loses little against float64 over the same bf16-rounded θ_1.

    The worst elements measured over 400 steps, in units of the largest weight (0.07), are: delta 2.9e-7, ema
    1.6e-7, printed 7.0e-8. The bound is three times the worst. State kept in bf16 is worse by four orders of
    magnitude (3e-2, 7e-3, 4e-3), as the last assertion shows.
    """
    path = walk(torch.bfloat16)
    reference = run(rule, path, torch.float64)
    scale = reference.abs().max()
    assert (run(rule, path, torch.float32).double() - reference).abs().max() / scale < 1e-6
    assert (run(rule, path, torch.bfloat16).double() - reference).abs().max() / scale > 1e-3


def test_delta_over_a_bf16_expert_follows_its_master_weights() -> None:
    """θ_n does not accumulate the rounding errors of a bf16 θ_1.

    A bf16 θ_1 moves in steps of one unit in the last place, and θ_n sums these steps. The root mean square
    error measured, in units of θ_1's own rounding error, is 1.03 after 400 steps, 1.12 after 2000 and 1.05
    after 10395; with β of 0.9 to 0.99 it is 1.14, 1.16 and 1.02. The bound is 1.5.
    """
    master, seen = walk(torch.float64), walk(torch.bfloat16)
    error = (
        (run("delta", seen, torch.float32).double() - run("delta", master, torch.float64))
        .square()
        .mean()
        .sqrt()
    )
    assert error < 1.5 * (seen[-1].double() - master[-1]).square().mean().sqrt()


@pytest.mark.parametrize("rule", list(RULES))
def test_bits_are_those_of_single_operations(rule: str) -> None:
    """The rules give the same bits as numpy, which never fuses operations.

    Shards of odd sizes, as in another layout, round as the whole tensor does.
    """
    path = walk(torch.float32, size=1001)
    theta = [t.numpy() for t in path]
    expected = theta[0].copy()
    for step in range(1, len(theta)):
        beta = draw_beta(1, step, 2, 3, *RANGE)
        kept, share, update = np.float32(beta), np.float32(1.0 - beta), theta[step] - theta[step - 1]
        first = {"delta": expected, "ema": expected * kept, "printed": theta[step] * kept}[rule]
        expected = first + (theta[step] if rule == "ema" else update) * share
    assert np.array_equal(run(rule, path, torch.float32).numpy(), expected)
    pieces = [
        run(rule, [t[a:b].clone() for t in path], torch.float32) for a, b in ((0, 7), (7, 130), (130, 1001))
    ]
    assert np.array_equal(torch.cat(pieces).numpy(), expected)


def test_draws_are_uniform_in_their_range() -> None:
    """A Kolmogorov–Smirnov test: D·√n < 1.95 has probability 0.999 for uniform draws.

    The seed is fixed.
    """
    n = 5000
    draws = np.sort([draw_beta(1234, step, 4, 2, 0.8, 0.89) for step in range(n)])
    assert draws.min() >= 0.8 and draws.max() < 0.89
    unit = (draws - 0.8) / 0.09
    assert max(np.max(unit - np.arange(n) / n), np.max(np.arange(1, n + 1) / n - unit)) * math.sqrt(n) < 1.95


def test_draws_differ_by_every_argument_and_by_nothing_else() -> None:
    cases = [
        (s, t, layer, e)
        for s in (0, 1, 2**64 + 1)
        for t in range(6)
        for layer in range(1, 5)
        for e in range(1, 5)
    ]
    draws = {case: draw_beta(*case, 0.0, 1.0) for case in cases}
    assert len(set(draws.values())) == len(cases)
    # Draws do not depend on their order, which differs after a resume.
    for case in reversed(cases):
        assert draw_beta(*case, 0.0, 1.0) == draws[case]
    by_layer = np.array([[draw_beta(1, t, layer, 1, 0.0, 1.0) for t in range(2000)] for layer in (1, 2)])
    assert abs(np.corrcoef(by_layer)[0, 1]) < 4 / math.sqrt(2000)  # four standard errors


def test_draws_are_the_same_on_every_platform() -> None:
    """Draws equal those recorded with numpy 2.4 on x86-64.

    A change would break every resume across versions.
    """
    assert draw_beta(1234, 10, 3, 2, 0.0, 1.0) == 0.23581673371065415
    assert draw_beta(1234, 11, 3, 2, 0.8, 0.89) == 0.8639622587217807


def test_degenerate_range_is_its_value() -> None:
    assert draw_beta(1, 2, 3, 1, 0.5, 0.5) == 0.5


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_one_range_per_evolved_expert(experts: int) -> None:
    validate_ranges(experts, [(0.1, 0.2)] * (experts - 1))
    for wrong in (experts - 2, experts):
        with pytest.raises(ConfigError, match=f"num_experts {experts} evolves {experts - 1}"):
            validate_ranges(experts, [(0.1, 0.2)] * wrong)


def test_one_expert_cannot_evolve() -> None:
    with pytest.raises(ConfigError, match="nothing to evolve"):
        validate_ranges(1, [])


def test_printed_needs_the_whole_gradient() -> None:
    check_rule("printed", use_distributed_optimizer=True, dp_size=1)
    check_rule("printed", use_distributed_optimizer=False, dp_size=2)
    check_rule("delta", use_distributed_optimizer=True, dp_size=2)
    with pytest.raises(ConfigError, match="use_distributed_optimizer: false"):
        check_rule("printed", use_distributed_optimizer=True, dp_size=2)


def test_unknown_rule_is_named() -> None:
    with pytest.raises(ConfigError, match="known: delta, ema, printed"):
        rule_named("emma")
