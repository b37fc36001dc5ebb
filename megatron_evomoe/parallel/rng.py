"""The random generators of Python, NumPy, torch and megatron-core, as tensors that a checkpoint holds."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_evomoe.parallel import backend, topology


@contextlib.contextmanager
def derived(name: str) -> Iterator[None]:
    """Inside a ``with`` block, seed torch's generators from the run's seed and `name`; restore them after it.

    A part of the model that is built inside starts from the same weights on every rank and beside any other
    part, so fresh weights do not depend on the pipeline stage that holds them. (On CUDA megatron-core draws
    tensor-parallel weights from its own generators, which do depend on the layout.)
    """
    seed = int.from_bytes(hashlib.sha256(f"{torch.initial_seed()}/{name}".encode()).digest()[:7], "big")
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state() if backend.on_gpu() else None
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def layout() -> dict[str, int]:
    """World size and degrees. Saved generator states fit a run with the same layout only."""
    place = topology.current()
    return {
        "world": place.world_size,
        "tensor": place.tensor.size,
        "pipeline": place.pipeline.size,
        "virtual": place.chunks,
        "context": place.context.size,
        "expert": place.expert.size,
        "expert_tensor": place.expert_tensor.size,
    }


def _states() -> dict[str, torch.Tensor]:
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = numpy_state
    assert version == 3 and name == "MT19937"
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if backend.on_gpu():
        states["cuda"] = torch.cuda.get_rng_state()
    for key, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{key}"] = state
    return states


def sharded_state() -> dict[str, ShardedTensor]:
    """The states of all generators; each tensor has one row per rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", state.cpu().unsqueeze(0), (0, rank, world))
        for name, state in _states().items()
    }


def set_state(loaded: dict[str, torch.Tensor]) -> None:
    """Restore the states that `sharded_state` saved."""
    states = {name: row.squeeze(0) for name, row in loaded.items()}
    has_gauss, gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss if has_gauss else None))
    *keys, position, numpy_has_gauss = states["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), position, numpy_has_gauss, states["numpy_gauss"].item())
    )
    torch.set_rng_state(states["torch"])
    if backend.on_gpu():
        torch.cuda.set_rng_state(states["cuda"])
    tracker = {name.split(".", 1)[1]: state for name, state in states.items() if name.startswith("tracker.")}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracker)
