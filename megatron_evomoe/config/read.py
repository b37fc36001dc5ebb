"""From YAML and flags to a checked `RunConfig`."""

from __future__ import annotations

import difflib
import os
import re
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pydantic
import yaml

from megatron_evomoe.config.check import check
from megatron_evomoe.config.errors import ConfigError
from megatron_evomoe.config.run import FLAT, MODEL_SECTIONS, SECTIONS, STAGE_KINDS, STAGE_SECTIONS, RunConfig, StageConfig
from megatron_evomoe.presets import PRESETS

_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}")


def load_config(path: str | Path | None, flags: dict[str, Any] | None = None) -> RunConfig:
    """Read a YAML file, put `flags` (flat names) over it, and check the result.

    Raises:
        ConfigError: the file is missing or no mapping, a key is unknown (names the nearest), a value has the wrong
            type, or fields contradict each other.
    """
    return from_mapping(_read_yaml(path) if path is not None else {}, flags)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(_expand_environment(Path(path).read_text(), path)) or {}
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {path} holds a {type(raw).__name__}; a mapping of sections is expected")
    return raw


def _expand_environment(text: str, path: str | Path) -> str:
    """``${NAME}`` and ``${NAME:-default}`` replaced by the environment's values, outside comments."""

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if name not in os.environ and default is None:
            raise ConfigError(f"config file {path} uses ${{{name}}}, which the environment does not set; export {name}=…")
        return os.environ.get(name) or default or ""

    lines = text.splitlines(keepends=True)
    return "".join(line if line.lstrip().startswith("#") else _VARIABLE.sub(value, line) for line in lines)


def from_mapping(raw: dict[str, Any], flags: dict[str, Any] | None = None) -> RunConfig:
    """Sections (and `preset`, `stages`) plus flat flags to a checked `RunConfig`."""
    _refuse_unknown(raw, {*SECTIONS, "preset", "stages"}, "section")
    flags = dict(flags or {})
    preset = flags.pop("preset", raw.get("preset"))
    layers: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    if preset is not None:
        for section, values in _preset(preset).items():
            layers[section].update(values)
        preset = preset if preset in PRESETS else None  # a file may be gone when this configuration is read again
    for section in SECTIONS:
        values = raw.get(section) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"section {section!r} must be a mapping, got {values!r}")
        _refuse_unknown(values, {f.name for f in fields(SECTIONS[section])}, f"key in section {section!r}:")
        layers[section].update(values)
    _refuse_unknown(flags, FLAT, "flag")
    for key, value in flags.items():
        section, name = FLAT[key]
        layers[section][name] = value
    sections = {name: _build(name, values) for name, values in layers.items()}
    _refuse_unknown(sections["checkpoint"].allow_changed, FLAT, "field in allow_changed:")
    stages = [_build_stage(entry) for entry in raw.get("stages") or []]
    for stage in stages:  # a flag on the command line wins over a stage's own value too
        stage.overrides = {k: v for k, v in stage.overrides.items() if k not in flags}
    config = RunConfig(preset=preset, stages=stages, **sections)
    names = [s.name for s in stages]
    if len(set(names)) != len(names):
        raise ConfigError(f"stage names must be unique, got {names}")
    check(config)
    for stage in stages:
        config.for_stage(stage.name)
    return config


def _preset(name: str) -> dict[str, dict[str, Any]]:
    """Sections of a named preset, or of a YAML file that holds the sections of a model alone."""
    if name in PRESETS:
        return PRESETS[name]
    if not str(name).endswith((".yaml", ".yml")):
        raise ConfigError(f"unknown preset {name!r}{_nearest(name, PRESETS)}; known: {', '.join(PRESETS)}, or a YAML file")
    raw = _read_yaml(name)
    _refuse_unknown(raw, MODEL_SECTIONS, f"section in the preset file {name}:")
    for section, values in raw.items():
        _refuse_unknown(values, {f.name for f in fields(SECTIONS[section])}, f"key in section {section!r} of {name}:")
    return raw


def _build(section: str, values: dict[str, Any]) -> Any:
    return SECTIONS[section](**{name: coerce(section, name, value) for name, value in values.items()})


def _build_stage(entry: Any) -> StageConfig:
    if not isinstance(entry, dict) or "name" not in entry:
        raise ConfigError(f"each entry of stages must be a mapping with a name, got {entry!r}")
    entry = dict(entry)
    name, load = str(entry.pop("name")), entry.pop("load", None)
    kind = entry.pop("kind", name)
    if kind not in STAGE_KINDS:
        raise ConfigError(f"stage {name!r} has kind {kind!r}{_nearest(kind, STAGE_KINDS)}; known: {', '.join(STAGE_KINDS)}")
    allowed = {key for key, (section, _) in FLAT.items() if section in STAGE_SECTIONS}
    _refuse_unknown(entry, allowed, f"key in stage {name!r}:")
    overrides = {key: coerce(*FLAT[key], value) for key, value in entry.items()}
    return StageConfig(name=name, kind=kind, load=load, overrides=overrides)


def coerce(section: str, name: str, value: Any) -> Any:
    """`value` as the field's type. Raises `ConfigError`."""
    kind = typing.get_type_hints(SECTIONS[section], include_extras=True)[name]
    try:
        return pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.ValidationError as error:
        what = error.errors()[0]["msg"]
        raise ConfigError(f"{section}.{name} = {value!r}: {what}") from None


def _refuse_unknown(given: Any, known: Any, what: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown {what} {key!r}{_nearest(str(key), known)}")


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""
