"""The features of images reach their positions, their gradients come back, and the host waits for neither."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_evomoe.config.recipe import PARTS
from megatron_evomoe.model.splice import splice
from tests.tiny import rows, tiny_config

SYNCHRONISES = ("_local_scalar_dense", "nonzero", "masked_s", "is_nonzero", "unique", "repeat_interleave")
"""Operators whose result's shape or value the host reads, so that it waits for the device."""


class Watch(TorchDispatchMode):
    """Records the operators of `SYNCHRONISES` that are called, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            torch.is_tensor(index) and index.dtype == torch.bool for index in tree_leaves(args[1:])
        )
        if by_mask or name.startswith(SYNCHRONISES):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@st.composite
def cases(draw):
    """Number of images, positions of each, and which positions [b, s] they take."""
    t, n = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    b = draw(st.integers(1, 3))
    s = draw(st.integers(-(-max(1, n * t) // b), 12))
    chosen = draw(st.permutations(range(b * s)))[: n * t]
    marked = torch.zeros(b * s, dtype=torch.bool)
    marked[list(chosen)] = True
    return n, t, marked.view(b, s)


@given(cases(), st.integers(0, 99))
def test_equals_masked_scatter(case, seed):
    """Values and gradients are those of `masked_scatter`, to the bit."""
    n, t, is_vision = case
    b, s = is_vision.shape
    g = torch.Generator().manual_seed(seed)
    words = torch.randn(s, b, 2, generator=g, dtype=torch.float64, requires_grad=True)
    features = torch.randn(n, t, 2, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(s, b, 2, generator=g, dtype=torch.float64)
    scattered = words.transpose(0, 1).masked_scatter(is_vision.unsqueeze(-1), features).transpose(0, 1)
    spliced = splice(words, is_vision, features)
    assert torch.equal(spliced, scattered)
    wanted, got = (
        torch.autograd.grad((result * weights).sum(), [words, features]) for result in (scattered, spliced)
    )
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("marked", [3, 5])
def test_another_number_of_positions_is_refused(marked):
    is_vision = (torch.arange(8) < marked).view(1, 8)
    with pytest.raises(RuntimeError, match="vision positions and features differ in number"):
        splice(torch.zeros(8, 1, 2), is_vision, torch.zeros(2, 2, 2))


@pytest.mark.parametrize("images", [[1, 0, 2], [0, 0, 0]])
def test_embedding_never_waits_for_the_device(one_rank, images):
    """Neither forward nor backward of the embedding reads a device value, with everything trained."""
    from megatron_evomoe.train.built import build_stage

    config = tiny_config("warmup", train={"trainable": list(PARTS)})
    model = build_stage(config, config.stages[0]).modules[0]
    batch = rows(images)
    with Watch() as watch:
        hidden = model.embed(batch["tokens"], batch["token_types"], batch["images"])
        hidden.sum().backward()
    assert not watch.found


def test_the_watch_sees_what_it_is_to_see():
    values, mask = torch.zeros(4, requires_grad=True), torch.tensor([True, False, True, False])
    with Watch() as watch:
        values.masked_scatter(mask, torch.ones(2, requires_grad=True)).sum().backward()
    assert watch.found == ["masked_scatter", "masked_scatter_backward"]
    with Watch() as watch:
        int(values.detach()[mask].sum())
    assert watch.found == ["index", "_local_scalar_dense"]
