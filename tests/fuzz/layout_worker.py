"""Builds the stages of generated configurations as one rank of a simulated world.

tests/fuzz/test_layouts.py runs it. torch's fake process group has any size and communicates nothing, so one
process can build the part of any rank: groups, model, gradient buffers, optimizer and the state to save are
real.
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

# these tensors are padded to a multiple of TP, and megatron-core lets the padding differ between layouts
WHOLE_VOCABULARY = ("word_embeddings.", "output_layer.")


def main(asked: str, answered: str) -> None:
    """Write each case's outcome as JSON.

    An outcome says how the case was refused or how it failed, or gives the shapes of what it would save under
    its layout and on one rank.
    """
    backend.prepare()
    new_group = dist.new_group
    # megatron-core also asks for gloo groups, which are faked like the others
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
    """Names and unsharded shapes of the tensors that this rank would save."""
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
