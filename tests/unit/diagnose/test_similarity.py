"""Cosines are compared with hand-worked values; raw cosines say nothing about near-copies."""

import pytest
import torch

from megatron_evomoe.diagnose import similarity
from megatron_evomoe.diagnose.similarity import cosine_from_gram, expert_gram


def cosines(weights, **options):
    return cosine_from_gram(expert_gram(weights, **options))


def off_diagonal(matrix):
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def test_raw_cosine_by_hand():
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    half = 0.5**0.5
    expected = torch.tensor([[1, half, 0], [half, 1, -half], [0, -half, 1]], dtype=torch.float64)
    torch.testing.assert_close(cosines(weights), expected)
    torch.testing.assert_close(cosines(3 * weights), expected)


def test_differences_show_what_near_copies_hide():
    torch.manual_seed(0)
    base, moves = torch.randn(10_000), torch.eye(4, 10_000)
    assert off_diagonal(cosines(base + moves)).mean() > 0.999
    # The differences from the mean sum to zero, so their cosine is −1 / (E − 1), up to the float32 rounding
    # of base + move.
    assert off_diagonal(cosines(base + moves, centred=True)).mean().item() == pytest.approx(-1 / 3, abs=1e-6)


@pytest.mark.parametrize("count", [3, 4])
def test_equal_experts_are_one_to_each_other(count):
    weights = torch.randn(1, 50).expand(count, 50)
    assert torch.equal(cosines(weights, centred=True), torch.ones(count, count, dtype=torch.float64))
    gram = torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 4]], dtype=torch.float64)
    assert cosine_from_gram(gram).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("centred", [False, True])
def test_gram_matrices_of_shards_add_up_and_chunks_do_not_matter(monkeypatch, centred):
    weights = torch.randn(3, 101)
    whole = expert_gram(weights, centred=centred)
    parts = sum(expert_gram(w, centred=centred) for w in weights.split(40, 1))
    torch.testing.assert_close(parts, whole)
    monkeypatch.setattr(similarity, "CHUNK", 7)
    torch.testing.assert_close(expert_gram(weights, centred=centred), whole)
