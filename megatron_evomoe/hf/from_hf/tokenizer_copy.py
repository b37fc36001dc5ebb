"""Copies the tokenizer of an imported model, in a form that `data.tokenizer` reads."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.tokenizer import build_tokenizer

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.sha256",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class CopiedTokenizer:
    """A tokenizer that was copied, or the reason why there is none."""

    path: str | None = None
    """Path for ``data.tokenizer``, relative to the folder; ``""`` is the folder itself.

    None without a tokenizer.
    """
    size: int = 0
    """Largest token id + 1."""
    note: str = ""
    """For the report: how the tokenizer was converted, or why there is none."""


def copy_tokenizer(source: Path | None, folder: Path) -> CopiedTokenizer:
    """Copy the tokenizer of the directory `source` to `folder`, and check that it can be read.

    ``tokenizer.json`` is used if there is one; else ``vocab.json`` with ``merges.txt``, which transformers
    converts; else a sentencepiece ``tokenizer.model``. Code in the directory is not run.

    Args:
        source: None if nothing with a tokenizer is imported.
        folder: must not exist. It is created if there is a tokenizer.
    """
    if source is None:
        return CopiedTokenizer()
    present = [name for name in _FILES if (source / name).is_file()]
    folder.mkdir(parents=True)
    for name in present:
        shutil.copyfile(source / name, folder / name)
    if (source / _SUMS).is_file():  # may list other files too
        lines = (source / _SUMS).read_text(errors="replace").splitlines()
        kept = [line for line in lines if line.strip().partition(" ")[2].strip().removeprefix("*") in present]
        (folder / _SUMS).write_text("".join(f"{line}\n" for line in kept))
    ways = {"tokenizer.json": _as_it_is, "vocab.json": _converted, "tokenizer.model": _sentencepiece}
    problems: list[str] = []
    for name, way in ways.items():
        if name in present and (name != "vocab.json" or "merges.txt" in present):
            try:
                brought = way(source, folder)
                return CopiedTokenizer(
                    brought.path, brought.size, "; ".join([brought.note, *problems]).strip("; ")
                )
            except ConfigError as error:
                for useless in (name, "tokenizer.json"):
                    (folder / useless).unlink(missing_ok=True)
                problems.append(f"{name} cannot be used ({_without(str(error), folder)})")
    shutil.rmtree(folder)
    looked_for = "it has no tokenizer.json, no vocab.json with merges.txt and no tokenizer.model"
    return CopiedTokenizer(note="; ".join(problems) or f"{source}: {looked_for}")


def _as_it_is(source: Path, folder: Path) -> CopiedTokenizer:
    if not _has_transformers():
        return CopiedTokenizer(
            "",
            _size_of(folder / "tokenizer.json"),
            "training needs transformers to read it: pip install 'megatron_evomoe[hf]'",
        )
    return CopiedTokenizer("", _size(folder))


def _sentencepiece(source: Path, folder: Path) -> CopiedTokenizer:
    return CopiedTokenizer("tokenizer.model", _size(folder / "tokenizer.model"))


def _converted(source: Path, folder: Path) -> CopiedTokenizer:
    """Let transformers convert vocab.json and merges.txt; its conversion writes a ``tokenizer.json``."""
    if not _has_transformers():
        raise ConfigError(
            "converting vocab.json and merges.txt needs transformers: pip install 'megatron_evomoe[hf]'"
        )
    from transformers import AutoTokenizer

    _guarded(
        lambda: AutoTokenizer.from_pretrained(
            str(source), local_files_only=True, trust_remote_code=False, use_fast=True
        ).save_pretrained(str(folder))
    )
    size = _size(folder)
    if not _guarded(lambda: _same_pieces(source, folder / "tokenizer.json")):
        raise ConfigError(
            "transformers converts it to a different tokenizer; save a tokenizer.json in the source"
        )
    return CopiedTokenizer("", size, "transformers converted vocab.json and merges.txt to tokenizer.json")


def _same_pieces(source: Path, made: Path) -> bool:
    """Whether the ``tokenizer.json`` at `made` has the pieces, ids and number of merges of the source."""
    pieces = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    merges = (source / "merges.txt").read_text(encoding="utf-8").split("\n")
    wanted = sum(bool(line.strip()) and not line.startswith("#version") for line in merges)
    found = _vocabulary(made)
    model = json.loads(made.read_text(encoding="utf-8"))["model"]
    return all(found.get(piece) == i for piece, i in pieces.items()) and len(model["merges"]) == wanted


def _size(path: Path) -> int:
    return _guarded(lambda: build_tokenizer(path)).vocab_size


def _size_of(file: Path) -> int:
    """Size of a ``tokenizer.json``, without a last ``<image>``, which an export adds."""
    ids = _vocabulary(file)
    size = max(ids.values(), default=-1) + 1
    return size - 1 if ids.get("<image>") == size - 1 else size


def _vocabulary(file: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return _guarded(lambda: Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))


def _guarded(call: Any) -> Any:
    """Return what `call` returns, and turn any error of it into a `ConfigError`.

    A panic of tokenizers' Rust code is a `BaseException`, but not an `Exception`.
    """
    try:
        return call()
    except ConfigError:
        raise
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"{type(error).__name__}: {reason[:300]}") from None


def _without(text: str, folder: Path) -> str:
    """Remove the folder from a message, because it no longer exists when the message is read."""
    return text.replace(f"{folder}/", "").replace(str(folder), "it")


def _has_transformers() -> bool:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True
