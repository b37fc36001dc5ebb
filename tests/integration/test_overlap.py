"""A run that gathers weights during the forward pass gives the results of a run that does not.

They are compared in what they save, measure and log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import metrics, run

METRICS = 1e-6
TENSORS = 1e-5


def saved(path: Path) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_plain_tensors(str(path))
    return {k: v for k, v in tensors.items() if torch.is_tensor(v) and not k.startswith("rng.")}


def train(folder: Path, tiny_yaml, **parallel: Any) -> Path:
    stages = [{"name": name, "train_iters": 4} for name in ("warmup", "evolve", "route")]
    path = tiny_yaml(
        folder,
        parallel=parallel,
        stages=stages,
        checkpoint={"save_interval": 1, "keep": 0},
        log={"log_params_norm": True, "log_interval": 2, "moe_metrics_interval": 1},
    )
    run("train", "--config", str(path), processes=2)
    return folder / "run"


@pytest.mark.slow
def test_nothing_reads_weights_that_are_still_on_their_way(tmp_path, tiny_yaml, one_rank):
    """With two replicas, every reader of the weights waits until they are gathered.

    The weights are read by a save within each stage (at step 1, before the norm is logged), a save at its
    end, evolution, and the evaluation.
    """
    runs = []
    for name, overlaps in (("plain", False), ("overlapped", True)):
        (tmp_path / name).mkdir()
        runs.append(
            train(tmp_path / name, tiny_yaml, overlap_param_gather=overlaps, overlap_grad_reduce=overlaps)
        )
    for a, b in zip(*(metrics(folder) for folder in runs), strict=True):
        assert a.keys() == b.keys()
        for name in ("lm loss", "grad-norm", "params-norm", "load_balancing_loss"):
            assert b.get(name, 0) == pytest.approx(a.get(name, 0), rel=METRICS), (a["stage"], a["step"], name)
    for stage in ("warmup", "evolve", "route"):
        for step in (1, 2, 3, 4):
            wanted, got = (saved(folder / stage / f"iter_{step:07d}") for folder in runs)
            assert wanted.keys() == got.keys()
            for name, tensor in wanted.items():
                torch.testing.assert_close(
                    got[name],
                    tensor,
                    rtol=0,
                    atol=TENSORS * float(tensor.abs().max()),
                    msg=f"{stage} {step} {name}",
                )
