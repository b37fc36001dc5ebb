"""Opens what is to be imported: one directory with a whole model, or a language model and a vision tower."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch

from megatron_evomoe.checkpoint.record import Ancestor, CheckpointError
from megatron_evomoe.config import MODEL_SECTIONS, STAGE_KINDS, ConfigError
from megatron_evomoe.config.kinds import MIXTURE_KINDS, PRETRAINED
from megatron_evomoe.config.presets import VISION_PRESETS
from megatron_evomoe.config.recipe import MODULES
from megatron_evomoe.hf.export_format import EMBEDDING, OUTPUT, OUTPUT_BIAS, OWN_KEY
from megatron_evomoe.hf.from_hf import canonical_names
from megatron_evomoe.hf.from_hf.config_defaults import TEXT_DEFAULTS, VISION_DEFAULTS
from megatron_evomoe.hf.from_hf.config_sections import (
    LLAVA_TYPES,
    language_section,
    llava_sections,
    refuse_type,
    vision_section,
)
from megatron_evomoe.hf.from_hf.config_values import ConfigValues
from megatron_evomoe.hf.from_hf.directory import HfDirectory, Place

log = logging.getLogger(__name__)

_KNOWN_TOWERS = {"clip-vit-large-patch14-336": "clip-l-336"}
_FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bin"]


@dataclass
class Source:
    """A model to import: configuration sections, stage kind, and tensors by canonical name."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    kind: str = PRETRAINED
    parts: list[str] = field(default_factory=list)
    tensors: dict[str, tuple[HfDirectory, str]] = field(default_factory=dict)
    tokenizer: Path | None = None
    """Directory that holds the tokenizer."""
    lineage: list[Ancestor] = field(default_factory=list)
    """If the source is an export of this package: the stages that it went through."""
    rows: dict[str, int] = field(default_factory=dict)
    """Canonical name -> rows to read of an embedding that has one more row, for the image token."""
    added: int = 0
    """Rows to append to the embeddings."""

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embeddings according to the configuration; None if it does not say."""
        found = self.sections.get("language", {}).get("vocab_size")
        return found if type(found) is int else None

    def grow(self, rows: int) -> None:
        """Append rows to the embeddings until there are `rows` of them.

        Each new row is the mean of the old ones, in the output layer and its bias too, so that a new token
        has the logit of an average one. Nothing is random, so an import can be repeated exactly.
        """
        if (before := self.vocabulary) is not None and rows > before:
            self.added, self.sections["language"]["vocab_size"] = rows - before, rows

    def place(self, name: str) -> Place:
        """Place of a tensor, with its shape after rows were taken away or added."""
        directory, original = self.tensors[name]
        place = directory.tensors[original]
        if not place.shape:
            return place
        rows = min(self.rows.get(name, place.shape[0]), place.shape[0]) + self._added_to(name)
        return replace(place, shape=(rows, *place.shape[1:]))

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor by its canonical name."""
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
        """A tensor's name in its file and that file's path, for messages."""
        directory, original = self.tensors[name]
        return f"{original} in {directory.tensors[original].file}"

    def add(self, directory: HfDirectory, keep: Callable[[str], bool] = lambda name: True) -> None:
        """Add the tensors of a directory whose canonical names `keep` accepts.

        Raises:
            CheckpointError: two names stand for the same tensor.
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
        model: directory or hub id of a LLaVA model or of an export of this package.
        language_model: directory or hub id of a language model, instead of `model`.
        vision_model: directory or hub id of a vision tower: with a language model, alone, or with a `model`
            whose directory lacks its tower, as in the format of LLaVA's own code.
        allow_remote_code: accept a directory that asks to run its own code. The code is not run.

    Raises:
        ConfigError: the arguments name nothing or contradict each other, or the model is not supported.
        CheckpointError: the weights are damaged or cannot be read.
    """
    if model is not None and language_model is not None:
        raise ConfigError(
            "--model and --language-model are both given; give a LLaVA model as --model, or its parts as "
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
    """Open a directory or the model of a hub id."""
    return HfDirectory(local_path(path))


def _open(path: str, allow_remote_code: bool) -> HfDirectory:
    directory = directory_of(path)
    if (wanted := directory.config.get("auto_map")) and OWN_KEY not in directory.config:
        kind = reprlib.repr(directory.config.get("model_type"))
        if not allow_remote_code:
            code = ", ".join(map(str, wanted.values())) if isinstance(wanted, dict) else reprlib.repr(wanted)
            raise ConfigError(
                f"{path} asks to run its own code ({code[:300]}), which is never run here. If its tensors "
                f"are those of a {kind}, as its model_type says, confirm that with --allow-remote-code"
            )
        log.warning(
            "%s comes with code of its own, which is not run; the model is imported as a %s", path, kind
        )
    return directory


def local_path(path: str) -> Path:
    """`path` itself if it is a directory, else that of the model that is downloaded from the hub.

    Raises:
        ConfigError: the model cannot be downloaded.
    """
    local = Path(path).expanduser()
    if local.is_dir() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        return local
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, allow_patterns=_FETCHED))
    except Exception as error:  # no network, no such model, no access
        raise ConfigError(
            f"{path} is not a directory here, and downloading it from the hub failed: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None


def _own_export(directory: HfDirectory) -> Source:
    whole = ConfigValues(f"{directory.path / 'config.json'}", directory.config, {})
    own = whole.section(OWN_KEY)
    kind = own.get("kind")
    if kind not in (*STAGE_KINDS, PRETRAINED) or not all(
        isinstance(own.get(s), dict) for s in MODEL_SECTIONS
    ):
        raise ConfigError(
            f"{directory.path / 'config.json'}: {OWN_KEY} must hold {', '.join(MODEL_SECTIONS)} and kind, "
            f"but holds {', '.join(own)}; export the checkpoint again"
        )
    sections = {
        name: dict(own[name]) for name in (*MODEL_SECTIONS, "data") if isinstance(own.get(name), dict)
    }
    source = Source(
        sections, kind if kind in MIXTURE_KINDS else PRETRAINED, list(MODULES), tokenizer=directory.path
    )
    source.lineage = _lineage(ConfigValues(whole.kind, own, {}), directory.path)
    if (
        directory.config.get("model_type") == "llava"
    ):  # transformers' LLaVA looks the image token up before it overwrites it
        rows = ConfigValues(f"{whole.kind}: {OWN_KEY}'s language", own["language"], {}).size("vocab_size")
        source.rows = dict.fromkeys((EMBEDDING, OUTPUT), rows)
    source.add(directory)
    return source


def _lineage(own: ConfigValues, path: Path) -> list[Ancestor]:
    """The stages that the model of an export went through."""
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
    kept = (*types, "path")
    return [
        cast("Ancestor", {key: entry[key] for key in kept if isinstance(entry.get(key), (str, int))})
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
                f"({config.get('mm_vision_tower', 'unnamed')}); give that model with --vision-model"
            )
        source.add(tower, lambda name: name.startswith("vision_tower."))
    return source


def _refuse_no_llava(directory: HfDirectory) -> NoReturn:
    """Refuse a --model that is not a LLaVA model, and say how it can be imported, if it can."""
    kind = directory.config.get("model_type")
    if isinstance(kind, str) and kind in (*TEXT_DEFAULTS, *VISION_DEFAULTS, "clip", "siglip"):
        raise ConfigError(
            f"{directory.path} holds a {kind!r}, which is not a LLaVA model ({', '.join(LLAVA_TYPES)}); give "
            "a language model as --language-model and a vision tower as --vision-model"
        )
    try:
        refuse_type(directory.config, dict.fromkeys(LLAVA_TYPES), "LLaVA model")
    except ConfigError as error:
        raise ConfigError(f"{directory.path}: {error}") from None


def _tower_of(config: dict[str, Any], directory: HfDirectory, tower: HfDirectory | None) -> dict[str, Any]:
    """The `vision` section for a model in LLaVA's own format, which only names its tower."""
    if tower is not None:
        return vision_section(tower.config)
    name = str(config.get("mm_vision_tower", "")).rstrip("/").split("/")[-1]
    if name in _KNOWN_TOWERS:
        return dict(VISION_PRESETS[_KNOWN_TOWERS[name]])
    raise ConfigError(
        f"{directory.path} does not give the sizes of its vision tower, {config.get('mm_vision_tower')!r}; "
        "give that model with --vision-model"
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
    """Remove the tensors that LLaVA does not use, and return their canonical names.

    Raises:
        CheckpointError: the configuration ties the output layer to the embedding, but the file has different
            values for both.
    """
    dropped = [name for name in source.tensors if canonical_names.is_unread(name, tower_layers)]
    if (
        source.sections.get("language", {}).get("tie_word_embeddings")
        and {OUTPUT, EMBEDDING} <= source.tensors.keys()
    ):
        if not torch.equal(source.read(OUTPUT), source.read(EMBEDDING)):
            raise CheckpointError(
                f"tie_word_embeddings is true, but {OUTPUT} differs from {EMBEDDING}; if that is intended, "
                "set tie_word_embeddings to false in config.json"
            )
        dropped.append(OUTPUT)
    for name in dropped:
        del source.tensors[name]
    return dropped


def require_floating(source: Source) -> None:
    """Raise `CheckpointError` unless every tensor is floating-point, as quantised ones are not."""
    for name in source.tensors:
        if not (dtype := source.place(name).dtype).is_floating_point:
            raise CheckpointError(
                f"{name} has dtype {dtype}, but weights must be floating-point; give the unquantised model"
            )


def sizes(source: Source) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield canonical name and shape of every tensor."""
    for name in source.tensors:
        yield name, source.place(name).shape
