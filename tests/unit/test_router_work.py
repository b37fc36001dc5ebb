"""The counts of benchmarks/router_work.py are right.

Its FLOP are compared with torch's counter on the forms that are timed, and its bytes with the tensors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TORCH_FORMS = ["linear", "naive", "naive-tuned", "autograd", "masked", "factored", "ffn"]
SIZES = dict(T=37, C=24, h=3, r=5, N=4, ffn=11)
IN_PLACE = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
"""A product that the counter does not know."""


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """Make the folder of scripts importable, as it is when a script runs."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def subjects(dtype: str, shape):
    import router

    return router.make_subjects(
        argparse.Namespace(dtype=dtype, subjects=TORCH_FORMS, vision_share=0.5), shape
    )


@pytest.mark.parametrize("subject", TORCH_FORMS)
def test_flop_are_those_that_torch_counts(subject):
    import router
    import router_work

    shape = router_work.Shape(**SIZES)
    forwards, _, _ = subjects("fp32", shape)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        router.run_once(forwards[subject])
    assert counter.get_total_flops() == router_work.flop(subject, shape)


class Products(TorchDispatchMode):
    """Records the dtypes of the factors of each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name.removeprefix("aten::") in ("mm", "bmm", "addmm", "addmm_"):
            self.dtypes |= {tensor.dtype for tensor in args}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("subject", TORCH_FORMS)
def test_products_are_of_the_type_whose_ceiling_is_taken(subject):
    import measure
    import router
    import router_work

    forwards, _, _ = subjects("bf16", router_work.Shape(**SIZES))
    with Products() as products:
        router.run_once(forwards[subject])
    assert products.dtypes == {measure.DTYPES[router_work.precision(subject, "bf16")]}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("subject", ["linear", "factored", "naive", "ffn"])
def test_bytes_are_those_of_the_tensors(subject, dtype):
    """Every tensor is read once per pass, and its gradient is written once.

    The Θ of the naive forms is counted by hand.
    """
    import router_work

    shape = router_work.Shape(**SIZES)
    forwards, (z, gate, *dtr_weights), frozen = subjects(dtype, shape)
    trained = {"linear": [gate], "ffn": []}.get(subject, dtr_weights)
    expected = 3 * sum(tensor.nbytes for tensor in (z, *trained)) + 2 * forwards[subject]().nbytes
    if subject == "ffn":
        expected += 2 * sum(tensor.nbytes for tensor in frozen)
    if subject == "naive":
        of_a_token = (2 * shape.r + shape.r) * shape.C * 4  # Θ_down and Θ_up, fp32
        expected += (3 + 2) * shape.T * of_a_token  # Θ written and read twice, its gradient written and read
    assert router_work.traffic(subject, shape, dtype) == expected


def test_the_documented_example():
    """The numbers of docs/router.md hold.

    One product of the projection is 38 GFLOP; a step has three of them, or six where all tokens go through
    both hypernetworks.
    """
    import router_work

    shape = router_work.Shape(T=16384, C=2048, h=16, r=16, N=4, ffn=5504)
    product = 2 * shape.T * shape.projected * shape.C
    assert round(product / 1e9) == 38
    factored, masked = (router_work.flop(subject, shape) for subject in ("factored", "masked"))
    assert router_work.flop("fused", shape) == factored
    assert masked - factored == pytest.approx(3 * product, rel=0.01)  # and a second φ·Θ_up on every token
