"""Counts, divergences, samples and shuffles are compared with cases worked out by hand."""

import math

import pytest
import torch

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.diagnose import routing
from megatron_evomoe.diagnose.routing import LogitSample, ShareCounter, draw_permutations, shuffle_routing

NAN = float("nan")


def one_hot(experts, count):
    return torch.nn.functional.one_hot(torch.tensor(experts), count).bool()


def test_counts_split_by_modality_and_leave_padding_out():
    counter = ShareCounter(num_layers=2, num_experts=3)
    types = torch.tensor([[0, 1, 1], [2, 0, 1]])  # [S, B], the model's layout
    counter.add(1, types, one_hot([0, 2, 2, 1, 0, 1], 3))
    # A top-2 token counts twice, and a dropped token is not counted.
    counter.add(1, torch.tensor([0]), torch.tensor([[False, True, True]]))
    counter.add(1, torch.tensor([0]), torch.zeros(1, 3, dtype=torch.bool))
    assert counter.counts.tolist() == [[[0, 0, 0], [0, 0, 0]], [[2, 1, 1], [0, 1, 2]]]
    shares = counter.shares()
    torch.testing.assert_close(
        shares[1], torch.tensor([[0.5, 0.25, 0.25], [0, 1 / 3, 2 / 3]], dtype=torch.float64)
    )
    assert shares[0].isnan().all()
    counter.reset()
    assert counter.counts.sum() == 0


def test_a_map_of_other_size_than_the_tokens_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 2\); 4 token types and 2 experts"):
        ShareCounter(1, 2).add(0, torch.zeros(2, 2), torch.zeros(3, 2, dtype=torch.bool))


def test_divergence_of_equal_disjoint_and_half_shared():
    shares = torch.tensor(
        [
            [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]],
            [[1.0, 0.0, 0.0], [0.0, 0.25, 0.75]],
            [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]],  # half of each mass shared: 0.5 bit
            [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]],
            [[NAN, NAN, NAN], [0.5, 0.5, 0.0]],
        ]
    )
    by_hand = 0.5 * math.log2(4 / 3) + 0.5 * (0.5 * math.log2(2 / 3) + 0.5 * math.log2(2))
    found = routing.modality_divergence(shares)
    torch.testing.assert_close(found[:4], torch.tensor([0, 1, 0.5, by_hand], dtype=torch.float64))
    assert found[4].isnan()
    # The divergence is symmetric.
    torch.testing.assert_close(found, routing.modality_divergence(shares.flip(1)), equal_nan=True)


def test_overload_and_dead_experts():
    counts = torch.tensor([[[5, 5, 0, 0], [5, 5, 0, 0]], [[2, 2, 2, 1], [2, 2, 2, 3]], [[0] * 4, [0] * 4]])
    overload = routing.max_overload_factor(counts)
    assert overload[:2].tolist() == [2.0, 1.0] and overload[2].isnan()
    assert routing.dead_experts(counts).tolist() == [[False, False, True, True], [False] * 4, [False] * 4]


def test_metric_names_follow_the_layers_of_the_decoder():
    counts = torch.tensor([[[3, 1], [0, 4]], [[2, 2], [0, 0]]])
    metrics = routing.share_metrics(counts, [1, 3])
    assert metrics["moe/share_text/layer_1/expert_0"] == 0.75
    assert metrics["moe/share_vision/layer_1/expert_1"] == 1.0
    # Without image tokens the share is left out; it is not 0.
    assert "moe/share_vision/layer_3/expert_0" not in metrics
    assert metrics["moe/max_overload_factor"] == 1.25
    assert metrics["moe/dead_experts"] == 0.0
    assert "moe/modality_divergence_layer_3" not in metrics


def stream(seed=0, tokens=5000):
    g = torch.Generator().manual_seed(seed)
    types = torch.randint(0, 3, (tokens,), generator=g)
    # A logit holds its token's type and position, so each sampled value can be traced.
    return types, torch.stack([types.double(), torch.arange(tokens).double()], 1)


def test_the_sample_is_bounded_sorted_by_modality_and_deterministic():
    samples = [LogitSample(1, 2, capacity=100, seed=7) for _ in range(2)]
    types, logits = stream()
    for sample in samples:
        for start in range(0, 5000, 500):
            sample.add(0, types[start : start + 500], logits[start : start + 500])
    for modality in (TokenType.TEXT, TokenType.VISION):
        values = samples[0].values(0, modality)
        assert values.shape == (100, 2) and (values[:, 0] == modality).all()
        assert torch.equal(values, samples[1].values(0, modality))
        assert len(values[:, 1].unique()) == 100
        # Uniform samples over the stream have mean 2500 and standard error 5000/√12/√100 = 144.
        assert abs(values[:, 1].mean() - 2500) < 4 * 144
    other = LogitSample(1, 2, capacity=100, seed=8)
    other.add(0, types, logits)
    assert not torch.equal(other.values(0, 0), samples[0].values(0, 0))


def test_few_tokens_are_all_kept():
    sample = LogitSample(2, 2, capacity=10)
    sample.add(1, torch.tensor([0, 1, 2, 0]), torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]]))
    assert sorted(sample.values(1, TokenType.TEXT).tolist()) == [[1, 2], [7, 8]]
    assert sample.values(1, TokenType.VISION).tolist() == [[3, 4]]
    assert sample.values(0, TokenType.TEXT).shape == (0, 2)


def test_merged_ranks_are_one_sample_weighted_by_their_tokens():
    ranks = [LogitSample(1, 1, capacity=200, seed=rank) for rank in range(2)]
    for rank, (sample, tokens) in enumerate(zip(ranks, (9000, 1000), strict=True)):
        sample.add(0, torch.zeros(tokens), torch.full((tokens, 1), float(rank)))
    states = torch.stack([r.state for r in ranks])
    for sample in ranks:
        sample.merge(states)
    values = ranks[0].values(0, TokenType.TEXT)
    assert torch.equal(values, ranks[1].values(0, TokenType.TEXT)) and len(values) == 200
    # Rank 1 has a tenth of the tokens: 20 values are expected, with standard deviation 4.2. Equal weights
    # would give 100.
    assert 3 <= values.sum() <= 40


def test_permuting_swaps_experts_and_keeps_gates():
    routing_map, probs = one_hot([0, 1, 2], 3), torch.diag(torch.tensor([0.5, 0.6, 0.7]))
    moved, gates = shuffle_routing(routing_map, probs, torch.tensor([2, 0, 1]).expand(3, 3))
    assert moved.int().argmax(1).tolist() == [2, 0, 1]
    assert gates.tolist() == torch.tensor([[0, 0, 0.5], [0.6, 0, 0], [0, 0.7, 0]]).tolist()
    assert routing_map.int().argmax(1).tolist() == [0, 1, 2]  # the input is not modified


def test_random_moves_each_token_by_its_own_permutation():
    routing_map = torch.tensor([[True, True, False], [True, True, False], [False, False, False]])
    probs = torch.tensor([[0.6, 0.4, 0], [0.6, 0.4, 0], [0, 0, 0]])
    moved, gates = shuffle_routing(routing_map, probs, torch.tensor([[1, 2, 0], [0, 2, 1], [2, 1, 0]]))
    assert gates.tolist() == torch.tensor([[0, 0.6, 0.4], [0.6, 0, 0.4], [0, 0, 0]]).tolist()
    assert torch.equal(moved, gates > 0)


def test_draws_are_uniform_permutations_from_the_given_generator():
    def draw(seed):
        return draw_permutations(4000, 4, torch.Generator().manual_seed(seed))

    drawn = draw(0)
    assert torch.equal(drawn, draw(0)) and not torch.equal(drawn, draw(1))
    assert torch.equal(drawn.sort(1).values, torch.arange(4).expand(4000, 4))
    # [expert, place]; the standard deviation is √(3/16/4000) = 0.0068.
    where = torch.nn.functional.one_hot(drawn, 4).double().mean(0)
    assert (where - 0.25).abs().max() < 5 * 0.0068


def test_shuffle_misuse():
    with pytest.raises(ValueError, match="shape"):
        shuffle_routing(one_hot([0, 1], 3), torch.zeros(2, 3), torch.tensor([0, 1]))
