"""The benchmarks' peer is the same model as ours, and the benchmarks fit models to a device's memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_evomoe.config import from_mapping
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.parallel import topology

pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """Make the benchmarks' folder importable, as it is for the scripts themselves."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def test_both_ways_to_dispatch_agree():
    import peer_model

    torch.manual_seed(0)
    tokens, experts = (
        torch.randn(23, 8, requires_grad=True),
        torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(5)),
    )
    weights, chosen = torch.rand(23, 5).softmax(-1).topk(2)
    # the last expert gets no token, and some tokens have the same expert twice
    chosen = chosen.clamp(max=3)
    results = []
    for dispatch in peer_model.DISPATCH.values():
        out = dispatch(tokens, weights, chosen, experts)
        results.append((out, torch.autograd.grad(out.square().sum(), [tokens, experts[0].weight])))
    for a, b in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("one_rank")
def test_the_peer_computes_our_loss():
    import peer_model
    import shapes

    from megatron_evomoe.model.build import build_modules

    base = shapes.model_config("1.8b", 2, tiny=True, seq_length=48, micro_batch=2, microbatches=1).to_dict()
    config = from_mapping(
        {
            **{k: base[k] for k in ("vision", "data")},
            "language": {**base["language"], "add_qkv_bias": True, "tie_word_embeddings": False},
            "moe": {"router": "linear", "moe_router_topk": 2},
        }
    )
    topology.seed_everything(1)
    ours, peer = build_modules(config, "route")[0], peer_model.Peer(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            # fresh biases are zero and fresh norms are one, which would hide errors
            parameter.add_(torch.randn_like(parameter) * 0.1)
    peer_model.load(peer, ours, config)
    step = shapes.random_step(
        shapes.model_config("1.8b", 2, tiny=True, seq_length=48, micro_batch=2, microbatches=1)
    )
    micro = step.microbatches[0]
    arguments, labels = (micro.tokens, micro.token_types, micro.images), micro.labels
    with torch.no_grad():
        losses = ours(*arguments, labels=labels)[labels != IGNORE_INDEX]
        assert peer(*arguments, labels).item() == pytest.approx(losses.mean().item(), rel=1e-5)


@pytest.mark.parametrize("model", ["1.8b", "7b"])
def test_layers_are_cut_to_the_memory_and_no_further(model):
    import shapes

    options = dict(seq_length=2048, micro_batch=4, microbatches=4)
    layers = shapes.layers_that_fit(model, 80 * 2**30, ["bf16", "fp8"], **options)

    def needed(count: int) -> int:
        configs = [
            shapes.model_config(model, count, tiny=False, precision=p, **options)
            for p in ("bf16", "bf16", "fp8")
        ]
        return max(shapes._side_by_side(configs, kind) for kind in shapes.STAGES)

    assert needed(layers) <= shapes.USABLE * 80 * 2**30 < needed(layers + 2)
