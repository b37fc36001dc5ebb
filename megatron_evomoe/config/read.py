"""Reads YAML and flags into a checked `RunConfig`."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_evomoe.config import deprecated, text
from megatron_evomoe.config.errors import ConfigError
from megatron_evomoe.config.kinds import STAGE_KINDS, StageKind
from megatron_evomoe.config.presets import PRESETS
from megatron_evomoe.config.renamed import present_names, present_sections
from megatron_evomoe.config.run import (
    FLAT,
    MODEL_SECTIONS,
    SECTIONS,
    STAGE_SECTIONS,
    RunConfig,
    StageConfig,
)
from megatron_evomoe.config.types import nearest, shown, validated

_MOST_STAGES = 1000


def load_config(path: str | Path | None, flags: dict[str, Any] | None = None) -> RunConfig:
    """Read a YAML file, let `flags` override its values, and check the result.

    Args:
        path: a YAML file (config/text.py); None reads the flags alone.
        flags: flat field names to values (`config.flags.flags_from`).

    Raises:
        ConfigError: the file cannot be read or is not a mapping, a key is unknown, a value has the wrong type
            or lies outside its range, or fields contradict each other.
    """
    return from_mapping(_sections_of(path) if path is not None else {}, flags)


def _sections_of(path: str | Path) -> dict[str, Any]:
    raw = text.read_file(path)
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(
            f"config file {path} holds a {type(raw).__name__}; a mapping of sections is expected"
        )
    return raw or {}


def from_mapping(raw: dict[str, Any], flags: dict[str, Any] | None = None) -> RunConfig:
    """A checked `RunConfig` of the content of a file and of flags.

    Args:
        raw: sections by name, and `preset` and `stages`.
        flags: as for `load_config`.

    Raises:
        ConfigError: as for `load_config`.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"a configuration must be a mapping of sections, got {shown(raw)}")
    _refuse_unknown(raw, {*SECTIONS, "preset", "stages"}, "section")
    raw = present_sections(raw)
    flags = present_names(flags or {})
    preset = flags.pop("preset", raw.get("preset"))
    layers: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    if preset is not None:
        for section, values in _preset(preset).items():
            layers[section].update(values)
        # a preset's file is not recorded: it may be gone when this configuration is read again
        preset = preset if preset in PRESETS else None
    for section in SECTIONS:
        layers[section].update(_section(section, raw.get(section)))
    _refuse_unknown(flags, FLAT, "flag")
    for key, value in flags.items():
        section, name = FLAT[key]
        layers[section][name] = value
    sections = {name: _build(name, values) for name, values in layers.items()}
    _refuse_unknown(sections["checkpoint"].allow_changed, FLAT, "field in allow_changed:")
    stages = _stages(raw.get("stages"))
    for stage in stages:  # a flag overrides the values of stages too
        stage.overrides = {k: v for k, v in stage.overrides.items() if k not in flags}
    config = RunConfig(preset=preset, stages=stages, **sections)
    config.check()
    for stage in stages:
        config.for_stage(stage.name)
    return config


def _section(section: str, values: Any, where: str = "") -> dict[str, Any]:
    """The fields that a section gives; an empty section gives none."""
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"section {section!r}{where} must be a mapping of fields, got {shown(values)}")
    _refuse_unknown(
        values or {}, [f.name for f in fields(SECTIONS[section])], f"key in section {section!r}{where}:"
    )
    return values or {}


def _preset(name: Any) -> dict[str, dict[str, Any]]:
    """The sections of a named preset, or of a YAML file that holds sections of a model only."""
    if not isinstance(name, str):
        raise ConfigError(f"preset must be a name or a YAML file, got {shown(name)}")
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"unknown preset {shown(name)}{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}, or a YAML "
            "file"
        )
    raw = present_sections(_sections_of(name))
    _refuse_unknown(raw, MODEL_SECTIONS, f"section in the preset file {name}:")
    return {section: _section(section, values, f" of {name}") for section, values in raw.items()}


def _build(section: str, values: dict[str, Any]) -> Any:
    return SECTIONS[section](**{name: coerce(section, name, value) for name, value in values.items()})


def _stages(entries: Any) -> list[StageConfig]:
    if entries is not None and not isinstance(entries, list):
        raise ConfigError(f"stages must be a list, [{{name: align, …}}, …], got {shown(entries)}")
    entries = entries or []
    if len(entries) > _MOST_STAGES:
        raise ConfigError(
            f"stages lists {len(entries)} stages, and at most {_MOST_STAGES} are read; divide them into "
            "several runs"
        )
    stages = [_build_stage(entry) for entry in entries]
    # in lower case, because some file systems do not distinguish Align from align
    for name, times in Counter(stage.name.lower() for stage in stages).items():
        if times > 1:
            raise ConfigError(f"stage names must be unique, and {name!r} appears {times} times; rename them")
    return stages


def _build_stage(entry: Any) -> StageConfig:
    if not isinstance(entry, dict) or "name" not in entry:
        raise ConfigError(f"each entry of stages must be a mapping with a name, got {shown(entry)}")
    entry = present_names(entry)
    name = validated(StageConfig, "name", entry.pop("name"), "a stage's name")
    load = validated(StageConfig, "load", entry.pop("load", None), f"stage {name!r}: load")
    kind = entry.pop("kind", name)
    if kind not in STAGE_KINDS:
        raise ConfigError(
            f"stage {name!r} has kind {shown(kind)}{nearest(kind, STAGE_KINDS)}; known: "
            f"{', '.join(STAGE_KINDS)}"
        )
    allowed = [key for key, (section, _) in FLAT.items() if section in STAGE_SECTIONS]
    _refuse_unknown(entry, allowed, f"key in stage {name!r}:")
    overrides = {key: coerce(*FLAT[key], value, f"stage {name!r}: ") for key, value in entry.items()}
    return StageConfig(name=name, kind=StageKind(kind), load=load, overrides=overrides)


def coerce(section: str, name: str, value: Any, where: str = "") -> Any:
    """`value` as the type of a field, which includes its range.

    Raises:
        ConfigError: the value is not of that type; the message begins with `where` and the field's name.
    """
    value = deprecated.current(section, name, value)
    return validated(SECTIONS[section], name, value, f"{where}{section}.{name}")


def _refuse_unknown(given: Any, known: Any, what: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown {what} {shown(key)}{nearest(key, known)}")
