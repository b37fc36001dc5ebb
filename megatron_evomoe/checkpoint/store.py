"""Saves and loads sharded state in megatron-core's `torch_dist` format and Megatron's directory structure.

    SAVE/latest_checkpointed_iteration.txt          written last
    SAVE/iter_0000500/*.distcp .metadata common.pt metadata.json run_config.yaml evomoe.json

A save is written to a directory of another name, which is renamed when all ranks have written. A directory
called `iter_…` is therefore complete. The tracker file is replaced after that. With `async_save`, forked
processes write while training continues.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_evomoe.checkpoint import metadata as tensor_metadata
from megatron_evomoe.checkpoint import optimizer_state
from megatron_evomoe.checkpoint.publication import Publication
from megatron_evomoe.checkpoint.reader import safe_reads
from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.checkpoint.writer import BackgroundStrategy, SummingStrategy, split
from megatron_evomoe.config import CheckpointConfig
from megatron_evomoe.parallel import backend, rng

_MODEL_KEY = re.compile(r"(vision_model|vision_projection|language_model)\.")
_FAILURES = (Exception, CheckpointException)  # torch's CheckpointException is not an Exception

log = logging.getLogger(__name__)


def metadata() -> dict[str, Any]:
    """How state dicts are sharded.

    Layers keep their own keys, so dense and mixture stages name them alike, and optimizer shards can be read
    at other sizes. Each call returns a new dict, because megatron-core puts the present process groups into
    it.
    """
    return {
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }


class Saver:
    """Saves the checkpoints of one run, one at a time.

    Args:
        config: whether to write in the background, and which checkpoints to keep.
        check_folder: is called on rank 0 before anything is written; what it raises ends the save on every
            rank.
    """

    def __init__(self, config: CheckpointConfig, check_folder: Callable[[], None] = lambda: None) -> None:
        self._config, self._check_folder = config, check_folder
        self._queue = AsyncCallsQueue() if config.async_save else None
        self._publication: Publication | None = None
        self._background: BackgroundStrategy | None = None

    def save(
        self,
        directory: Path,
        *,
        modules: Sequence[MegatronModule],
        optimizer: Any,
        scheduler: Any,
        record: Record,
        config_yaml: str,
    ) -> Path | None:
        """Write a checkpoint from all ranks and publish it. Communicates.

        With `async_save` the checkpoint is written in the background, and `poll` publishes it.

        Returns:
            The published checkpoint; None while it is being written.

        Raises:
            CheckpointError: there is not enough free disk (checked before anything is written), or a write
                failed, possibly that of the save before. Earlier checkpoints stay as they are.
        """
        self.poll(wait=True)
        state = _state(modules, optimizer, scheduler, is_loading=False)
        return self._start(directory, state, record, config_yaml)

    def save_weights(
        self, directory: Path, parts: dict[str, MegatronModule], record: Record, config_yaml: str
    ) -> Path | None:
        """Write a checkpoint of weights alone, for `pretrained_checkpoint`. Communicates.

        Args:
            parts: those of `config.recipe.MODULES` that exist, by name.

        Returns:
            As for `save`.

        Raises:
            CheckpointError: as for `save`.
        """
        state = {
            k: v
            for name, part in parts.items()
            for k, v in part.sharded_state_dict(f"{name}.", metadata=metadata()).items()
        }
        return self._start(directory, {"model": state}, record, config_yaml)

    def poll(self, *, wait: bool = False) -> Path | None:
        """Publish a background save that all ranks have written. Communicates while one is under way.

        Args:
            wait: wait until all ranks have written it.

        Returns:
            The checkpoint that this call published, if any.

        Raises:
            CheckpointError: the write failed on some rank; nothing was published.
        """
        if self._publication is None or self._queue is None:
            return None
        error = None
        try:
            if not self._queue.maybe_finalize_async_calls(blocking=wait):
                return None
        except CheckpointException as failure:  # what a writer met, such as a full disk
            error = failure
        except Exception as failure:
            raise self._publication.failed(failure) from failure
        publication, self._publication = self._publication, None
        publication.conclude(error or (self._background and self._background.failure))
        return publication.final

    def _start(self, directory: Path, state: dict[str, Any], record: Record, config_yaml: str) -> Path | None:
        publication = Publication(directory, replace(record), config_yaml, self._config)
        publication.prepare(state, self._check_folder)
        error, sums = None, {}
        try:
            sharded, publication.common = split(state, metadata())
            if self._queue is None:
                strategy = SummingStrategy()
                strategy.save(sharded, publication.pending)
                sums = strategy.sums
            else:
                self._background = BackgroundStrategy()
                request = self._background.begin(sharded, publication.pending)
        except CheckpointException as failure:  # torch raises it on every rank
            error = failure
        except Exception as failure:  # only here; others may be in a collective, so none can agree
            raise publication.failed(failure) from failure
        if self._queue is None:
            publication.conclude(error, sums)
            return publication.final
        publication.agree(error)
        self._queue.schedule_async_request(request)
        self._publication = publication
        return None


def load_training_state(
    path: Path,
    *,
    modules: Sequence[MegatronModule],
    optimizer: Any,
    scheduler: Any,
    record: Record,
    is_own: bool = False,
) -> None:
    """Resume from a checkpoint under any layout. Communicates.

    This loads the model, the optimizer (both moments, step, master weights), the schedule and the random
    generators. Under another layout the generators start anew; only new weights are drawn from them.

    Args:
        is_own: the checkpoint is in this run's directory. Only then does Transformer Engine get the history
            of its FP8 scales, a pickle inside a tensor, which it opens without restriction.

    Raises:
        CheckpointError: the tensors cannot be read, or are of another step than the record.
    """
    optimizer_state.allocate(optimizer)
    state = _state(modules, optimizer, scheduler, is_loading=True)
    if record.layout != rng.layout():
        log.info(
            "the checkpoint was written under another layout (%s): random generators start anew",
            record.layout,
        )
        del state["rng"]
    # under a name that the file does not have, so that only tensors are read: its parameter groups are those
    # of the layout that wrote it
    own = state["shards of the optimizer"] = state.pop("optimizer")
    chunks = {key: state[key] for key in (_chunk_key(i, len(modules)) for i in range(len(modules)))}
    _require_nothing_left(path, tensor_shapes(path), chunks, None)
    loaded = _load(state, path)
    if (steps := loaded["scheduler"].get("num_steps")) != record.step:
        raise CheckpointError(
            f"checkpoint {path}: its record is of step {record.step}, its schedule of {steps}: "
            "they are not of one save"
        )
    for i, module in enumerate(modules):
        own_state = loaded[_chunk_key(i, len(modules))]
        module.load_state_dict(own_state if is_own else without_history(own_state, path), strict=True)
    optimizer_state.load(optimizer, own, loaded.get("shards of the optimizer", {}), record.step)
    scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in loaded:
        rng.set_state(loaded["rng"])


def without_history(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The state dict of a module without the history of Transformer Engine's FP8 scales, which begins anew.

    If there was a history, this is logged.
    """
    extra = {name: value for name, value in state.items() if "_extra_state" in name and value is not None}
    if any(not torch.is_tensor(value) or value.numel() for value in extra.values()):
        log.warning(
            "%s is of another run: the history of FP8 scales is not taken from it and begins anew", path
        )
    return {**state, **{name: torch.empty(0, dtype=torch.uint8) for name in extra}}


def load_weights(
    path: Path,
    states: list[dict[str, Any]],
    *,
    may_be_fresh: re.Pattern[str],
    may_be_left: re.Pattern[str] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Read those tensors of `states` that a checkpoint has. Communicates.

    Args:
        states: the flat sharded state dict of each model chunk of this rank. All chunks are read at once,
            because a tied embedding has its owner in one chunk and its copy in another.
        may_be_fresh: sharded keys that the checkpoint need not have.
        may_be_left: keys of the checkpoint that no rank needs to ask for; None means that all must be asked
            for.

    Returns:
        What was loaded, for each chunk (for `load_state_dict(strict=False)`), and the sharded keys that keep
        their initial values on any rank.

    Raises:
        CheckpointError: a key that must exist is missing, a shape differs, or the checkpoint holds more than
            was asked for.
    """
    stored = tensor_shapes(path)
    wanted: dict[str, Any] = {}
    fresh: set[str] = set()
    for i, state in enumerate(states):
        wanted[str(i)] = chunk = {}
        for name, entry in state.items():
            if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
                # _extra_state objects: the history of Transformer Engine's FP8 scales, which begins anew
                continue
            if entry.key in stored:
                _require_same_shape(entry, stored[entry.key], path)
                chunk[name] = entry
            elif may_be_fresh.search(entry.key):
                fresh.add(entry.key)
            else:
                raise CheckpointError(
                    f"checkpoint {path} lacks {entry.key!r}, which this model needs; "
                    "was it made by another model?"
                )
    _require_nothing_left(path, stored, wanted, may_be_left)
    everyone: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, fresh)
    loaded = _load(wanted, path)
    return [loaded.get(str(i), {}) for i in range(len(states))], sorted(set().union(*everyone))


def _require_nothing_left(
    path: Path, stored: Iterable[str], wanted: dict[str, Any], may_be_left: re.Pattern[str] | None
) -> None:
    """Refuse a checkpoint that holds more of the model than all ranks ask for. Communicates.

    It is of another model, such as one with more layers or with biases.

    Args:
        wanted: this rank's sharded state dict, nested by chunk.

    Raises:
        CheckpointError: on every rank; a tensor is left.
    """
    keys = sorted(
        key for key in stored if _MODEL_KEY.match(key) and not (may_be_left and may_be_left.search(key))
    )
    own = {getattr(entry, "key", None) for entry in nested_values(wanted)}
    asked = torch.tensor([key in own for key in keys], dtype=torch.int32, device=backend.device())
    if keys:
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    left = [key for key, is_asked in zip(keys, asked.tolist(), strict=True) if not is_asked]
    if left:
        more = f" and {len(left) - 1} more tensors" if len(left) > 1 else ""
        raise CheckpointError(
            f"checkpoint {path} holds {left[0]!r}{more} that this model has no place for: it is smaller than "
            "the checkpoint's (fewer layers, no bias …). Give it the checkpoint's sizes"
        )


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The global shape of every tensor in a checkpoint, by key.

    Raises:
        CheckpointError: as for `metadata.read`.
    """
    stored = tensor_metadata.read(path).state_dict_metadata
    return {
        key: tuple(entry.size) for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)
    }


def _require_same_shape(entry: Any, stored: tuple[int, ...], path: Path) -> None:
    shape = getattr(entry, "global_shape", None)
    if shape is None or tuple(shape) == stored or getattr(entry, "allow_shape_mismatch", False):
        return
    raise CheckpointError(
        f"checkpoint {path} holds {entry.key!r} with shape {stored}, this model needs "
        f"{tuple(shape)}: model sizes differ"
    )


def _chunk_key(index: int, count: int) -> str:
    return "model" if count == 1 else f"model{index}"


def _state(
    modules: Sequence[MegatronModule], optimizer: Any, scheduler: Any, *, is_loading: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {
        _chunk_key(i, len(modules)): m.sharded_state_dict(metadata=metadata()) for i, m in enumerate(modules)
    }
    # nested by chunk: chunks count their layers from 0 each, so their names collide
    state["optimizer"] = optimizer_state.sharded(
        optimizer, dict(state), scheduler.num_steps, is_loading=is_loading, metadata=metadata()
    )
    state["scheduler"] = scheduler.state_dict()
    state["rng"] = rng.sharded_state()
    return state


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        with safe_reads():
            return dist_checkpointing.load(state, str(path))
    except _FAILURES as error:
        raise CheckpointError(
            f"checkpoint {path} could not be read: {type(error).__name__}: {error}"
        ) from error
