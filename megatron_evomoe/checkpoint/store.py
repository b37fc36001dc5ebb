"""Sharded save and load in megatron-core's `torch_dist` format and Megatron's directory layout.

    SAVE/latest_checkpointed_iteration.txt          written last
    SAVE/iter_0000500/*.distcp .metadata common.pt metadata.json run_config.yaml evomoe.json

A save goes to a folder of another name and is renamed when all ranks have written, so a folder called `iter_…` is
whole; the tracker file moves after that.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_evomoe.checkpoint.record import CheckpointError, Record, read
from megatron_evomoe.parallel import rng

TRACKER = "latest_checkpointed_iteration.txt"
# Layers keep their own keys, so dense and mixture stages name them alike; optimizer shards may be read at other sizes.
METADATA = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
_FREE_SPACE_MARGIN = 1.05

log = logging.getLogger(__name__)


def latest(directory: Path, step: int | None = None) -> Path | None:
    """The newest whole checkpoint under `directory` (or the one of `step`), or none if there is none.

    Raises:
        CheckpointError: `step` was asked for and is not there or not whole.
    """
    if step is not None:
        path = directory / f"iter_{step:07d}"
        read(path)
        return path
    for path in sorted(directory.glob("iter_*"), reverse=True):
        if not re.fullmatch(r"iter_\d{7,}", path.name):
            continue
        try:
            read(path)
            return path
        except CheckpointError as error:
            log.warning("%s; trying the checkpoint before it", error)
    return None


def resolve(path: str | Path) -> Path:
    """A checkpoint folder from what a user gives: the folder itself, or a directory whose newest is meant."""
    path = Path(path)
    if path.name.startswith("iter_"):
        read(path)
        return path
    found = latest(path)
    if found is None:
        raise CheckpointError(f"no checkpoint under {path}: it has no whole iter_* folder")
    return found


def save(directory: Path, *, modules: list[torch.nn.Module], optimizer: Any, scheduler: Any, record: Record, config_yaml: str,
         keep: int) -> Path:
    """Write a checkpoint from all ranks and publish it. Communicates.

    Raises:
        CheckpointError: not enough free disk (checked before anything is written), or the write failed. The checkpoints
            written before stay as they are.
    """
    state = _state(modules, optimizer, scheduler, is_loading=False)
    return _write(directory, state, record, config_yaml, keep)


def save_weights(directory: Path, parts: dict[str, torch.nn.Module], record: Record, config_yaml: str) -> Path:
    """Write weights alone, as something a first stage can start from (`pretrained_checkpoint`). Communicates.

    Args:
        parts: `vision_model`, `vision_projection`, `language_model`: whichever there are.

    Raises:
        CheckpointError: as `save`.
    """
    state = {k: v for name, part in parts.items() for k, v in part.sharded_state_dict(f"{name}.", metadata=METADATA).items()}
    return _write(directory, {"model": state}, record, config_yaml, keep=0)


def _write(directory: Path, state: dict[str, Any], record: Record, config_yaml: str, keep: int) -> Path:
    final = directory / f"iter_{record.step:07d}"
    pending = directory / f"saving_{record.step:07d}"
    error = None
    if dist.get_rank() == 0:
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir(parents=True)
    _require_free_space(directory, state)
    try:
        dist_checkpointing.save(state, str(pending), content_metadata=METADATA)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if any(errors):
        if dist.get_rank() == 0:
            shutil.rmtree(pending, ignore_errors=True)
        what = next(e for e in errors if e)
        raise CheckpointError(f"saving {final} failed: {what}. Nothing was published; {_last(directory)} stays the newest")
    if dist.get_rank() == 0:
        (pending / "run_config.yaml").write_text(config_yaml)
        record.files = {p.name: p.stat().st_size for p in pending.iterdir()}
        record.write(pending)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(pending, final)
        _write_tracker(directory, record.step)
        _drop_old(directory, keep)
    dist.barrier()
    return final


def load_training_state(path: Path, *, modules: list[torch.nn.Module], optimizer: Any, scheduler: Any, record: Record) -> None:
    """Resume: model, optimizer (both moments, step, master weights), schedule and RNG. Communicates."""
    _allocate_state(optimizer)
    state = _state(modules, optimizer, scheduler, is_loading=True)
    if record.layout != rng.layout():
        log.warning("the checkpoint was written by another layout (%s): random generators start afresh", record.layout)
        del state["rng"]
    loaded = _load(state, path)
    for i, module in enumerate(modules):
        module.load_state_dict(loaded[_chunk_key(i, len(modules))], strict=True)
    optimizer.load_state_dict(loaded["optimizer"])
    _own_step_tensors(optimizer)
    scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in loaded:
        rng.set_state(loaded["rng"])


def load_weights(path: Path, state: dict[str, Any], *, may_be_fresh: re.Pattern[str]) -> tuple[dict[str, Any], list[str]]:
    """Read those tensors of `state` that the checkpoint has. Communicates.

    Args:
        state: flat sharded state dict of the model.
        may_be_fresh: sharded keys the checkpoint need not have.

    Returns:
        What was loaded (for `load_state_dict(strict=False)`), and the sharded keys left at their initial values.

    Raises:
        CheckpointError: a key that must be there is missing, or a shape differs.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(path))
    wanted, fresh = {}, []
    for name, entry in state.items():
        if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
            continue  # _extra_state objects: Transformer Engine's FP8 history, which a new stage begins anew
        if entry.key in stored:
            _require_same_shape(entry, stored[entry.key], path)
            wanted[name] = entry
        elif may_be_fresh.search(entry.key):
            fresh.append(entry.key)
        else:
            raise CheckpointError(f"checkpoint {path} lacks {entry.key!r}, which this model needs; was it made by another model?")
    return _load(wanted, path), sorted(set(fresh))


def _require_same_shape(entry: Any, stored: ShardedTensor, path: Path) -> None:
    shape = getattr(entry, "global_shape", None)
    if shape is None or tuple(shape) == tuple(stored.global_shape) or getattr(entry, "allow_shape_mismatch", False):
        return
    raise CheckpointError(f"checkpoint {path} holds {entry.key!r} with shape {tuple(stored.global_shape)}, this model needs "
                          f"{tuple(shape)}: model sizes differ")


def _chunk_key(index: int, count: int) -> str:
    return "model" if count == 1 else f"model{index}"


def _state(modules: list[torch.nn.Module], optimizer: Any, scheduler: Any, *, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {_chunk_key(i, len(modules)): m.sharded_state_dict(metadata=METADATA) for i, m in enumerate(modules)}
    model = state["model"] if len(modules) == 1 else {k: v for i in range(len(modules)) for k, v in state[f"model{i}"].items()}
    state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=METADATA)
    state["scheduler"] = scheduler.state_dict()
    state["rng"] = rng.sharded_state()
    return state


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(path))
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} could not be read: {type(error).__name__}: {error}") from error


def _allocate_state(optimizer: Any) -> None:
    """Let a fresh DistributedOptimizer have moments to load into: its state dict asserts that torch's Adam holds a step."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not part.optimizer.state and hasattr(part, "_init_optimizer_states_with_dummy_values"):
            part._init_optimizer_states_with_dummy_values()


def _own_step_tensors(optimizer: Any) -> None:
    """A loaded torch Adam shares ONE step tensor among all parameters, and would add 1 to it once per parameter."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def _require_free_space(directory: Path, state: dict[str, Any]) -> None:
    """Refuse a save that cannot fit. Communicates: every rank hears rank 0's verdict."""
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, sum(t.numel() * t.element_size() for t in _main_replicas(state)))
    free = [shutil.disk_usage(directory).free if dist.get_rank() == 0 else 0]
    dist.broadcast_object_list(free, src=0)
    needed = int(sum(sizes) * _FREE_SPACE_MARGIN)
    if needed > free[0]:
        raise CheckpointError(f"saving to {directory} needs about {needed / 2**20:.1f} MiB and {free[0] / 2**20:.1f} MiB are free. "
                              f"Nothing was written; {_last(directory)} stays the newest. Free some space and resume")


def _main_replicas(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, dict):
        return [t for v in tree.values() for t in _main_replicas(v)]
    if isinstance(tree, (list, tuple)):
        return [t for v in tree for t in _main_replicas(v)]
    replica, data = getattr(tree, "replica_id", None), getattr(tree, "data", None)
    is_main = replica is not None and (replica == 0 or (isinstance(replica, tuple) and not any(replica)))
    return [data] if is_main and torch.is_tensor(data) else []


def _last(directory: Path) -> str:
    found = latest(directory)
    return str(found) if found else "no checkpoint"


def _write_tracker(directory: Path, step: int) -> None:
    pending = directory / (TRACKER + ".new")
    pending.write_text(str(step))
    os.replace(pending, directory / TRACKER)


def _drop_old(directory: Path, keep: int) -> None:
    if keep > 0:
        for path in sorted(directory.glob("iter_*"))[:-keep]:
            shutil.rmtree(path, ignore_errors=True)
