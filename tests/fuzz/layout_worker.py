"""Build the stages of generated configurations as one rank of a world that is not there, for
tests/fuzz/test_layouts.py.

torch's fake process group has any size and moves nothing, so a rank of eight builds in one process: groups,
model, gradient buffers, optimizer and what it would save are made for real.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_evomoe.parallel import backend

WHOLE_VOCABULARY = ("word_embeddings.", "output_layer.")  # padded by TP, which the core lets differ


def main(asked: str, answered: str) -> None:
    """Each case's outcome, as JSON: how it was refused, how it failed, or shapes of what it would save, there
    and on one rank.
    """
    backend.prepare()
    new_group = dist.new_group
    # the core asks for groups over gloo besides: these are as fake as the others
    dist.new_group = lambda *args, backend=None, **kwargs: new_group(*args, **kwargs)
    outcomes = [outcome(case) for case in json.loads(Path(asked).read_text())]
    Path(answered).write_text(json.dumps(outcomes))


def outcome(case: dict[str, Any]) -> dict[str, Any]:
    from megatron_evomoe.config import ConfigError, from_mapping
    from megatron_evomoe.train import preflight

    try:
        config = from_mapping(case["config"])
        stage = config.stages[0]
        preflight.check_stage(config.for_stage(stage.name), stage.kind, case["world"])
    except ConfigError as error:
        return {"refused": str(error)}
    except Exception:
        return {"failed": traceback.format_exc()}
    try:
        there = {k: v for rank in case["ranks"] for k, v in shapes(config, case["world"], rank).items()}
        return {"there": there, "alone": shapes(from_mapping({**case["config"], "parallel": {}}), 1, 0)}
    except Exception:
        return {"failed": traceback.format_exc()}


def shapes(config: Any, world: int, rank: int) -> dict[str, list[int]]:
    """Names and whole shapes of the tensors this rank would save."""
    from megatron.core import parallel_state

    from megatron_evomoe.checkpoint import store
    from megatron_evomoe.parallel import topology
    from megatron_evomoe.train.built import build_stage

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        topology.initialize(config)
        topology.seed_everything(1)
        stage = config.stages[0]
        built = build_stage(config.for_stage(stage.name), stage)
        found = {}
        for module in built.modules:
            for entry in module.sharded_state_dict(metadata=store.metadata()).values():
                if hasattr(entry, "global_shape") and not any(name in entry.key for name in WHOLE_VOCABULARY):
                    found[entry.key] = list(entry.global_shape)
        return found
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
