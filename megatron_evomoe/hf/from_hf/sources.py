"""What an import starts from: one directory with everything, or a language model and a tower apart."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import MODEL_SECTIONS, STAGE_KINDS, ConfigError
from megatron_evomoe.config.kinds import MIXTURE_KINDS, PRETRAINED
from megatron_evomoe.config.presets import VISION_PRESETS
from megatron_evomoe.config.recipe import MODULES
from megatron_evomoe.hf.export_format import EMBEDDING, OUTPUT, OUTPUT_BIAS, OWN_KEY
from megatron_evomoe.hf.from_hf import canonical_names
from megatron_evomoe.hf.from_hf.config_sections import (
    LLAVA_TYPES,
    TEXT_DEFAULTS,
    VISION_DEFAULTS,
    language_section,
    llava_sections,
    refuse_type,
    vision_section,
)
from megatron_evomoe.hf.from_hf.config_values import Given
from megatron_evomoe.hf.from_hf.directory import HfDirectory, Place

log = logging.getLogger(__name__)

_KNOWN_TOWERS = {"clip-vit-large-patch14-336": "clip-l-336"}
_FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bin"]


@dataclass
class Source:
    """Sections of our configuration, the stage kind, and the tensors by canonical name."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    kind: str = PRETRAINED
    parts: list[str] = field(default_factory=list)
    tensors: dict[str, tuple[HfDirectory, str]] = field(default_factory=dict)
    tokenizer: Path | None = None
    """Directory the tokenizer is in."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """Of an export of ours: the stages it went through."""
    rows: dict[str, int] = field(default_factory=dict)
    """Canonical name -> rows that count, of an embedding which has one more for the image token."""

    added: int = 0
    """Rows that the embeddings get behind their own."""

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embeddings as the configuration has them."""
        found = self.sections.get("language", {}).get("vocab_size")
        return found if type(found) is int else None

    def grow(self, rows: int) -> None:
        """Add rows to the embeddings, up to so many. Each is the mean of their own (of an output layer's bias
        too), which gives a new token the logit that an average one has; nothing is drawn, so the same import
        gives the same numbers.
        """
        if (before := self.vocabulary) is not None and rows > before:
            self.added, self.sections["language"]["vocab_size"] = rows - before, rows

    def place(self, name: str) -> Place:
        """Where a tensor lies, and its shape once rows were taken away or added."""
        directory, original = self.tensors[name]
        place = directory.tensors[original]
        if not place.shape:
            return place
        rows = min(self.rows.get(name, place.shape[0]), place.shape[0]) + self._added_to(name)
        return replace(place, shape=(rows, *place.shape[1:]))

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its canonical name. With rows added it is a copy."""
        directory, original = self.tensors[name]
        tensor = directory.read(original)
        tensor = tensor[: self.rows[name]] if name in self.rows else tensor
        if count := self._added_to(name):
            mean = tensor.mean(dim=0, keepdim=True, dtype=torch.float64).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(count, *tensor.shape[1:])])
        return tensor

    def _added_to(self, name: str) -> int:
        return self.added if name in (EMBEDDING, OUTPUT, OUTPUT_BIAS) else 0

    def describe(self, name: str) -> str:
        """A tensor as its file calls it, for messages."""
        directory, original = self.tensors[name]
        return f"{original} in {directory.tensors[original].file}"

    def add(self, directory: HfDirectory, keep: Callable[[str], bool] = lambda name: True) -> None:
        """Take the directory's tensors whose canonical names are wanted.

        Raises:
            CheckpointError: two names mean the same tensor.
        """
        for name, original in canonical_names.canonical(directory.tensors, directory.path).items():
            if keep(name):
                self.tensors[name] = (directory, original)


def open_source(
    model: str | None,
    language_model: str | None,
    vision_model: str | None,
    *,
    allow_remote_code: bool = False,
) -> Source:
    """Read the configurations and list the tensors.

    Args:
        model: a LLaVA model or an export of ours; with `vision_model` the tower (LLaVA's own format leaves it
            elsewhere).
        language_model, vision_model: directories or hub ids, instead of `model`; either may be left out.
        allow_remote_code: accept a directory that asks for its own code; the code is not run.

    Raises:
        ConfigError: nothing or a contradiction given, or an unsupported model.
        CheckpointError: damaged or unreadable weights.
    """
    if model is not None and language_model is not None:
        raise ConfigError(
            "--model and --language-model are both given; a LLaVA model comes as --model, its parts apart as "
            "--language-model and --vision-model"
        )
    if not (model or language_model or vision_model):
        raise ConfigError("nothing to import: give --model, or --language-model and --vision-model")
    tower = _open(vision_model, allow_remote_code) if vision_model else None
    if model is None:
        return _from_parts(_open(language_model, allow_remote_code) if language_model else None, tower)
    directory = _open(model, allow_remote_code)
    return _own_export(directory) if OWN_KEY in directory.config else _llava(directory, tower)


def directory_of(path: str) -> HfDirectory:
    """A directory, or the model of that hub id. Raises as `HfDirectory` and `local_path`."""
    return HfDirectory(local_path(path))


def _open(path: str, allow_remote_code: bool) -> HfDirectory:
    directory = directory_of(path)
    if (wanted := directory.config.get("auto_map")) and OWN_KEY not in directory.config:
        kind = reprlib.repr(directory.config.get("model_type"))
        if not allow_remote_code:
            code = ", ".join(map(str, wanted.values())) if isinstance(wanted, dict) else reprlib.repr(wanted)
            raise ConfigError(
                f"{path} asks to run its own code ({code[:300]}); none of it is run here. If its tensors are "
                "those "
                f"of a {kind}, as its model_type says, confirm that with --allow-remote-code"
            )
        log.warning(
            "%s comes with code of its own; it is not run, and the model is taken for a %s", path, kind
        )
    return directory


def local_path(path: str) -> Path:
    """The directory itself, or that of a model fetched from the hub by its id. Raises `ConfigError` if it
    cannot be fetched.
    """
    local = Path(path).expanduser()
    if local.is_dir() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        return local
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, allow_patterns=_FETCHED))
    except Exception as error:  # no network, no such model, no access
        raise ConfigError(
            f"{path} is no directory here, and fetching it from the hub failed: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None


def _own_export(directory: HfDirectory) -> Source:
    whole = Given(f"{directory.path / 'config.json'}", directory.config, {})
    own = whole.section(OWN_KEY)
    kind = own.get("kind")
    if kind not in (*STAGE_KINDS, PRETRAINED) or not all(
        isinstance(own.get(s), dict) for s in MODEL_SECTIONS
    ):
        raise ConfigError(
            f"{directory.path / 'config.json'}: {OWN_KEY} must hold {', '.join(MODEL_SECTIONS)} and kind, "
            f"it holds {', '.join(own)}"
        )
    sections = {
        name: dict(own[name]) for name in (*MODEL_SECTIONS, "data") if isinstance(own.get(name), dict)
    }
    source = Source(
        sections, kind if kind in MIXTURE_KINDS else PRETRAINED, list(MODULES), tokenizer=directory.path
    )
    source.lineage = _lineage(Given(whole.kind, own, {}), directory.path)
    if (
        directory.config.get("model_type") == "llava"
    ):  # transformers' LLaVA looks the image token up before it overwrites it
        rows = Given(f"{whole.kind}: {OWN_KEY}'s language", own["language"], {}).size("vocab_size")
        source.rows = dict.fromkeys((EMBEDDING, OUTPUT), rows)
    source.add(directory)
    return source


def _lineage(own: Given, path: Path) -> list[dict[str, Any]]:
    """The stages that an export of ours went through."""
    stage = own.section("stage")
    if not stage:
        return []
    before = stage.get("lineage", [])
    steps = [*before, {**stage, "path": str(path)}] if isinstance(before, list) else [None]
    types = {"stage": str, "kind": str, "step": int}
    named = [
        {**entry, "stage": entry.get("stage", entry.get("name"))}
        for entry in steps
        if isinstance(entry, dict)
    ]
    if len(named) < len(steps) or not all(
        type(entry.get(key)) is t for entry in named for key, t in types.items()
    ):
        own.refuse("stage", "it must hold name, kind and step, and a lineage of such entries")
    return [
        {key: entry[key] for key in (*types, "path") if isinstance(entry.get(key), (str, int))}
        for entry in named
    ]


def _llava(directory: HfDirectory, tower: HfDirectory | None) -> Source:
    config = directory.config
    if config.get("model_type") not in LLAVA_TYPES:
        _refuse_no_llava(directory)
    language, vision = llava_sections(config)
    source = Source({"language": language, "vision": vision}, parts=list(MODULES), tokenizer=directory.path)
    source.add(directory)
    if language.get(
        "lm_head_bias"
    ):  # transformers' LLaVA has no bias there since 4.52, whatever the language model
        language["lm_head_bias"] = OUTPUT_BIAS in source.tensors
    if config["model_type"] != "llava":
        source.sections["vision"] = {**_tower_of(config, directory, tower), **vision}
    has_tower = any(name.startswith("vision_tower.") for name in source.tensors)
    if tower is not None and has_tower and config["model_type"] == "llava":
        raise ConfigError(f"{directory.path} has a vision tower of its own; leave --vision-model out")
    if not has_tower:
        if tower is None:
            raise ConfigError(
                f"{directory.path} does not hold its vision tower "
                f"({config.get('mm_vision_tower', 'unnamed')}); give "
                "that model's directory as --vision-model"
            )
        source.add(tower, lambda name: name.startswith("vision_tower."))
    return source


def _refuse_no_llava(directory: HfDirectory) -> NoReturn:
    """Of a model that comes whole: why it is none that can, or how its parts come."""
    kind = directory.config.get("model_type")
    if isinstance(kind, str) and kind in (*TEXT_DEFAULTS, *VISION_DEFAULTS, "clip", "siglip"):
        raise ConfigError(
            f"{directory.path} holds a {kind!r}, which is no LLaVA model ({', '.join(LLAVA_TYPES)}); a "
            "language "
            "model or a tower comes as --language-model or --vision-model"
        )
    try:
        refuse_type(directory.config, dict.fromkeys(LLAVA_TYPES), "LLaVA model")
    except ConfigError as error:
        raise ConfigError(f"{directory.path}: {error}") from None


def _tower_of(config: dict[str, Any], directory: HfDirectory, tower: HfDirectory | None) -> dict[str, Any]:
    """The sizes of LLaVA's own models' tower, which their configuration only names."""
    if tower is not None:
        return vision_section(tower.config)
    name = str(config.get("mm_vision_tower", "")).rstrip("/").split("/")[-1]
    if name in _KNOWN_TOWERS:
        return dict(VISION_PRESETS[_KNOWN_TOWERS[name]])
    raise ConfigError(
        f"{directory.path} does not say the sizes of its vision tower, {config.get('mm_vision_tower')!r}; "
        "give that "
        "model's directory as --vision-model"
    )


def _from_parts(language: HfDirectory | None, tower: HfDirectory | None) -> Source:
    source = Source()
    if tower is not None:
        source.sections["vision"] = vision_section(tower.config)
        source.parts.append("vision_model")
        source.add(tower)
    if language is not None:
        source.sections["language"] = language_section(language.config)
        source.parts.append("language_model")
        source.tokenizer = language.path
        source.add(language)
    return source


def drop_unread(source: Source, tower_layers: int) -> list[str]:
    """Take out the tensors LLaVA does not compute with; their canonical names.

    Raises:
        CheckpointError: the configuration ties the output layer to the embedding, and the file has another
            one.
    """
    dropped = [name for name in source.tensors if canonical_names.is_unread(name, tower_layers)]
    if (
        source.sections.get("language", {}).get("tie_word_embeddings")
        and {OUTPUT, EMBEDDING} <= source.tensors.keys()
    ):
        if not torch.equal(source.read(OUTPUT), source.read(EMBEDDING)):
            raise CheckpointError(
                f"tie_word_embeddings is true, but {OUTPUT} differs from {EMBEDDING}; if it is meant to, set "
                "tie_word_embeddings to false in config.json"
            )
        dropped.append(OUTPUT)
    for name in dropped:
        del source.tensors[name]
    return dropped


def require_floating(source: Source) -> None:
    """Raises `CheckpointError` unless every tensor is of a floating type (quantised weights are not)."""
    for name in source.tensors:
        if not (dtype := source.place(name).dtype).is_floating_point:
            raise CheckpointError(
                f"{name} is of type {dtype}; weights are of a floating type. Give the unquantised model"
            )


def sizes(source: Source) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(canonical name, shape) of every tensor."""
    for name in source.tensors:
        yield name, source.place(name).shape
