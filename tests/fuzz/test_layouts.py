"""Random parallel degrees on random models.

A layout that is not refused before training must build on every rank, and save what a single rank saves.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from megatron_evomoe.moe.router import ROUTERS
from tests import programs
from tests.tiny import VOCAB

TRIES = 50


def draw(random: random.Random) -> dict[str, Any]:
    """Draw a configuration, a number of ranks and two of the ranks; about half of the layouts are valid."""
    tp, pp, ep, etp = (
        random.choice((1, 1, 1, *others)) for others in ((2, 2, 4), (2, 2, 3, 4), (2, 2, 4), (2,))
    )
    replicas = random.choice((1, 2, 4))
    world = random.choice((*5 * (tp * pp * replicas,), random.randint(1, 16)))
    heads, layers, experts = (
        random.choice((4, 4, 6, 8)),
        random.choice((pp, 2 * pp, 4 * pp, 3)),
        random.choice((4, 4, 6, 8)),
    )
    kind = random.choice(("align", "warmup", "evolve", "route"))
    micro = random.choice((1, 2))
    config = {
        "language": {
            "num_layers": layers,
            "hidden_size": 8 * heads,
            "num_attention_heads": heads,
            "num_query_groups": random.choice((None, None, *(g for g in (1, 2, 4) if heads % g == 0))),
            "ffn_hidden_size": random.choice((24, 30, 48)),
            "vocab_size": random.choice((VOCAB, 61, 100)),
            "normalization": random.choice(("RMSNorm", "LayerNorm")),
            "tie_word_embeddings": random.choice((True, False)),
            "add_qkv_bias": random.choice((True, False)),
            "add_bias_linear": random.choice((False, False, True)),
            "qk_layernorm": random.choice((False, False, True)),
            "parallel_residual": random.choice((False, False, True)),
            "gated_linear_unit": random.choice((True, True, False)),
        },
        "vision": {
            "image_size": 16,
            "patch_size": 8,
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": random.choice((2, 4, 4)),
            "ffn_hidden_size": random.choice((32, 36)),
        },
        "moe": {
            "dtr_hidden_size": 4,
            "dtr_rank": 4,
            "num_experts": experts,
            "moe_router_topk": random.choice((1, 1, 2)),
            "router": random.choice(list(ROUTERS)),
            "evolution_beta": [[0.1 * i, 0.1 * i + 0.05] for i in range(1, experts)],
            "moe_layer_freq": random.choice((1, 2, [random.choice((0, 1)) for _ in range(layers)])),
            "moe_token_dispatcher_type": random.choice(("alltoall", "alltoall", "allgather")),
            "moe_expert_capacity_factor": random.choice((None, None, 1.0)),
        },
        "data": {"seq_length": 64},
        "train": {
            "micro_batch_size": micro,
            "global_batch_size": micro * random.choice((4, 8, 12)),
            "train_iters": 2,
            "recompute_granularity": random.choice((None, None, "full", "selective")),
        },
        "parallel": {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "expert_model_parallel_size": ep,
            "expert_tensor_parallel_size": etp,
            "num_layers_per_virtual_pipeline_stage": random.choice((None, None, 1, 2)) if pp > 1 else None,
            "sequence_parallel": random.choice((*6 * (None,), True, False)),
            "use_distributed_optimizer": random.choice((True, True, True, False)),
            "overlap_grad_reduce": random.choice((True, False)),
            "overlap_param_gather": random.choice((True, False, False)),
        },
        "stages": [{"name": kind}],
    }
    return {"config": config, "world": world, "ranks": sorted({0, world - 1, random.randrange(world)})}


def outcomes(cases: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    asked, answered = folder / "cases.json", folder / "outcomes.json"
    asked.write_text(json.dumps(cases))
    programs.run("-m", "tests.fuzz.layout_worker", str(asked), str(answered), timeout=900)
    return json.loads(answered.read_text())


def test_layouts(tally, tmp_path):
    cases = [draw(random) for random in tally.draws(TRIES)]
    for case, outcome in zip(cases, outcomes(cases, tmp_path), strict=True):
        assert "failed" not in outcome, (case, outcome["failed"])
        if "refused" in outcome:
            assert outcome["refused"].strip() and "\n" not in outcome["refused"]
            tally.add("named")
            continue
        differing = {
            k: (v, outcome["alone"].get(k))
            for k, v in outcome["there"].items()
            if v != outcome["alone"].get(k)
        }
        assert outcome["there"] and not differing, (case, differing)
        tally.add("right")
