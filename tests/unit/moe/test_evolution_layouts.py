"""Two gloo processes: evolution under TP 2 and DP 2, and what it saved read by mixtures under EP 2 and expert TP 2.

With TP 2 and expert TP 1 the expert-parallel rank is the TP rank: the case in which keeping "the experts of this EP rank"
would save each expert's one half only.
"""

from __future__ import annotations

import itertools
import socket
from pathlib import Path
from typing import Any

import evolution_models as models
import pytest
import torch

from megatron_evomoe.moe.evolution import RULES, draw_beta

STEPS = range(4)
LAYER = 2
PREFIX = "decoder.layers.1.mlp."


def expected_experts(gated: bool, bias: bool) -> list[dict[str, torch.Tensor]]:
    """θ_1…θ_4 whole, without any parallelism: the rule over the trajectory of `evolution_models.train`, fp32."""
    experts: list[dict[str, torch.Tensor]] = [{} for _ in range(4)]
    for name, shape in models.whole_shapes(gated, bias).items():
        path = list(itertools.accumulate(models.full_update(name, t, shape) for t in STEPS))
        experts[0][name] = path[-1]
        for n in range(1, 4):
            theta_n = path[0].clone()
            for t in STEPS[1:]:
                beta = draw_beta(models.SEED, t, LAYER, n, *models.moe_config().evolution_beta[n - 1])
                RULES["delta"].function(theta_n, path[t], path[t - 1], None, beta)
            experts[n][name] = theta_n
    return experts


def regroup(tp: int, ep: int, etp: int) -> None:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, 1, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
    tensor_parallel.model_parallel_cuda_manual_seed(123)


def evolve_and_save(folder: Path, tp: int, gated: bool, bias: bool) -> None:
    """Evolve, save; then resume in the same layout and compare the state."""
    from megatron.core import dist_checkpointing

    rank = torch.distributed.get_rank()
    config = models.transformer_config(gated=gated, bias=bias, tp=tp)
    module = models.evolving_mlp(config, models.moe_config(), LAYER)
    models.train(module, STEPS, rank % tp, tp)
    assert module.owned == ([1, 2, 3] if tp == 2 else [[1, 3], [2]][rank])
    if rank == 0:
        folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(module.sharded_state_dict(PREFIX), str(folder))
    resumed = models.evolving_mlp(config, models.moe_config(), LAYER)
    load(resumed, resumed.sharded_state_dict(PREFIX), folder, strict=True)
    assert resumed.begun
    for (n, a), (m, b) in zip(module.local_experts(), resumed.local_experts(), strict=True):
        assert n == m and all(torch.equal(a[k], b[k]) for k in a)


def load(module: Any, state: dict[str, Any], folder: Path, strict: bool) -> None:
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(state, str(folder))
    module.load_state_dict({k.removeprefix(PREFIX): v for k, v in loaded.items()}, strict=strict)


def check_mixture(folder: Path, ep: int, etp: int, gated: bool, bias: bool, from_dense: bool = False) -> None:
    """Every local expert of a real `MoELayer` equals its part of the expected one."""
    from megatron_evomoe.moe.expert_init import dense_expert_sharded_state_dict

    layer = models.moe_layer(models.transformer_config(gated=gated, bias=bias, ep=ep, etp=etp, tp=2 if etp == 2 else 1))
    if from_dense:
        state = dense_expert_sharded_state_dict(layer, PREFIX)
    else:
        state = {k: v for k, v in layer.sharded_state_dict(PREFIX).items() if ".experts." in k}
    load(layer, state, folder, strict=False)
    whole = expected_experts(gated, bias)
    rank = torch.distributed.get_rank()
    for i, expert in enumerate(layer.experts.local_experts):
        n = 0 if from_dense else (rank * 2 if ep == 2 else 0) + i
        for name, p in expert.named_parameters():
            assert torch.equal(p, models.shard(whole[n][name], name, rank % etp, etp, gated)), (n, name)


def noisy_weights(ep: int, etp: int) -> dict[tuple[int, str], torch.Tensor]:
    """(expert, matrix) -> this rank's part, after noise on equal experts."""
    from megatron_evomoe.moe.expert_init import add_noise

    layer = models.moe_layer(models.transformer_config(ep=ep, etp=etp, tp=2 if etp == 2 else 1))
    rank = torch.distributed.get_rank()
    for expert in layer.experts.local_experts:
        for name, p in expert.named_parameters():
            p.data.copy_(models.shard(models.full_update(name, 0, models.whole_shapes()[name]), name, rank % etp, etp, True))
    add_noise(layer.experts, 5, LAYER, 0.1)
    first = rank * 2 if ep == 2 else 0
    return {(first + i, name): p.detach().clone() for i, expert in enumerate(layer.experts.local_experts)
            for name, p in expert.named_parameters()}


def worker(rank: int, port: int, folder: str) -> None:
    import os

    from megatron_evomoe.parallel import backend

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    backend.prepare()
    backend.init_process_group(timeout_minutes=1)
    saved = [(1, True, False), (2, True, False), (2, False, True)]  # (TP, gated, bias)
    for tp, gated, bias in saved:
        regroup(tp=tp, ep=1, etp=1)
        evolve_and_save(Path(folder) / f"tp{tp}-{gated}", tp, gated, bias)

    regroup(tp=1, ep=2, etp=1)
    noise = noisy_weights(ep=2, etp=1)
    for tp, gated, bias in saved:
        check_mixture(Path(folder) / f"tp{tp}-{gated}", 2, 1, gated, bias)
    check_mixture(Path(folder) / "tp2-True", 2, 1, True, False, from_dense=True)

    regroup(tp=2, ep=1, etp=2)  # core has no biases in experts under expert tensor parallelism
    sliced = noisy_weights(ep=1, etp=2)
    for (n, name), whole in noise.items():
        assert torch.equal(sliced[n, name], models.shard(whole, name, rank, 2, True)), (n, name)
    check_mixture(Path(folder) / "tp1-True", 1, 2, True, False)
    check_mixture(Path(folder) / "tp1-True", 1, 2, True, False, from_dense=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_every_layout_saves_and_loads_the_same_experts(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(("experts", "ranks"), [(2, 1), (4, 1), (4, 2), (4, 3), (8, 2), (8, 5), (4, 8), (2, 3)])
def test_each_evolved_expert_has_exactly_one_keeper(experts: int, ranks: int) -> None:
    from types import SimpleNamespace

    from megatron_evomoe.moe.evolving import EvolvingMLP

    kept = []
    for rank in range(ranks):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: ranks)
        kept.append(EvolvingMLP.owned.fget(SimpleNamespace(_dp_cp_group=group, moe=SimpleNamespace(num_experts=experts))))
    assert sorted(itertools.chain(*kept)) == list(range(1, experts))
    assert max(map(len, kept)) == -(-(experts - 1) // ranks)
