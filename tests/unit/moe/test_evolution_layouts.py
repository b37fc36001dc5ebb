"""Evolution in two gloo processes under TP 2 and DP 2, and mixtures that read what was saved.

The mixtures run under EP 2 and expert TP 2. With TP 2 and expert TP 1 the expert-parallel rank equals the TP
rank; keeping only "the experts of this EP rank" would then save one half of each expert.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_evomoe.moe.evolution_rules import RULES, draw_beta
from tests import programs
from tests.unit.moe import evolution_models as models

STEPS = range(4)
LAYER = 2
PREFIX = "decoder.layers.1.mlp."


@dataclass(frozen=True)
class Form:
    """One kind of FFN. In bf16 the checkpoint also holds the fp32 state of evolution."""

    gated: bool
    bias: bool
    dtype: torch.dtype

    def config(self, **degrees: int) -> Any:
        return models.transformer_config(gated=self.gated, bias=self.bias, dtype=self.dtype, **degrees)

    def part(self, whole: torch.Tensor, name: str, rank: int, size: int) -> torch.Tensor:
        return models.shard(whole, name, rank, size, self.gated)

    def experts(self) -> list[dict[str, torch.Tensor]]:
        """Expected θ_1…θ_4 in fp32, whole, without any parallelism.

        The rule is applied over the trajectory of `evolution_models.train`.
        """
        experts: list[dict[str, torch.Tensor]] = [{} for _ in range(4)]
        for name, shape in models.whole_shapes(self.gated, self.bias).items():
            updates = [models.full_update(name, t, shape) for t in STEPS]
            path = list(
                itertools.accumulate(
                    updates[1:],
                    lambda theta, u: (theta + u).to(self.dtype).float(),
                    initial=updates[0].to(self.dtype).float(),
                )
            )
            experts[0][name] = path[-1]
            for n in range(1, 4):
                theta_n = path[0].clone()
                for t in STEPS[1:]:
                    beta = draw_beta(models.SEED, t, LAYER, n, *models.moe_config().evolution_ranges[n - 1])
                    RULES["delta"].function(theta_n, path[t], path[t - 1], None, beta)
                experts[n][name] = theta_n
        return experts


SWIGLU = Form(gated=True, bias=False, dtype=torch.float32)
GELU = Form(gated=False, bias=True, dtype=torch.bfloat16)


def regroup(tp: int, ep: int, etp: int) -> None:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tp, 1, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
    )
    tensor_parallel.model_parallel_cuda_manual_seed(123)


def evolve_and_save(folder: Path, tp: int, form: Form) -> None:
    from megatron.core import dist_checkpointing

    rank = torch.distributed.get_rank()
    module = models.evolving_mlp(form.config(tp=tp), models.moe_config(), LAYER)
    models.train(module, STEPS, rank % tp, tp)
    assert module.owned == ([1, 2, 3] if tp == 2 else [[1, 3], [2]][rank])
    if rank == 0:
        folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(module.sharded_state_dict(PREFIX), str(folder))


def check_resume(folder: Path, tp: int, form: Form) -> None:
    """A new evolving FFN in the current layout loads its parts of the expected experts.

    The parts are equal to the bit in fp32.
    """
    module = models.evolving_mlp(form.config(tp=tp), models.moe_config(), LAYER)
    load(module, module.sharded_state_dict(PREFIX), folder, strict=True)
    assert module.begun
    whole, rank = form.experts(), torch.distributed.get_rank()
    for n, tensors in [(0, dict(module.named_parameters())), *module.local_experts()]:
        for name, tensor in tensors.items():
            assert torch.equal(tensor.float(), form.part(whole[n][name], name, rank % tp, tp)), (n, name)


def load(module: Any, state: dict[str, Any], folder: Path, strict: bool) -> None:
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(state, str(folder))
    module.load_state_dict({k.removeprefix(PREFIX): v for k, v in loaded.items()}, strict=strict)


def check_mixture(folder: Path, ep: int, etp: int, form: Form, from_dense: bool = False) -> None:
    """Every local expert of a real `MoELayer` equals its part of the expected expert."""
    from megatron_evomoe.moe.expert_init import dense_expert_sharded_state_dict

    layer = models.moe_layer(form.config(ep=ep, etp=etp, tp=etp))
    if from_dense:
        state = dense_expert_sharded_state_dict(layer, PREFIX)
    else:
        state = {k: v for k, v in layer.sharded_state_dict(PREFIX).items() if ".experts." in k}
    load(layer, state, folder, strict=False)
    whole, rank = form.experts(), torch.distributed.get_rank()
    for i, expert in enumerate(layer.experts.local_experts):
        n = 0 if from_dense else (rank * 2 if ep == 2 else 0) + i
        for name, p in expert.named_parameters():
            assert torch.equal(p, form.part(whole[n][name], name, rank % etp, etp).to(form.dtype)), (n, name)


def noisy_weights(ep: int, etp: int) -> dict[tuple[int, str], torch.Tensor]:
    """This rank's part of each (expert, matrix), after noise on equal experts."""
    from megatron_evomoe.moe.expert_init import add_noise

    layer = models.moe_layer(models.transformer_config(ep=ep, etp=etp, tp=2 if etp == 2 else 1))
    rank = torch.distributed.get_rank()
    for expert in layer.experts.local_experts:
        for name, p in expert.named_parameters():
            p.data.copy_(
                models.shard(
                    models.full_update(name, 0, models.whole_shapes()[name]), name, rank % etp, etp, True
                )
            )
    add_noise(layer.experts, 5, LAYER, 0.1)
    first = rank * 2 if ep == 2 else 0
    return {
        (first + i, name): p.detach().clone()
        for i, expert in enumerate(layer.experts.local_experts)
        for name, p in expert.named_parameters()
    }


def worker(rank: int, port: int, folder: str) -> None:
    import os

    from megatron_evomoe.parallel import backend

    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    backend.prepare()
    backend.init_process_group(timeout_minutes=1)
    tp1, tp2, tp2_gelu = (Path(folder) / name for name in ("tp1", "tp2", "tp2-gelu"))
    regroup(tp=1, ep=1, etp=1)
    evolve_and_save(tp1, 1, SWIGLU)
    regroup(tp=2, ep=1, etp=1)
    evolve_and_save(tp2, 2, SWIGLU)
    evolve_and_save(tp2_gelu, 2, GELU)
    check_resume(tp1, 2, SWIGLU)

    regroup(tp=1, ep=2, etp=1)
    check_resume(tp2, 1, SWIGLU)
    check_resume(tp2_gelu, 1, GELU)
    check_mixture(tp1, 2, 1, SWIGLU)
    check_mixture(tp2, 2, 1, SWIGLU)
    check_mixture(tp2_gelu, 2, 1, GELU)
    check_mixture(tp2, 2, 1, SWIGLU, from_dense=True)
    noise = noisy_weights(ep=2, etp=1)

    # megatron-core supports no biases in experts under expert tensor parallelism, so GELU is not checked
    # here.
    regroup(tp=2, ep=1, etp=2)
    check_mixture(tp1, 1, 2, SWIGLU)
    check_mixture(tp1, 1, 2, SWIGLU, from_dense=True)
    sliced = noisy_weights(ep=1, etp=2)
    for (n, name), whole in noise.items():
        assert torch.equal(sliced[n, name], SWIGLU.part(whole, name, rank, 2)), (n, name)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_every_layout_saves_and_loads_the_same_experts(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        worker, args=(programs.free_port(), str(tmp_path)), nprocs=2, start_method="forkserver"
    )
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("experts", "ranks"), [(2, 1), (4, 1), (4, 2), (4, 3), (8, 2), (8, 5), (4, 8), (2, 3)]
)
def test_each_evolved_expert_has_exactly_one_keeper(experts: int, ranks: int) -> None:
    from types import SimpleNamespace

    from megatron_evomoe.moe.evolving_mlp import EvolvingMLP

    kept = []
    for rank in range(ranks):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: ranks)
        kept.append(
            EvolvingMLP.owned.fget(
                SimpleNamespace(_dp_cp_group=group, moe=SimpleNamespace(num_experts=experts))
            )
        )
    assert sorted(itertools.chain(*kept)) == list(range(1, experts))
    assert max(map(len, kept)) == -(-(experts - 1) // ranks)
