"""The fields in which a checkpoint's configuration and the present one differ.

Both configurations have the stage's own values in place. Values are compared by their meaning: a preset
equals its fields spelled out, and `num_query_groups` left out equals as many groups as heads. Nothing here
reads a file or communicates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_evomoe.config import SECTIONS, ConfigError, RunConfig
from megatron_evomoe.config.kinds import MIXTURE_KINDS, StageKind
from megatron_evomoe.config.read import coerce
from megatron_evomoe.config.recipe import TRAINS
from megatron_evomoe.config.renamed import present_names, present_sections
from megatron_evomoe.config.resume import OnResume, on_resume
from megatron_evomoe.config.run import FLAT, flat_name

DENSE = tuple(kind for kind in StageKind if not kind.has_mixture)
_BEGINNING_ONLY = {
    ("language", "init_method_std"),
    ("vision", "init_method_std"),
    ("moe", "dtr_init_std"),
    ("moe", "expert_init"),
    ("moe", "expert_init_noise"),
}
"""Fields that decide how fresh weights are drawn. They do not change the meaning of loaded weights."""


@dataclass(frozen=True)
class Change:
    """A field whose value differs from the checkpoint's configuration."""

    section: str
    field: str
    before: Any
    now: Any
    kind: OnResume
    note: str = ""

    @property
    def flag(self) -> str:
        """The field's name on the command line, without dashes: ``rotary_base``, ``vision_hidden_size``."""
        return flat_name(self.section, self.field)

    def __str__(self) -> str:
        return f"{self.flag} {show(self.before)} → {show(self.now)}" + (
            f" ({self.note})" if self.note else ""
        )


def show(value: Any) -> str:
    """A value as a configuration file spells it, cut to 80 characters."""
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def stored_config(raw: dict[str, Any], stage: str | None) -> RunConfig | None:
    """The configuration in a checkpoint with the values of `stage` in place. It may be of an older version.

    A field that the checkpoint lacks gets today's default, and a field that no longer exists is left out.
    Values that would be refused today stay as they are, because a comparison needs no runnable configuration.

    Args:
        raw: the mapping in ``run_config.yaml``.
        stage: one of its stages; none takes the sections as they are (imported weights have no stages).

    Returns:
        None if the configuration has no such stage or no sections at all.
    """
    raw = present_sections(raw, is_silent=True)
    sections = {name: raw[name] for name in SECTIONS if isinstance(raw.get(name), dict)}
    stages = raw.get("stages")
    named = (
        [s for s in stages if isinstance(s, dict) and s.get("name") == stage]
        if isinstance(stages, list)
        else []
    )
    if not sections or (stage is not None and not named):
        return None
    values = {name: dict(sections.get(name, {})) for name in SECTIONS}
    for key, value in present_names(named[0] if named else {}, is_silent=True).items():
        if key in FLAT:
            section, field = FLAT[key]
            values[section][field] = value
    return RunConfig(**{name: _section(name, given) for name, given in values.items()})


def _section(name: str, given: dict[str, Any]) -> Any:
    cls = SECTIONS[name]
    section = cls()
    for field in dataclasses.fields(cls):
        if field.name in given:
            object.__setattr__(section, field.name, _coerced(name, field.name, given[field.name]))
    return section


def _coerced(section: str, field: str, value: Any) -> Any:
    try:
        return coerce(section, field, value)
    except ConfigError:
        return value


def changes(before: RunConfig, now: RunConfig, kind: StageKind) -> list[Change]:
    """All fields that differ in their meaning, whatever their class, in the order of the configuration.

    Args:
        before, now: both with one stage's values in place.
        kind: the stage's kind. A must-equal field that such a stage does not use has class `LOGGED` here.
    """
    found = []
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            change = _change(section, field.name, before, now, kind)
            if change is not None:
                found.append(change)
    return found


def _change(section: str, field: str, before: RunConfig, now: RunConfig, kind: StageKind) -> Change | None:
    old, new = (plain(getattr(getattr(config, section), field)) for config in (before, now))
    if old == new or _meaning(section, field, before, kind) == _meaning(section, field, now, kind):
        return None
    of_class, note = on_resume(SECTIONS[section], field), ""
    if of_class is OnResume.MUST_EQUAL and not (
        _is_used(section, field, before, kind) or _is_used(section, field, now, kind)
    ):
        of_class, note = OnResume.LOGGED, f"of no use to a stage of kind {kind}"
    return Change(section, field, old, new, of_class, note)


def model_changes(
    before: RunConfig, now: RunConfig, source_kind: str, kind: StageKind, parts: list[str]
) -> list[Change]:
    """The must-equal fields that give a checkpoint's weights another meaning where a stage begins from them.

    Many of these fields change no tensor's shape: RoPE, epsilons, activations, windows, the size of a head.

    Args:
        before: the configuration that the checkpoint was saved under.
        now: the present configuration with the values of the beginning stage in place.
        source_kind, kind: the kinds of the checkpoint and of the stage.
        parts: the top-level parts of the model that the checkpoint covers.
    """
    sections = {
        "language": "language_model" in parts,
        "vision": "vision_model" in parts,
        "moe": source_kind in MIXTURE_KINDS,
    }
    found = [
        c
        for c in changes(before, now, kind)
        if sections.get(c.section)
        and c.kind is OnResume.MUST_EQUAL
        and (c.section, c.field) not in _BEGINNING_ONLY
    ]
    if "vision_projection" not in parts:  # nothing has been trained on the tower's features
        found = [
            c
            for c in found
            if (c.section, c.field)
            not in {("vision", "feature_layer"), ("vision", "feature_select"), ("vision", "num_layers")}
        ]
    if source_kind == StageKind.EVOLVE:  # it has no router
        found = [c for c in found if c.section != "moe" or c.field in ("num_experts", "moe_layer_freq")]
    # another router starts fresh, which is logged
    if source_kind == StageKind.ROUTE and before.moe.router != now.moe.router:
        found = [c for c in found if c.field != "router" and not c.field.startswith("dtr_")]
    return found


def plain(value: Any) -> Any:
    """`value` with tuples as lists, as YAML reads them back."""
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _is_used(section: str, field: str, config: RunConfig, kind: StageKind) -> bool:
    """Whether a stage of `kind` uses a field in computing or drawing anything."""
    # the places of MoE layers also decide the names of tensors in dense stages
    if section != "moe" or field == "moe_layer_freq":
        return True
    if kind in DENSE:
        return False
    evolves = field.startswith("evolution_")
    if kind == StageKind.EVOLVE:
        return evolves or field == "num_experts"
    if field.startswith("dtr_"):
        return config.moe.router == "dtr"
    return not evolves and (field != "expert_init_noise" or config.moe.expert_init == "noise")


_Meaning = Callable[[RunConfig, StageKind], Any]
_MEANINGS: dict[tuple[str, str], _Meaning] = {
    ("language", "num_query_groups"): lambda c, _: c.language.query_groups,
    ("language", "kv_channels"): lambda c, _: c.language.head_size,
    ("language", "rope_scaling_type"): lambda c, _: (
        c.language.rope_scaling_type if c.language.rope_scaling_factor != 1 else None
    ),
    ("language", "rope_scaling_factor"): lambda c, _: (
        c.language.rope_scaling_factor if c.language.rope_scaling_type else 1
    ),
    ("vision", "num_layers"): lambda c, _: c.vision.num_layers_used,
    ("vision", "feature_layer"): lambda c, _: c.vision.num_layers_used,
    ("vision", "feature_select"): lambda c, _: (
        c.vision.feature_select if c.vision.model_type == "clip" else "patch"
    ),
    ("moe", "evolution_beta"): lambda c, _: c.moe.evolution_ranges,
    # a damaged checkpoint may have any number of layers; no configuration has more than 4096
    ("moe", "moe_layer_freq"): lambda c, _: c.moe.layer_pattern(min(c.language.num_layers, 4096)),
    ("optimizer", "lr_decay_iters"): lambda c, _: c.optimizer.lr_decay_iters or c.train.train_iters,
    ("parallel", "sequence_parallel"): lambda c, _: (
        c.parallel.tensor_model_parallel_size > 1
        if c.parallel.sequence_parallel is None
        else c.parallel.sequence_parallel
    ),
    ("train", "trainable"): lambda c, kind: sorted({*(c.train.trainable or TRAINS.get(kind, ()))}),
    ("train", "recompute_modules"): lambda c, _: (
        sorted({*c.train.recompute_modules}) if c.train.recompute_granularity == "selective" else None
    ),
    ("train", "recompute_num_layers"): lambda c, _: (
        c.train.recompute_num_layers if c.train.recompute_granularity == "full" else None
    ),
}


def _meaning(section: str, field: str, config: RunConfig, kind: StageKind) -> Any:
    raw = plain(getattr(getattr(config, section), field))
    try:
        return plain(_MEANINGS.get((section, field), lambda *_: raw)(config, kind))
    except (TypeError, ValueError, IndexError, ZeroDivisionError):  # a value that would be refused today
        return raw
