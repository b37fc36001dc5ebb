"""The example in docs/stages.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_evomoe.moe.evolution_rules import RULES

DOCS = Path(__file__).parents[3] / "docs" / "stages.md"


@pytest.mark.usefixtures("one_rank")
def test_a_new_rule_takes_ten_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.moe import evolution_models as models

    monkeypatch.setattr("megatron_evomoe.moe.evolution_rules.RULES", dict(RULES))
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(code, {})
    module = models.evolving_mlp(models.transformer_config(), models.moe_config("overshoot", 2, [(0.5, 0.5)]))
    models.train(module, range(3))
    ((_, tensors),) = module.local_experts()
    for name, p in module.named_parameters():
        start = models.full_update(name, 0, tuple(p.shape))
        # θ_n moves by 1.5 times what θ_1 moved. Two additions of numbers around 0.5 round by two half units
        # in the last place: 6e-8.
        torch.testing.assert_close(tensors[name] - start, 1.5 * (p.detach() - start), rtol=0, atol=2e-7)
