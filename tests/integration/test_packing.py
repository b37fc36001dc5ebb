"""Runs whose microbatches are sorted or packed take the steps of runs that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import metrics, run

SAME_LOSS = 2e-6
"""Largest difference of a loss of about 5 in float32, sums taken in another order; measured: 5e-7."""
_LAYOUTS = {
    "one rank": (0, {}),
    "DP 2": (2, {}),
    "PP 2": (2, {"pipeline_model_parallel_size": 2}),
    "TP 2": (2, {"tensor_model_parallel_size": 2}),
}


def losses(tiny_yaml, folder: Path, packing: str, layout: str = "one rank", *flags: str) -> list[float]:
    folder.mkdir(exist_ok=True)
    processes, parallel = _LAYOUTS[layout]
    config = tiny_yaml(
        folder,
        stages=[{"name": "warmup"}],
        data={"packing": packing, "eval_data": [], "num_workers": 1},
        parallel=parallel,
        log={"log_interval": 1},
        train={"train_iters": 4},
    )
    run("train", "--config", str(config), *flags, processes=processes)
    return [line["lm loss"] for line in metrics(folder / "run")]


@pytest.fixture(scope="module")
def plain(tiny_yaml, tmp_path_factory) -> list[float]:
    return losses(tiny_yaml, tmp_path_factory.mktemp("plain"), "none")


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        ("sort", "one rank"),
        ("pack", "DP 2"),
        *(
            pytest.param(packing, layout, marks=pytest.mark.slow)
            for packing in ("sort", "pack")
            for layout in ("PP 2", "TP 2")
        ),
    ],
)
def test_same_steps(tiny_yaml, tmp_path, plain, packing, layout):
    assert losses(tiny_yaml, tmp_path, packing, layout) == pytest.approx(plain, abs=SAME_LOSS)


def test_packing_may_change_at_a_resume(tiny_yaml, tmp_path, plain):
    losses(tiny_yaml, tmp_path, "sort", "one rank", "--exit-interval", "1")
    found = losses(tiny_yaml, tmp_path, "pack")
    assert found == pytest.approx(plain, abs=SAME_LOSS)
