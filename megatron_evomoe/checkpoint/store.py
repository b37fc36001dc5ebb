"""Sharded save and load in megatron-core's `torch_dist` format and Megatron's directory layout.

    SAVE/latest_checkpointed_iteration.txt          written last
    SAVE/iter_0000500/*.distcp .metadata common.pt metadata.json run_config.yaml evomoe.json

A save goes to a folder of another name and is renamed when all ranks have written, so a folder called
`iter_…` is whole; the tracker file moves after that. With `async_save` the writing happens in forked
processes while training goes on.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
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
_FAILURES = (Exception, CheckpointException)  # torch's CheckpointException is no Exception

log = logging.getLogger(__name__)


def metadata() -> dict[str, Any]:
    """How state dicts are sharded: layers keep their own keys, so dense and mixture stages name them alike;
    optimizer shards may be read at other sizes. A new dict each time, because megatron-core puts the process
    groups of the moment into it.
    """
    return {
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }


class Saver:
    """Saves of one run, one at a time. `config` says whether in the background, and what is kept.

    check_folder: asked on rank 0 before anything is written; what it raises ends the save on every rank.
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
        modules: list[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        record: Record,
        config_yaml: str,
    ) -> Path | None:
        """Write a checkpoint from all ranks and publish it; with `async_save` publishing is left to `poll`.
        Communicates.

        Returns:
            The published checkpoint; none while it is being written.

        Raises:
            CheckpointError: not enough free disk (checked before anything is written), or a write failed,
                maybe that of the save before. The checkpoints published before stay as they are.
        """
        self.poll(wait=True)
        state = _state(modules, optimizer, scheduler, is_loading=False)
        return self._start(directory, state, record, config_yaml)

    def save_weights(
        self, directory: Path, parts: dict[str, torch.nn.Module], record: Record, config_yaml: str
    ) -> Path | None:
        """Write weights alone, as something a first stage can start from (`pretrained_checkpoint`).
        Communicates.

        Returns:
            As `save`.

        Args:
            parts: `vision_model`, `vision_projection`, `language_model`: whichever there are.

        Raises:
            CheckpointError: as `save`.
        """
        state = {
            k: v
            for name, part in parts.items()
            for k, v in part.sharded_state_dict(f"{name}.", metadata=metadata()).items()
        }
        return self._start(directory, {"model": state}, record, config_yaml)

    def poll(self, *, wait: bool = False) -> Path | None:
        """Publish a background save that all ranks have written; `wait` until they have. Communicates while
        one is under way.

        Returns:
            What was published by this call.

        Raises:
            CheckpointError: the write failed on some rank; nothing was published.
        """
        if self._publication is None or self._queue is None:
            return None
        error = None
        try:
            if not self._queue.maybe_finalize_async_calls(blocking=wait):
                return None
        except CheckpointException as failure:  # whatever a writer met: a full disk, a lost mount
            error = failure
        except Exception as failure:
            raise self._publication.failed(failure) from failure
        publication, self._publication = self._publication, None
        publication.conclude(error or self._background.failure)
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
        except (
            Exception
        ) as failure:  # on this rank; the others may be in a collective, which no agreement may meet
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
    modules: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    record: Record,
    is_own: bool = False,
) -> None:
    """Resume under any layout: model, optimizer (both moments, step, master weights), schedule and RNG.
    Communicates.

    Generators go on where they were under the layout that saved; under another one they start afresh (nothing
    random but fresh weights depends on them).

    Args:
        is_own: the checkpoint lies in this run's directory. Only then is Transformer Engine given the history
            of its FP8 scales, a pickle inside a tensor, which it opens without restriction.

    Raises:
        CheckpointError: the tensors cannot be read, or are of another step than the record.
    """
    optimizer_state.allocate(optimizer)
    state = _state(modules, optimizer, scheduler, is_loading=True)
    if record.layout != rng.layout():
        log.info(
            "the checkpoint was written by another layout (%s): random generators start afresh", record.layout
        )
        del state["rng"]
    # Under a name the file does not have, so that only tensors are filled in: what the file says of groups is
    # the layout's.
    own = state["shards of the optimizer"] = state.pop("optimizer")
    chunks = {key: state[key] for key in (_chunk_key(i, len(modules)) for i in range(len(modules)))}
    _require_nothing_left(path, tensor_shapes(path), chunks, None)
    loaded = _load(state, path)
    if (steps := loaded["scheduler"].get("num_steps")) != record.step:
        raise CheckpointError(
            f"checkpoint {path}: its record is of step {record.step}, its schedule of {steps}: not one save's"
        )
    for i, module in enumerate(modules):
        own_state = loaded[_chunk_key(i, len(modules))]
        module.load_state_dict(own_state if is_own else without_history(own_state, path), strict=True)
    optimizer_state.load(optimizer, own, loaded.get("shards of the optimizer", {}), record.step)
    scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in loaded:
        rng.set_state(loaded["rng"])


def without_history(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """A module's state dict in which Transformer Engine's FP8 scales begin anew, which is said where there
    was a history.
    """
    extra = {name: value for name, value in state.items() if "_extra_state" in name and value is not None}
    if any(not torch.is_tensor(value) or value.numel() for value in extra.values()):
        log.warning(
            "%s is another run's: the history of FP8 scales is not taken from it and begins anew", path
        )
    return {**state, **{name: torch.empty(0, dtype=torch.uint8) for name in extra}}


def load_weights(
    path: Path,
    states: list[dict[str, Any]],
    *,
    may_be_fresh: re.Pattern[str],
    may_be_left: re.Pattern[str] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Read those tensors of `states` that the checkpoint has. Communicates.

    Args:
        states: flat sharded state dict of each model chunk of this rank. All at once, because a tied
            embedding has its owner in one chunk and its copy in another.
        may_be_fresh: sharded keys the checkpoint need not have.
        may_be_left: keys of the checkpoint that no rank need ask for; none means that all must be asked for.

    Returns:
        What was loaded, per chunk (for `load_state_dict(strict=False)`), and the sharded keys left at their
        initial values on any rank.

    Raises:
        CheckpointError: a key that must be there is missing, a shape differs, or the checkpoint holds more
            than was asked for.
    """
    stored = tensor_shapes(path)
    wanted: dict[str, Any] = {}
    fresh: set[str] = set()
    for i, state in enumerate(states):
        wanted[str(i)] = chunk = {}
        for name, entry in state.items():
            if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
                # _extra_state objects: Transformer Engine's FP8 history, which a new stage begins anew
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
    """A model of which the checkpoint holds more than all ranks ask for is another model: fewer layers, no
    bias. Communicates.

    Args:
        wanted: this rank's sharded state dict, nested by chunk.

    Raises:
        CheckpointError: on every rank.
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
            "the "
            "checkpoint's (fewer layers, no bias …). Give it the checkpoint's sizes"
        )


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The global shape of every tensor in a checkpoint, by key.

    Raises:
        CheckpointError: as `metadata.read`.
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
    modules: list[torch.nn.Module], optimizer: Any, scheduler: Any, *, is_loading: bool
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
