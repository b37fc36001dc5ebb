"""The rules of EvoMoE's expert evolution (Eq. 1), which update experts 2…N from expert 1, and their draws.

Names: θ_1 is the trained FFN, θ_n an evolved expert, θ_1^prev the trained FFN one optimizer step ago, g_1
that step's gradient, β the share of θ_n that is kept. `docs/stages.md` has the formula as printed, the
reason why there are three rules, and measurements. The functions keep no state (`moe/evolving_mlp.py` does)
and do not communicate.

Every operation below is one correctly rounded multiplication, addition or subtraction, so the bits are the
same on every device, vector width and layout. ``add_(…, alpha=…)`` and ``lerp_`` would save a pass over
memory, but torch may round their two operations together (its CPU kernels do so where they can) and does
not say where.

Shape legend: all tensors of one update have the same shape, that of one parameter of an FFN on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_evomoe.config import ConfigError

RuleFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, float], None]


@dataclass(frozen=True)
class Rule:
    """One way to update θ_n after an optimizer step."""

    function: RuleFunction
    """``function(theta_n, theta_1, theta_1_prev, grad, beta)`` updates `theta_n` in place; all are fp32."""
    needs_previous: bool = False
    """Whether `theta_1_prev` is given, for which each layer keeps a copy of θ_1; otherwise it is None."""
    needs_gradient: bool = False
    """Whether `grad` is given, on the condition that `check_rule` states; otherwise it is None."""


def delta(
    theta_n: torch.Tensor,
    theta_1: torch.Tensor,
    theta_1_prev: torch.Tensor | None,
    grad: torch.Tensor | None,
    beta: float,
) -> None:
    """θ_n ← θ_n + (1−β)·(θ_1 − θ_1^prev): the share 1−β of every update.

    β = 0 gives θ_1, and β = 1 the FFN that the stage started from.
    """
    assert theta_1_prev is not None
    theta_n.add_((theta_1 - theta_1_prev).mul_(1.0 - beta))


def ema(
    theta_n: torch.Tensor,
    theta_1: torch.Tensor,
    theta_1_prev: torch.Tensor | None,
    grad: torch.Tensor | None,
    beta: float,
) -> None:
    """θ_n ← β·θ_n + (1−β)·θ_1: a running average of θ_1. β = 0 gives θ_1."""
    theta_n.mul_(beta).add_(theta_1 * (1.0 - beta))


def printed(
    theta_n: torch.Tensor,
    theta_1: torch.Tensor,
    theta_1_prev: torch.Tensor | None,
    grad: torch.Tensor | None,
    beta: float,
) -> None:
    """θ_n ← β·θ_1 + (1−β)·g_1: Eq. 1 as the paper prints it. θ_n keeps nothing of its past."""
    assert grad is not None
    torch.mul(theta_1, beta, out=theta_n).add_(grad * (1.0 - beta))


RULES: dict[str, Rule] = {
    "delta": Rule(delta, needs_previous=True),
    "ema": Rule(ema),
    "printed": Rule(printed, needs_gradient=True),
}


def rule_named(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RULES:
        raise ConfigError(f"unknown evolution_rule {name!r}; known: {', '.join(RULES)}")
    return RULES[name]


def draw_beta(seed: int, step: int, layer: int, expert: int, low: float, high: float) -> float:
    """β of one expert at one step, uniform in [low, high): a function of its arguments alone.

    The counter-based generator Philox-4x64-10 (Salmon et al., 2011) is keyed with `seed`; its 256-bit counter
    is (step, layer, expert, 0), and 53 bits of its first output word are the fraction. So every rank draws
    the same β without communication, a resumed run continues the sequence, and no draw depends on the draws
    before it. numpy guarantees these raw words on all platforms (NEP 19).

    Args:
        seed: the run's seed, 0 ≤ seed < 2¹²⁸.
        step: optimizer step, from 0 or 1 as the loop counts, never negative.
        layer: global layer number, from 1.
        expert: global expert index, from 0 (expert 0 is θ_1, for which nothing is drawn).
        low: lower end of the expert's range.
        high: upper end of the expert's range.
    """
    word = np.random.Philox(key=seed, counter=[step, layer, expert, 0]).random_raw()
    return low + (high - low) * ((int(word) >> 11) * 2.0**-53)


def validate_ranges(num_experts: int, ranges: Sequence[tuple[float, float]]) -> None:
    """Check that there is one range for each of the N − 1 evolved experts.

    Raises:
        ConfigError: there are more or fewer, or no expert to evolve.
    """
    if num_experts < 2:
        raise ConfigError(f"num_experts {num_experts} leaves nothing to evolve; use at least 2")
    if len(ranges) != num_experts - 1:
        raise ConfigError(
            f"evolution_beta has {len(ranges)} ranges, but num_experts {num_experts} evolves "
            f"{num_experts - 1} experts (expert 1 is trained); give one [low, high] each for experts 2 to "
            f"{num_experts}"
        )


def check_rule(rule: str, use_distributed_optimizer: bool, dp_size: int) -> None:
    """Check that every rank has what `rule` reads.

    Args:
        dp_size: number of ranks over which gradients are reduced: data-parallel times context-parallel size.

    Raises:
        ConfigError: the rule reads the whole gradient, of which each rank has a shard.
    """
    if rule_named(rule).needs_gradient and use_distributed_optimizer and dp_size > 1:
        raise ConfigError(
            f"evolution_rule {rule!r} reads the whole gradient of expert 1, but use_distributed_optimizer "
            f"with data-parallel size {dp_size} leaves each rank only its shard; set "
            "use_distributed_optimizer: false, or use 'delta' or 'ema'"
        )
