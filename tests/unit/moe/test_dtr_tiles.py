"""moe/dtr_tiles.py: every token in a slot of a tile of its modality; bf16 products lose nothing but the gradient's bits."""

from __future__ import annotations

import pytest
import torch

from megatron_evomoe.moe import dtr_tiles
from megatron_evomoe.moe.dtr import DtrWeights, HyperWeights, dtr_logits, init_dtr, naive_dtr_logits


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 40, 129])
def test_every_token_has_a_slot_in_a_tile_of_its_modality(T):
    for num_vision in range(T + 1):
        is_vision = torch.zeros(T, dtype=torch.bool)
        is_vision[torch.randperm(T, generator=torch.Generator().manual_seed(num_vision))[:num_vision]] = True
        tiles = dtr_tiles.deal(is_vision)
        rows = len(tiles.token_S) // len(tiles.is_vision_X)
        assert len(tiles.token_S) == rows * len(tiles.is_vision_X) <= T + 2 * rows  # whatever the boundary
        assert torch.equal(tiles.token_S[tiles.slot_T], torch.arange(T))
        assert tiles.exists_S1.sum() == T and tiles.exists_S1[tiles.slot_T].all()
        assert torch.equal(tiles.is_vision_X[tiles.slot_T // rows], is_vision)


def test_little_more_is_multiplied():
    slots = len(dtr_tiles.deal(torch.arange(4096) % 3 == 0).token_S)
    assert slots == 4096 * 9 / 8


def problem(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    T, C, h, r, N = 300, 96, 4, 3, 4
    hypers = [HyperWeights(draw(h, C), draw(h), draw(h + 1, 2 * r, C), draw(h + 1, r, C)) for _ in range(2)]
    weights = DtrWeights(*hypers, draw(N, C))
    init_dtr(weights, phi_std=0.1)
    return draw(T, C), torch.rand(T, generator=generator) < 0.6, weights


def test_bf16_against_float64():
    """Logits as near as from fp32, for products of bf16 numbers are exact in fp32 (worst seen: 7.5e-7 of the largest); gradients
    through the projection are rounded to bf16 first, 2⁻⁹ each, and so is what comes out (worst seen: 1.5e-3 beyond that)."""
    z, is_vision, weights = problem(torch.bfloat16)
    named = {"z": z, **{f"{half}.{n}": w for half in ("text", "vision") for n, w in getattr(weights, half)._asdict().items()},
             "phi": weights.phi_NC}
    doubled = {name: leaf.detach().double().requires_grad_() for name, leaf in named.items()}
    halves = [HyperWeights(*(doubled[f"{half}.{n}"] for n in HyperWeights._fields)) for half in ("text", "vision")]
    exact = DtrWeights(*halves, doubled["phi"])
    logits = dtr_logits(z, is_vision, weights, gather=False)
    wanted = naive_dtr_logits(doubled["z"], is_vision, exact, dtype=torch.float64)
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert logits.dtype == torch.float32 and off(logits, wanted) < 5e-6
    got = torch.autograd.grad((logits * direction.float()).sum(), list(named.values()))
    expected = torch.autograd.grad((wanted * direction).sum(), list(doubled.values()))
    for name, a, b in zip(named, got, expected, strict=True):
        assert a.dtype == torch.bfloat16 and off(a, b) < 2.0**-7, name


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, in units of the largest entry."""
    return float((got.double() - wanted).abs().amax() / wanted.abs().amax())


def test_products_of_bf16_numbers_lose_nothing():
    a, b = torch.randn(3, 5, 64).bfloat16(), torch.randn(3, 64, 7).bfloat16()
    found = dtr_tiles._product(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=0, atol=1e-5)  # bf16 sums would be off by 1e-1
