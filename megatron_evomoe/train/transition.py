"""Loads the weights that a stage begins with: those of the stage before it, or imported ones."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_evomoe.checkpoint import find, store
from megatron_evomoe.checkpoint.record import CheckpointError, Record
from megatron_evomoe.config import RunConfig, StageConfig
from megatron_evomoe.config.kinds import MIXTURE_KINDS, StageKind
from megatron_evomoe.config.recipe import MODULES, STARTS_FROM
from megatron_evomoe.data.tokenizer import same_tokenizer
from megatron_evomoe.moe import expert_init
from megatron_evomoe.train.built import Built

_ROUTER = r"\.mlp\.router\."
# The norm before an FFN is stored under the first name in MoE layers, where no norm can be fused into the
# experts, and elsewhere under the second, Transformer Engine's name. Existing checkpoints hold both names, so
# both must stay.
_NORM_NAMES = (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
_EVOLUTION = r"\.mlp\.(experts|evolution)\."


def start_from(
    folder: Path, built: Built, config: RunConfig, stage: StageConfig, *, fingerprint: str
) -> tuple[Record, list[str]]:
    """Load a checkpoint's weights into a stage that is beginning. Communicates.

    Args:
        folder: a checkpoint that was found good (`find.resolve`).

    Returns:
        The source's record, and the names of the tensors that start fresh on any rank.

    Raises:
        CheckpointError: the source is of a kind that this stage cannot start from, of another model (also of
            a larger one that contains this model), or was trained with another tokenizer.
    """
    source = find.record_of(folder)
    _check_source(source, folder, stage, config, fingerprint)
    dense_to_mixture = stage.kind == StageKind.ROUTE and source.kind not in MIXTURE_KINDS
    if dense_to_mixture and config.moe.expert_init == "evolve":
        raise CheckpointError(
            f"stage {stage.name!r} wants evolved experts (expert_init: evolve), but {folder} is a "
            f"{source.kind!r} checkpoint; put an evolve stage before it, or choose replicate or noise"
        )
    fresh_allowed = [_ROUTER, _EVOLUTION] if stage.kind == StageKind.EVOLVE else [_ROUTER]
    fresh_allowed += [rf"^{module}\." for module in MODULES if module not in source.parts]
    states = []
    for module in built.modules:
        state = module.sharded_state_dict(metadata=store.metadata())
        if dense_to_mixture:
            state = expert_init.read_experts_from_dense(state)
        if stage.kind == StageKind.EVOLVE:
            state = {k: v for k, v in state.items() if not re.search(_EVOLUTION, getattr(v, "key", k))}
        states.append(state)
    states = _under_stored_names(states, folder)
    loaded, fresh = store.load_weights(
        folder,
        states,
        may_be_fresh=re.compile("|".join(fresh_allowed)),
        may_be_left=_may_be_left(source, stage),
    )
    for module, tensors in zip(built.modules, loaded, strict=True):
        module.load_state_dict(_tensors(tensors), strict=False)
    built.optimizer.reload_model_params()  # copies the loaded weights to the optimizer's fp32 ones
    for mlp in built.evolving:
        mlp.begin()
    if dense_to_mixture and config.moe.expert_init == "noise":
        for layer in built.mixtures():
            expert_init.add_noise(
                layer.experts, config.train.seed, layer.layer_number, config.moe.expert_init_noise
            )
        built.optimizer.reload_model_params()
    return source, _families(fresh)


def _may_be_left(source: Record, stage: StageConfig) -> re.Pattern[str]:
    """The keys of the checkpoint that the stage may leave unread. All others must be loaded."""
    # another router starts fresh; the fp32 copies of evolved experts are there for a resume
    keys = [_ROUTER, r"\.mlp\.evolution\."]
    if source.kind == StageKind.EVOLVE:
        keys.append(r"\.mlp\.linear_fc[12]\.")  # expert 1, which is stored among the experts as well
    if "vision_projection" not in source.parts:
        # an imported tower is whole, but the layers above `feature_layer` are not built
        keys.append(r"^vision_model\.")
    return re.compile("|".join(keys))


def _under_stored_names(states: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Read each norm before an FFN under the name it was stored by (see `_NORM_NAMES`).

    The names differ where the checkpoint comes from a run, or an import, whose MoE layers were others.
    """
    stored = store.tensor_shapes(folder)

    def entry_for(entry: Any) -> Any:
        key = getattr(entry, "key", "")
        for name, other in (_NORM_NAMES, _NORM_NAMES[::-1]):
            if name in key and key not in stored and (twin := key.replace(name, other)) in stored:
                return replace(entry, key=twin)
        return entry

    return [{name: entry_for(entry) for name, entry in state.items()} for state in states]


def _check_source(
    source: Record, folder: Path, stage: StageConfig, config: RunConfig, fingerprint: str
) -> None:
    if source.kind not in STARTS_FROM[stage.kind]:
        raise CheckpointError(
            f"stage {stage.name!r} ({stage.kind}) cannot start from {folder}, a {source.kind!r} checkpoint; "
            f"it starts from {' or '.join(STARTS_FROM[stage.kind])}"
        )
    check_tokenizer(source, folder, fingerprint)
    if "language_model" in source.parts and source.vocab_size != config.language.vocab_size:
        # megatron-core itself lets embeddings differ in size, because their padding depends on the layout
        raise CheckpointError(
            f"{folder} has a vocabulary of {source.vocab_size}, this run one of {config.language.vocab_size}"
        )
    if stage.kind == StageKind.ROUTE and source.num_experts not in (0, config.moe.num_experts):
        raise CheckpointError(
            f"{folder} holds {source.num_experts} experts per layer, this run asks for "
            f"{config.moe.num_experts}"
        )


def check_tokenizer(source: Record, folder: Path, fingerprint: str) -> None:
    """Raise `CheckpointError` unless the checkpoint's weights were trained with this run's tokenizer."""
    if "language_model" in source.parts and not same_tokenizer(source.tokenizer_fingerprint, fingerprint):
        (theirs, their_rules), (ours, our_rules) = (
            f.split(".") if "." in f else (f, "") for f in (source.tokenizer_fingerprint, fingerprint)
        )
        what = (
            f"fingerprint {theirs[:12]}; this run's is {ours[:12]}"
            if theirs != ours
            else f"the same pieces by other rules or scores, {their_rules}; this run's are {our_rules}"
        )
        raise CheckpointError(
            f"{folder} was trained with another tokenizer (vocabulary {source.vocab_size}, {what}); token "
            "ids would mean other words. Point --tokenizer at the one it was trained with"
        )


def _tensors(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tree.items() if torch.is_tensor(v)}


def _families(keys: list[str]) -> list[str]:
    """`keys` for a short message: whole parts by their name, other keys without layer numbers."""
    parts = {key.split(".", 1)[0] for key in keys if not re.search(_ROUTER, key)}
    return sorted(
        {*parts, *(re.sub(r"\.\d+\.", ".*.", key) for key in keys if key.split(".", 1)[0] not in parts)}
    )
