"""Cosines worked out by hand, and why raw ones say nothing about near-copies."""

import pytest
import torch

from megatron_evomoe.diagnose import similarity
from megatron_evomoe.diagnose.similarity import (
    expert_similarity,
    mean_off_diagonal,
    output_cosines,
    output_similarity,
)


def test_raw_cosine_by_hand():
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    half = 0.5**0.5
    expected = torch.tensor([[1, half, 0], [half, 1, -half], [0, -half, 1]], dtype=torch.float64)
    torch.testing.assert_close(expert_similarity([weights, 3 * weights]), expected.expand(2, 3, 3))


def test_differences_show_what_near_copies_hide():
    torch.manual_seed(0)
    base, moves = torch.randn(10_000), torch.eye(4, 10_000)
    weights = base + moves
    assert mean_off_diagonal(expert_similarity([weights])).item() > 0.999
    # unrelated moves: 0, up to float32 rounding of base + move
    assert expert_similarity([weights], [base])[0][~torch.eye(4, dtype=torch.bool)].abs().max() < 1e-6
    # around their own mean they must sum to zero: −1/(E − 1)
    assert mean_off_diagonal(expert_similarity([weights], "mean")).item() == pytest.approx(-1 / 3, abs=1e-6)


@pytest.mark.parametrize("count", [3, 4])
def test_experts_equal_to_the_reference_are_one_to_each_other(count):
    weights = torch.randn(1, 50).expand(count, 50)
    assert torch.equal(expert_similarity([weights], "mean")[0], torch.ones(count, count, dtype=torch.float64))
    moved = torch.stack([weights[0], weights[0], weights[0] + 1])
    assert expert_similarity([moved], [weights[0]])[0].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_gram_matrices_of_shards_add_up_and_chunks_do_not_matter(monkeypatch):
    weights, reference = torch.randn(3, 101), torch.randn(101)
    whole = similarity.expert_gram(weights, reference)
    parts = sum(
        similarity.expert_gram(w, r) for w, r in zip(weights.split(40, 1), reference.split(40), strict=True)
    )
    torch.testing.assert_close(parts, whole)
    monkeypatch.setattr(similarity, "CHUNK", 7)
    torch.testing.assert_close(similarity.expert_gram(weights, reference), whole)
    torch.testing.assert_close(
        similarity.cosine_from_gram(whole), expert_similarity([weights], [reference])[0]
    )


def test_misuse():
    with pytest.raises(ValueError, match="'median'"):
        expert_similarity([torch.ones(2, 2)], "median")
    with pytest.raises(ValueError, match="2 references for 1 layers"):
        expert_similarity([torch.ones(2, 2)], [torch.ones(2), torch.ones(2)])


def test_output_similarity_averages_over_tokens_then_pairs():
    a, b = [1.0, 0.0], [0.0, 1.0]
    outputs = torch.tensor([[a, a], [a, b], [b, b]])  # [E = 3, T = 2, C = 2]
    assert output_cosines(outputs).tolist() == [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]
    assert output_similarity(outputs).item() == pytest.approx(1 / 3)
    assert output_similarity(outputs * torch.tensor([1.0, 5.0, 0.1])[:, None, None]).item() == pytest.approx(
        1 / 3
    )  # scale-free
    assert output_similarity(outputs[:1]).isnan()
