"""Hand-computed reductions, on one rank and over several."""

import math

import pytest
import torch

from megatron_evomoe.observe import Meter, unpack


def test_each_reduction_over_records():
    meter = Meter()
    meter.record("lm loss", 2.0, weight=3)
    meter.record("lm loss", torch.tensor(4.0), weight=torch.tensor(1))
    for value in (1.0, 5.0, 3.0):
        meter.record("batch-size", value, reduce="sum")
        meter.record("grad-norm", torch.tensor(value), reduce="max")
        meter.record("learning-rate", value, reduce="last")
    assert meter.flush() == {"lm loss": 2.5, "batch-size": 9.0, "grad-norm": 5.0, "learning-rate": 3.0}
    assert meter.flush() == {} and len(meter) == 0


def test_over_ranks_the_mean_is_weighted_by_tokens_and_absent_ranks_do_not_count():
    ranks = [Meter(), Meter(), Meter()]
    for meter, loss, tokens, norm in zip(ranks[:2], (1.0, 3.0), (30, 10), (7.0, 2.0), strict=True):
        meter.record("lm loss", loss, weight=tokens)
        meter.record("norm", norm, reduce="max")
        meter.record("tokens", tokens, reduce="sum")
    ranks[1].record("lr", 0.5, reduce="last")
    names = ["lm loss", "lr", "norm", "tokens", "nobody has this"]
    gathered = torch.stack([m.pack(names)[1] for m in ranks])
    assert unpack(names, gathered) == {"lm loss": 1.5, "lr": 0.5, "norm": 7.0, "tokens": 40.0}


def test_other_names_of_the_same_number_on_another_rank_are_noticed():
    a, b = Meter(), Meter()
    a.record("x", 1.0)
    b.record("y", 1.0)
    names, packed = a.pack()
    with pytest.raises(ValueError, match="different metric names"):
        unpack(names, torch.stack([packed, b.pack()[1]]))


def test_a_value_of_no_weight_neither_counts_nor_poisons():
    meter = Meter()
    meter.record(
        "loss", torch.tensor(float("nan")), weight=torch.tensor(0.0)
    )  # a microbatch without answer tokens
    meter.record("other", float("nan"), weight=0)
    assert all(math.isnan(v) for v in meter.flush().values())
    meter.record("loss", torch.tensor(float("nan")), weight=torch.tensor(0.0))
    meter.record("loss", 2.0, weight=5)
    assert meter.flush() == {"loss": 2.0}


@pytest.mark.parametrize("order", [(1.0, math.nan), (math.nan, 1.0)])
def test_a_nan_is_the_maximum_whatever_the_order(order):
    meter = Meter()
    for value in order:
        meter.record("a", value, reduce="max")
        meter.record("b", torch.tensor(value), reduce="max")
    assert all(math.isnan(v) for v in meter.flush().values())
    gathered = []
    for value in order:
        meter.record("a", value, reduce="max")
        names, packed = meter.pack()
        meter.reset()
        gathered.append(packed)
    assert math.isnan(unpack(names, torch.stack(gathered))["a"])


def test_bf16_losses_are_summed_in_float64():
    meter = Meter()
    for _ in range(1000):  # in bf16 the sum stalls at 256
        meter.record("tokens", torch.tensor(1.0, dtype=torch.bfloat16), reduce="sum")
    assert meter.flush() == {"tokens": 1000.0}


def test_recording_copies_the_tensor_and_reads_nothing_back(monkeypatch):
    buffer = torch.tensor(1.0, dtype=torch.float64)
    meter = Meter()
    for name in ("item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, _refuse)
    meter.record("a", buffer, reduce="last")
    meter.record("b", buffer, weight=buffer)
    meter.record("b", buffer, weight=2.0)
    meter.record("c", buffer, reduce="max")
    meter.record("c", 0.5, reduce="max")
    meter.pack()
    monkeypatch.undo()
    buffer.fill_(9.0)
    assert meter.flush() == {"a": 1.0, "b": 1.0, "c": 1.0}


def _refuse(*_):
    raise AssertionError("a device sync before flush")


def test_misuse_says_what_to_do():
    meter = Meter()
    with pytest.raises(ValueError, match="mean, sum, max, last"):
        meter.record("a", 1.0, reduce="median")
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        meter.record("a", torch.ones(2))
    meter.record("a", 1.0)
    with pytest.raises(ValueError, match="'mean' and now with 'sum'"):
        meter.record("a", 1.0, reduce="sum")
