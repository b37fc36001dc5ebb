"""The FFN of a layer that will become a mixture, in stage II: computes θ_1 and drags the other experts along.

Forward and backward are the dense FFN's. Beside it this module keeps θ_2…θ_N in fp32, outside autograd, DDP,
the optimizer and ``bfloat16()`` casts. A checkpoint of it holds, per weight (``linear_fc1.weight``,
``linear_fc2.weight``, biases):

* ``mlp.linear_fc1.weight`` — θ_1, the dense FFN's own entry, on every rank: a resume and the optimizer's
  shards need it.
* ``mlp.experts.experts.linear_fc1.weight`` — θ_1…θ_N along an expert axis, under the keys, shapes and dtype a
  `MoELayer` loads, so that `route` starts from this checkpoint in any layout.
* ``mlp.evolution.linear_fc1.weight`` — θ_2…θ_N in fp32, for an exact resume; left out where the parameters
  are fp32 themselves, because the line above then says the same.

Who keeps what: the N−1 evolved experts are dealt round robin over the data-parallel (× context-parallel)
group, one copy in all, as ZeRO does with optimizer state. Expert-parallel rank would be the wrong criterion:
with TP 2 and expert TP 1 it coincides with the TP rank, and experts on one would lack the other's half of
θ_1. Nothing here communicates.

Shape legend: N experts, L evolved experts kept by this rank, P a parameter's local (TP-sharded) shape.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Optional

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, sharded_state_dict_default

from megatron_evomoe.config import ConfigError, MoEConfig
from megatron_evomoe.moe.evolution_rules import draw_beta, rule_named, validate_ranges
from megatron_evomoe.parallel import topology

BLOCK_CPU = 1 << 17
"""Elements updated at a time: the temporaries of a block stay in cache (measured: 4 times faster than whole
tensors).
"""
BLOCK_CUDA = 1 << 22
"""As above with the L2 cache of a GPU, yet large enough to hide kernel launches."""


def evolving_mlp_spec(dense_mlp_spec: Any, moe: MoEConfig) -> ModuleSpec:
    """The spec of an evolving FFN made of the same parts as `dense_mlp_spec`.

    Args:
        dense_mlp_spec: what core puts under a dense layer's ``mlp``: a `ModuleSpec` (0.16) or a partial of
            ``MLP.as_mlp_submodule`` (0.19). It must not fuse the norm into ``linear_fc1``: no MoE layer does,
            so the norm would be found under another name in stage III.
    """
    if isinstance(dense_mlp_spec, functools.partial):
        submodules = dense_mlp_spec.keywords["submodules"]
    else:
        submodules = dense_mlp_spec.submodules
    return ModuleSpec(module=EvolvingMLP, submodules=submodules, params={"moe": moe})


class EvolvingMLP(MLP):
    """megatron-core's dense `MLP` (θ_1) that keeps the experts evolved from it.

    Order of calls: build; load a dense checkpoint and `begin()`, or load an evolve checkpoint (which begins
    by itself); then `evolve()` after every optimizer step.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        moe: MoEConfig,
        tp_group: Any = None,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        name: Optional[str] = None,
    ) -> None:
        validate_ranges(moe.num_experts, moe.evolution_ranges)
        rule_named(moe.evolution_rule)
        # core 0.16 gives an MLP it does not know by identity no group at all (then MLP takes the default
        # one); 0.19 gives the whole collection, and a name that 0.16's MLP does not take.
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
        self.layer_number: Optional[int] = None
        self.begun = False
        self._dp_cp_group = getattr(pg_collection, "dp_cp", None)
        self._evolved: dict[
            str, torch.Tensor
        ] = {}  # name -> [L, *P] fp32; not buffers: Float16Module would cast those
        self._previous: dict[str, torch.Tensor] = {}  # name -> [*P], the parameters' dtype
        self.register_load_state_dict_post_hook(_after_load)

    def set_layer_number(self, layer_number: int) -> None:
        """Called by `TransformerLayer` with the global number, from 1: draws differ between layers by it."""
        self.layer_number = layer_number

    @property
    def owned(self) -> list[int]:
        """Global indices, from 1, of the evolved experts this rank keeps (θ_1 is index 0)."""
        group = self._dp_cp_group or topology.current().data_and_context_group
        return list(range(1, self.moe.num_experts))[group.rank() :: group.size()]

    @torch.no_grad()
    def begin(self) -> None:
        """θ_n := θ_1 for all n: once, when the stage starts from a dense checkpoint, and not on resume."""
        for name, evolved in self._state().items():
            evolved.copy_(self.get_parameter(name).expand_as(evolved))
        self._remember()
        self.begun = True

    @torch.no_grad()
    def evolve(
        self,
        step: int,
        seed: int,
        rule: Optional[str] = None,
        ranges: Optional[Sequence[tuple[float, float]]] = None,
    ) -> None:
        """Update θ_n after optimizer step `step`; `rule` and `ranges` default to the configuration's.

        A rule that needs it gets the gradient as it stands in ``main_grad``: reduced over all replicas,
        divided by the number of tokens and — because megatron-core clips fp32 gradients in that very memory —
        clipped, i.e. what Adam was given. (With ``grad_reduce_in_fp32=False`` Adam gets a clipped copy, and
        this the unclipped bf16 gradient.)

        Raises `ConfigError` when there is nothing to evolve from: no layer number, neither begun nor loaded,
        or no gradient.
        """
        rule = rule or self.moe.evolution_rule
        chosen = rule_named(rule)
        ranges = self.moe.evolution_ranges if ranges is None else ranges
        validate_ranges(self.moe.num_experts, ranges)
        if self.layer_number is None:
            raise ConfigError(
                "EvolvingMLP has no layer_number, which its draws depend on; call set_layer_number(n), n "
                "from 1"
            )
        if not self.begun:
            raise ConfigError(
                f"layer {self.layer_number}: evolve() before begin() or loading an evolve checkpoint"
            )
        if chosen.needs_previous and self.owned and not self._previous:
            raise ConfigError(
                f"rule {rule!r} needs last step's expert 1, which a module configured for "
                f"{self.moe.evolution_rule!r} does not keep; set evolution_rule"
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
        """(global index, {parameter name: its fp32 tensor}) of every evolved expert kept here."""
        for i, n in enumerate(self.owned):
            yield n, {name: evolved[i] for name, evolved in self._state().items()}

    def _state(self) -> dict[str, torch.Tensor]:
        """The fp32 state, allocated where θ_1 lives by then."""
        if not self._evolved and self.owned:
            self._evolved = {
                name: torch.zeros((len(self.owned), *p.shape), dtype=torch.float32, device=p.device)
                for name, p in self.named_parameters()
            }
        return self._evolved

    def _remember(self) -> None:
        """θ_1^prev := θ_1. In θ_1's own dtype: it is a copy of those values, so fp32 would only add zeros."""
        keep = rule_named(self.moe.evolution_rule).needs_previous and bool(self.owned)
        self._previous = {name: p.detach().clone() for name, p in self.named_parameters()} if keep else {}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Optional[dict] = None
    ) -> dict[str, Any]:
        """The entries the module's docstring lists. θ_1^prev is not among them: saved between steps it equals
        θ_1.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        total, dtype = self.moe.num_experts, self.linear_fc1.weight.dtype
        put = functools.partial(
            expert_entries, self, prefix=prefix, offsets=sharded_offsets, metadata=metadata
        )
        # detach(): core finds an optimizer shard's entry by the identity of the parameter, and must find the
        # dense one.
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
        """Takes its own keys out (they name no parameter), then lets torch go on.

        Runs before θ_1's own load, hence the last act, remembering θ_1, is left to `_after_load`.
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
        # A rank that keeps no expert still knows a resume by the copy of θ_1.
        found = f"{prefix}experts.0.linear_fc1.weight" in mine and wanted.keys() <= mine.keys()
        if found:
            with torch.no_grad():
                for key, tensor in wanted.items():
                    tensor.copy_(mine[key])
        if found or f"{prefix}linear_fc1.weight" in state_dict:
            self.begun = found
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _after_load(module: EvolvingMLP, incompatible: Any) -> None:
    """Runs when θ_1 is loaded too: on resume θ_1^prev is θ_1, as it was when the checkpoint was written."""
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
    """One expert's entries in a sharded state dict, stacked with the others' as
    `SequentialMLP.sharded_state_dict` does.

    Args:
        mlp: the dense FFN whose sharding `tensors` share.
        tensors: parameter name -> tensor of that parameter's local shape, any dtype.
        index, total: place on the expert axis and its length.
        local, key: what follows `prefix` in the dictionary's keys and in the checkpoint's.
        only_copy: whether no other rank of the data-parallel group holds this expert.
    """
    singleton = metadata.get(
        "singleton_local_shards", False
    )  # newer cores name the expert in the key, not on an axis
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
