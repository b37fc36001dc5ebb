"""The state of the optimizer in a checkpoint: moments and master weights as sharded tensors.

Where EP > 1, megatron-core chains one optimizer for dense parameters and one for experts, and writes their
parameter groups into the common file in a form that no other EP size can read. The groups hold only values of
the configuration and the step, so a resume takes them from the present optimizer and the step from the
schedule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

from megatron_evomoe.checkpoint import flat_shards


def sharded(
    optimizer: Any, model: dict[str, Any], step: int, *, is_loading: bool, metadata: dict[str, Any]
) -> dict[Any, Any]:
    """The sharded state dict of an optimizer, in megatron-core's structure.

    Args:
        model: the sharded state dict of the model; with several chunks it is nested by chunk, because each
            chunk counts its layers from 0.
        step: the optimizer steps done.
        metadata: how state dicts are sharded (`store.metadata`); a DistributedOptimizer is always
            `fully_reshardable`.
    """
    parts = _parts(optimizer)
    states = [
        _distributed(part, model, step)
        if _is_distributed(part)
        else part.sharded_state_dict(model, is_loading=is_loading, metadata=dict(metadata))
        for part in parts
    ]
    return states[0] if len(states) == 1 else dict(enumerate(states))


def allocate(optimizer: Any) -> None:
    """Allocate the moments of a new DistributedOptimizer, so that they can be loaded."""
    for part in _parts(optimizer):
        if not part.optimizer.state and _is_distributed(part):
            part._init_optimizer_states_with_dummy_values()


def load(optimizer: Any, own: dict[Any, Any], tensors: dict[Any, Any], step: int) -> None:
    """Load the state of an optimizer.

    Args:
        own: what `sharded` returned; it provides everything except tensors and the step.
        tensors: what was read for the shards of `own`.
        step: the optimizer steps done.
    """
    state = _overlay(own, tensors)
    parts = _parts(optimizer)
    for i, part in enumerate(parts):
        if _is_distributed(part):  # its boxes are views, so reading has filled them
            _set_step(part, step)
        else:
            _load_plain(part, state[i] if len(parts) > 1 else state, step)


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _is_distributed(part: Any) -> bool:
    return hasattr(part, "gbuf_ranges")


def _distributed(part: Any, model: dict[str, Any], step: int) -> dict[str, Any]:
    with _step_of_empty_shard(part, step):
        common = part.state_dict()
    return {
        **common,
        "param_state": flat_shards.sharded(part, model),
        "param_state_sharding_type": "fully_reshardable",
    }


def _set_step(part: Any, step: int) -> None:
    """Set the step.

    torch's Adam keeps it with each parameter, those of Transformer Engine and apex in the groups.
    """
    for state in part.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.tensor(float(step))
    for group in part.optimizer.param_groups:
        if "step" in group:
            group["step"] = step


def _load_plain(part: Any, state: dict[str, Any], step: int) -> None:
    inner = state.get("optimizer", state)
    inner["state"]["common_step"] = torch.tensor(float(step))
    part.load_state_dict(state)
    for own in part.optimizer.state.values():
        # torch's Adam would now share one step tensor among all parameters, and add 1 to it for each of them
        if torch.is_tensor(own.get("step")):
            own["step"] = own["step"].clone()


def _overlay(own: Any, tensors: Any) -> Any:
    """`own` with its sharded leaves replaced by what was read for them."""
    if isinstance(own, ShardedBase):
        assert tensors is not None
        return tensors
    if isinstance(own, LocalNonpersistentObject):  # the parameters of a group
        return own.unwrap()
    if isinstance(own, dict):
        return {k: _overlay(v, tensors.get(k) if isinstance(tensors, dict) else None) for k, v in own.items()}
    if isinstance(own, list) and isinstance(tensors, list) and len(own) == len(tensors):
        return [_overlay(a, b) for a, b in zip(own, tensors, strict=True)]
    return own


@contextlib.contextmanager
def _step_of_empty_shard(part: Any, step: int) -> Iterator[None]:
    """Give torch's Adam a step inside a `with` block where this rank's shard holds no parameter.

    Adam has no step there, and DistributedOptimizer asserts that it has one.
    """
    adam, is_empty = part.optimizer, not part.optimizer.state
    if is_empty:
        adam.state["empty shard"] = {"step": torch.tensor(float(step))}
    try:
        yield
    finally:
        if is_empty:
            adam.state.pop("empty shard", None)
