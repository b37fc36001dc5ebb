"""The optimizer in a checkpoint: moments and master weights as sharded tensors, and everything else rebuilt.

megatron-core chains one optimizer for dense and one for expert parameters where EP > 1, and writes their parameter groups
into the common file in that shape, which no other EP size can read. Groups hold nothing but the configuration and the step, so a
resume takes them from the optimizer at hand and the step from the schedule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase


def sharded(optimizer: Any, model: dict[str, Any], step: int, *, is_loading: bool, metadata: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's sharded state dict. Communicates.

    Args:
        model: the model's own, nested by chunk where there are several: chunks count layers from 0 each, so names collide.
        step: optimizer steps done.
    """
    with _steps_of_empty_shards(optimizer, step):
        return optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)


def allocate(optimizer: Any) -> None:
    """Let a fresh DistributedOptimizer have moments to load into: its state dict asserts that torch's Adam holds a step."""
    for part in _parts(optimizer):
        if not part.optimizer.state and hasattr(part, "_init_optimizer_states_with_dummy_values"):
            part._init_optimizer_states_with_dummy_values()


def load(optimizer: Any, own: dict[str, Any], tensors: dict[str, Any], step: int) -> None:
    """Take `tensors`, read for the shards that `own` (from `sharded`) asked for, and `step`; all else is as in `own`."""
    state = _overlay(own, tensors)
    for part in state.values() if len(_parts(optimizer)) > 1 else [state]:
        _set_step(part, step)
    optimizer.load_state_dict(state)
    _own_step_tensors(optimizer)


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _overlay(own: Any, tensors: Any) -> Any:
    """`own` with its sharded leaves replaced by what was read for them."""
    if isinstance(own, ShardedBase):
        assert tensors is not None
        return tensors
    if isinstance(own, dict):
        return {k: _overlay(v, tensors.get(k) if isinstance(tensors, dict) else None) for k, v in own.items()}
    if isinstance(own, list) and isinstance(tensors, list) and len(own) == len(tensors):
        return [_overlay(a, b) for a, b in zip(own, tensors, strict=True)]
    return own


def _set_step(part: dict[str, Any], step: int) -> None:
    """Where each kind keeps it: DistributedOptimizer in the groups, the others in the state they share."""
    inner = part.get("optimizer", part)
    if "state" in inner:
        inner["state"]["common_step"] = torch.tensor(float(step))
    else:
        for group in inner["param_groups"]:
            group["step"] = step


@contextlib.contextmanager
def _steps_of_empty_shards(optimizer: Any, step: int) -> Iterator[None]:
    """Where torch's Adam has no parameter in this rank's shard it knows no step, and DistributedOptimizer asserts that it does."""
    empty = [part.optimizer for part in _parts(optimizer) if hasattr(part, "gbuf_ranges") and not part.optimizer.state]
    for adam in empty:
        adam.state["empty shard"] = {"step": torch.tensor(float(step))}
    try:
        yield
    finally:
        for adam in empty:
            adam.state.pop("empty shard", None)


def _own_step_tensors(optimizer: Any) -> None:
    """A loaded torch Adam shares ONE step tensor among all parameters, and would add 1 to it once per parameter."""
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
