"""A layout changes the speed, never the result: every stage under every layout against one rank."""

from __future__ import annotations

import pytest

from tests.distributed.campaign import STAGES, STEPS, Campaign, deviation
from tests.distributed.harness import LAYOUTS

# Summation order differs between layouts. Measured over the whole matrix (docs/layouts.md): metrics 5e-6 relative at most.
METRICS = 5e-5
WIDE = [name for name in LAYOUTS if name != "one rank"]


@pytest.fixture(scope="session")
def campaign(tmp_path_factory) -> Campaign:
    """All stages under all layouts with default options."""
    found = Campaign(tmp_path_factory.mktemp("campaign"))
    found.run_references(list(STAGES))
    found.run_layouts(list(STAGES), WIDE)
    found.run_resumes(list(STAGES), [(layout, "one rank") for layout in WIDE])
    return found


@pytest.mark.parametrize("layout", WIDE)
@pytest.mark.parametrize("stage", STAGES)
def test_layout_agrees_with_one_rank(campaign, stage, layout):
    """Loss, gradient norm, learning rate, token counts, shares by modality and auxiliary losses of each step."""
    assert deviation(campaign.unbroken(stage)[:STEPS], campaign.trained[stage, layout]) < METRICS
