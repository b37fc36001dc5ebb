"""Two tensor-parallel ranks with sequence parallelism agree with one rank.

Compared are logits, features, losses of a packed row and gradients of replicated weights. On CPU in fp32 the
largest difference measured is 8e-7 of the largest value (sums in another order). A missing reduction of a
norm's gradient would show as a difference of order 1.
"""

from __future__ import annotations

import torch

from tests import programs
from tests.unit.model import tensor_parallel_worker


def test_tp2_equals_tp1(tmp_path, one_rank):
    log = tmp_path / "log.txt"
    worker = "tests.unit.model.tensor_parallel_worker"
    ranks = programs.start_ranks(2, "-m", worker, "2", str(tmp_path / "two.pt"), output=log)
    one = tensor_parallel_worker.cases(1)
    assert programs.wait(ranks, timeout=300) == [0, 0], log.read_text()[-6000:]
    two = torch.load(tmp_path / "two.pt")
    assert one.keys() == two.keys() and len(one) > 15
    for name, wanted in one.items():
        assert two[name].shape == wanted.shape, name
        if wanted.numel():
            error = (two[name] - wanted).abs().max() / wanted.abs().max()
            assert error < 5e-6, f"{name}: {error:.1e}"
