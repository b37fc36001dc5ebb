"""The FFN of a designated layer in stage II: computes with expert 1 (θ_1) and updates experts 2…N from it.

Forward and backward are those of the dense FFN. Beside its parameters this module keeps θ_2…θ_N in fp32; they
are outside autograd, DDP, the optimizer and ``bfloat16()`` casts. For each weight (``linear_fc1.weight``,
``linear_fc2.weight``, biases) a checkpoint holds:

* ``mlp.linear_fc1.weight``: θ_1, the dense FFN's own entry, which a resume and the optimizer's shards need.
* ``mlp.experts.experts.linear_fc1.weight``: θ_1…θ_N along an expert axis, with the key, shape and dtype that
  a `MoELayer` loads, so that `route` can start from this checkpoint under any layout.
* ``mlp.evolution.linear_fc1.weight``: θ_2…θ_N in fp32, for an exact resume. It is left out if the parameters
  are fp32 themselves, because the entry above then holds the same values.

The N−1 evolved experts are dealt round robin over the data-parallel (x context-parallel) ranks, so that
there is one copy of each, as ZeRO does with optimizer state. They cannot be dealt over the expert-parallel
ranks: with TP 2 and expert TP 1 the expert-parallel rank equals the TP rank, and an expert on one rank
would lack the other rank's half of θ_1. Nothing here communicates.

Shape legend: N experts · L evolved experts kept by this rank · P a parameter's local (TP-sharded) shape.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, sharded_state_dict_default

from megatron_evomoe.config import ConfigError, MoEConfig
from megatron_evomoe.moe.evolution_rules import draw_beta, rule_named, validate_ranges
from megatron_evomoe.parallel import topology

BLOCK_CPU = 1 << 17
"""Elements that are updated at a time on a CPU.

The temporaries of a block stay in the cache, which was measured to be 4 times faster than whole tensors.
"""
BLOCK_CUDA = 1 << 22
"""Elements updated at a time on a GPU: a block's temporaries fit the L2 cache, and launches stay hidden."""


def evolving_mlp_spec(dense_mlp_spec: Any, moe: MoEConfig) -> ModuleSpec:
    """The spec of an evolving FFN that is made of the same parts as `dense_mlp_spec`.

    Args:
        dense_mlp_spec: what megatron-core takes for a dense layer's ``mlp``: a `ModuleSpec` (0.16) or a
        partial
            of ``MLP.as_mlp_submodule`` (0.19). It must not fuse the norm into ``linear_fc1``, because no MoE
            layer does, and the norm would have another name in stage III.
    """
    if isinstance(dense_mlp_spec, functools.partial):
        submodules = dense_mlp_spec.keywords["submodules"]
    else:
        submodules = dense_mlp_spec.submodules
    return ModuleSpec(module=EvolvingMLP, submodules=submodules, params={"moe": moe})


class EvolvingMLP(MLP):
    """megatron-core's dense `MLP`, which is θ_1, with the experts that evolve from it.

    Build it; load a dense checkpoint and call `begin()`, or load an evolve checkpoint, which needs no
    `begin()`; then call `evolve()` after every optimizer step.

    Raises:
        ConfigError: the ranges or the rule do not fit, or the FFN has parameters that an expert lacks.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        moe: MoEConfig,
        tp_group: Any = None,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        validate_ranges(moe.num_experts, moe.evolution_ranges)
        rule_named(moe.evolution_rule)
        # megatron-core 0.16 passes no group to a subclass of MLP, which then takes the default group; 0.19
        # passes the whole collection, and a name, which 0.16's MLP does not take.
        if tp_group is None and pg_collection is not None:
            tp_group = pg_collection.tp
        super().__init__(
            config,
            submodules,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=tp_group,
            **({} if name is None else {"name": name}),
        )
        known = {f"linear_fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
        if extra := {n for n, _ in self.named_parameters()} - known:
            raise ConfigError(
                f"the FFN to evolve has parameters an expert lacks: {sorted(extra)}; "
                "build it with an unfused norm (pre_mlp_layernorm) as MoE layers do"
            )
        self.moe = moe
        self.layer_number: int | None = None
        self.begun = False
        self._dp_cp_group = getattr(pg_collection, "dp_cp", None)
        # Not buffers, because Float16Module would cast those.
        self._evolved: dict[str, torch.Tensor] = {}  # name -> [L, *P], fp32
        self._previous: dict[str, torch.Tensor] = {}  # name -> [*P], in the parameters' dtype
        self.register_load_state_dict_post_hook(_after_load)

    def set_layer_number(self, layer_number: int) -> None:
        """Take the layer's global number (from 1), on which draws depend. `TransformerLayer` calls this."""
        self.layer_number = layer_number

    @property
    def owned(self) -> list[int]:
        """Global indices, from 1, of the evolved experts that this rank keeps (θ_1 has index 0)."""
        group = self._dp_cp_group or topology.current().data_and_context_group
        return list(range(1, self.moe.num_experts))[group.rank() :: group.size()]

    @torch.no_grad()
    def begin(self) -> None:
        """Set every θ_n to θ_1: once, when the stage starts from a dense checkpoint, and not on a resume."""
        for name, evolved in self._state().items():
            evolved.copy_(self.get_parameter(name).expand_as(evolved))
        self._remember()
        self.begun = True

    @torch.no_grad()
    def evolve(
        self,
        step: int,
        seed: int,
        rule: str | None = None,
        ranges: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        """Update every θ_n after optimizer step `step`.

        A rule that reads the gradient gets ``main_grad``, which is what Adam was given: reduced over all
        replicas, divided by the number of tokens, and clipped, because megatron-core clips fp32 gradients
        in place. (With ``grad_reduce_in_fp32=False`` Adam gets a clipped copy, and the rule the unclipped
        bf16 gradient.)

        Args:
            step, seed: of the draws, see `draw_beta`.
            rule, ranges: default to those of the configuration.

        Raises:
            ConfigError: the layer has no number, evolution has neither begun nor been loaded, or the rule
                reads a gradient or a previous θ_1 that this module does not have.
        """
        rule = rule or self.moe.evolution_rule
        chosen = rule_named(rule)
        ranges = self.moe.evolution_ranges if ranges is None else ranges
        validate_ranges(self.moe.num_experts, ranges)
        if self.layer_number is None:
            raise ConfigError(
                "EvolvingMLP has no layer_number, on which its draws depend; call set_layer_number(n), n >= 1"
            )
        if not self.begun:
            raise ConfigError(
                f"layer {self.layer_number}: evolve() was called before begin(); call it, or load an evolve "
                "checkpoint"
            )
        if chosen.needs_previous and self.owned and not self._previous:
            raise ConfigError(
                f"rule {rule!r} reads last step's expert 1, which a module configured for "
                f"{self.moe.evolution_rule!r} does not keep; set evolution_rule to {rule!r}"
            )
        betas = [draw_beta(seed, step, self.layer_number, n, *ranges[n - 1]) for n in self.owned]
        for name in self._state():
            self._evolve_parameter(name, chosen, betas)

    def _evolve_parameter(self, name: str, rule: Any, betas: list[float]) -> None:
        theta_1, evolved = self.get_parameter(name), self._evolved[name]
        block = BLOCK_CUDA if theta_1.is_cuda else BLOCK_CPU
        previous = self._previous[name].view(-1).split(block) if name in self._previous else None
        grad = self._gradient(name).view(-1).split(block) if rule.needs_gradient else None
        experts = [one.view(-1).split(block) for one in evolved]
        for i, piece in enumerate(theta_1.view(-1).split(block)):
            now = piece.float()
            before = previous[i].float() if previous and rule.needs_previous else None
            gradient = grad[i].float() if grad else None
            for expert, beta in zip(experts, betas, strict=True):
                rule.function(expert[i], now, before, gradient, beta)
            if previous:
                previous[i].copy_(piece)

    def _gradient(self, name: str) -> torch.Tensor:
        grad = getattr(self.get_parameter(name), "main_grad", None)
        if grad is None:
            raise ConfigError(
                f"this evolution rule reads {name}.main_grad, which only a parameter trained under "
                "megatron-core's DistributedDataParallel has; use 'delta' or 'ema' otherwise"
            )
        return grad

    def local_experts(self) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """(global index, {parameter name: fp32 tensor}) of every evolved expert that this rank keeps."""
        for i, n in enumerate(self.owned):
            yield n, {name: evolved[i] for name, evolved in self._state().items()}

    def _state(self) -> dict[str, torch.Tensor]:
        """The fp32 state. It is allocated at the first call, on the device where θ_1 is by then."""
        if not self._evolved and self.owned:
            self._evolved = {
                name: torch.zeros((len(self.owned), *p.shape), dtype=torch.float32, device=p.device)
                for name, p in self.named_parameters()
            }
        return self._evolved

    def _remember(self) -> None:
        """Set θ_1^prev to θ_1, in θ_1's dtype: a copy of these values gains nothing from fp32."""
        keep = rule_named(self.moe.evolution_rule).needs_previous and bool(self.owned)
        self._previous = {name: p.detach().clone() for name, p in self.named_parameters()} if keep else {}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The entries listed at the top of this file. θ_1^prev is not saved; between steps it equals θ_1."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        total, dtype = self.moe.num_experts, self.linear_fc1.weight.dtype
        put = functools.partial(
            expert_entries, self, prefix=prefix, offsets=sharded_offsets, metadata=metadata
        )
        # Detached, because megatron-core finds the entry of an optimizer shard by the identity of the
        # parameter, and that entry must be the dense one.
        trained = {name: p.detach() for name, p in self.named_parameters()}
        sharded.update(put(trained, 0, total, local="experts.0.", key="experts.experts.", only_copy=False))
        for n, tensors in self.local_experts():
            as_trained = {name: t.to(dtype) for name, t in tensors.items()}
            sharded.update(
                put(as_trained, n, total, local=f"experts.{n}.", key="experts.experts.", only_copy=True)
            )
            if dtype != torch.float32:
                entries = put(
                    tensors, n - 1, total - 1, local=f"evolution.{n}.", key="evolution.", only_copy=True
                )
                sharded.update({k: v for k, v in entries.items() if not k.endswith("_extra_state")})
        return sharded

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load the evolved experts and take their keys out, which name no parameter; then load θ_1.

        θ_1 is remembered in `_after_load`, because it is not loaded yet while this runs.
        """
        mine = {
            k: state_dict.pop(k)
            for k in list(state_dict)
            if k.startswith((f"{prefix}experts.", f"{prefix}evolution."))
        }
        source = "experts" if self.linear_fc1.weight.dtype == torch.float32 else "evolution"
        wanted = {
            f"{prefix}{source}.{n}.{name}": tensor
            for n, ts in self.local_experts()
            for name, tensor in ts.items()
        }
        # A rank that keeps no evolved expert recognises a resume by the copy of θ_1 among the experts.
        found = f"{prefix}experts.0.linear_fc1.weight" in mine and wanted.keys() <= mine.keys()
        if found:
            with torch.no_grad():
                for key, tensor in wanted.items():
                    tensor.copy_(mine[key])
        if found or f"{prefix}linear_fc1.weight" in state_dict:
            self.begun = found
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _after_load(module: EvolvingMLP, incompatible: Any) -> None:
    """Set θ_1^prev once θ_1 is loaded: on a resume both are equal, as when the checkpoint was written."""
    if module.begun:
        module._remember()


def expert_entries(
    mlp: MLP,
    tensors: dict[str, torch.Tensor],
    index: int,
    total: int,
    *,
    local: str,
    key: str,
    prefix: str,
    offsets: tuple,
    metadata: dict,
    only_copy: bool,
) -> dict[str, Any]:
    """One expert's entries in a sharded state dict, stacked as `SequentialMLP` stacks its experts.

    Args:
        mlp: the dense FFN, whose sharding `tensors` have.
        tensors: parameter name -> tensor of that parameter's local shape, of any dtype.
        index, total: the expert's place on the expert axis, and the axis's length.
        local, key: what follows `prefix` in the dictionary's keys, and in the checkpoint's keys.
        prefix, offsets, metadata: as of ``sharded_state_dict``.
        only_copy: whether no other rank of the data-parallel group holds this expert.
    """
    # With this setting of megatron-core the expert's index stands in the key and not on an axis.
    singleton = metadata.get("singleton_local_shards", False)
    key = f"{prefix}{key}{index}." if singleton else f"{prefix}{key}"
    stacked = offsets if singleton else (*offsets, (len(offsets), index, total))
    entries = {}
    for child in ("linear_fc1", "linear_fc2"):
        for name, entry in sharded_state_dict_default(
            getattr(mlp, child), f"{child}.", stacked, metadata
        ).items():
            replica = (*entry.replica_id[:2], 0) if only_copy else entry.replica_id
            entry = replace(entry, key=f"{key}{name}", replica_id=replica)
            if isinstance(entry, ShardedTensor):
                entry = replace(entry, data=tensors[name], dtype=tensors[name].dtype)
                if child == "linear_fc1" and mlp.config.gated_linear_unit:
                    entry = apply_swiglu_sharded_factory(entry, stacked, singleton)
            entries[f"{prefix}{local}{name}"] = entry
    return entries
