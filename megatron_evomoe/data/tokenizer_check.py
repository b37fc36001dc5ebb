"""Checks the files of a tokenizer before a library reads them, and names them in errors of the library.

Neither format has a checksum. If there is one beside the files (in the format of `sha256sum`:
``FILE.sha256``, or ``SHA256SUMS`` in a directory), it must match. Otherwise a change that leaves a valid
tokenizer is noticed when a checkpoint is loaded, by `Tokenizer.fingerprint`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_evomoe.config import ConfigError

MAX_BYTES = 256 * 2**20
"""The largest file that is read. The largest published ones are of 33 MB (Gemma) and 15 MB (XLM-V)."""
_JSON_NEEDED = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
_JSON_KEYS = ("version", "truncation", "padding", *_JSON_NEEDED)
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_PROBES = (
    "USER: What is this? ASSISTANT:",
    "Ça, é — 漢字 🙂\tund\n\nso  weiter.",
    "<s>\x00\x7f\ufffd</s> [INST] <|im_end|>",
    " ",
)
_FIRST_EXTENSION = 200  # the first number of an extension field in a sentencepiece model


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Turn whatever a library raises inside a `with` block into a `ConfigError` that names the files.

    That includes the panics of Rust, which are not of class `Exception`.
    """
    try:
        yield
    except (ConfigError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise ConfigError(
            f"tokenizer {path} cannot be read: {reason or type(error).__name__}; give an undamaged copy"
        ) from None


def read_file(path: Path) -> bytes:
    """The content of a file. Raises `ConfigError` if it is not a regular file, or larger than `MAX_BYTES`."""
    if not path.is_file():
        raise ConfigError(f"tokenizer file {path} is not a regular file")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(
            f"tokenizer file {path} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read"
        )
    return path.read_bytes()


def check_sums(path: Path) -> None:
    """Compare files with the checksums beside them, if there are any. Raises `ConfigError` if one differs."""
    sums = path / "SHA256SUMS" if path.is_dir() else path.with_name(f"{path.name}.sha256")
    if not sums.is_file():
        return
    for line in read_file(sums).decode(errors="replace").splitlines():
        wanted, _, name = line.strip().partition(" ")
        file = sums.parent / name.strip().removeprefix("*")
        if line.strip() and (
            not file.is_file() or hashlib.sha256(read_file(file)).hexdigest() != wanted.lower()
        ):
            raise ConfigError(
                f"tokenizer file {file} is not the one of {sums}; give an undamaged copy, or remove "
                f"{sums.name} if the change was intended"
            )


def write_sum(path: Path) -> None:
    """Write the checksum of a file to ``FILE.sha256``."""
    path.with_name(f"{path.name}.sha256").write_text(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    )


def parse_sentencepiece(path: Path, data: bytes) -> Any:
    """The ``ModelProto`` of a model file.

    Raises:
        ConfigError: a field is unknown, missing or out of its range.
    """
    from google.protobuf.unknown_fields import UnknownFieldSet
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    with named(path):
        proto.ParseFromString(data)
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if not pieces:
        raise ConfigError(f"tokenizer {path} holds no pieces; it is empty or not a sentencepiece model")
    if lacking := [name for name in ("trainer_spec", "normalizer_spec") if not proto.HasField(name)]:
        raise ConfigError(f"tokenizer {path} has no {lacking[0]}; it was cut off, so give an undamaged copy")
    for part in (proto, proto.trainer_spec, proto.normalizer_spec, proto.denormalizer_spec, *proto.pieces):
        if unknown := [
            field.field_number for field in UnknownFieldSet(part) if field.field_number < _FIRST_EXTENSION
        ]:
            raise ConfigError(
                f"tokenizer {path} has a field {unknown[0]} in its {part.DESCRIPTOR.name} that this "
                "sentencepiece does not know; it is damaged, or needs a newer sentencepiece"
            )
    for i, (piece, score) in enumerate(pieces):
        # protobuf gives bytes if they are not UTF-8
        if not piece or not isinstance(piece, str) or not math.isfinite(score):
            raise ConfigError(
                f"tokenizer {path}: piece {i} is {piece!r} with score {score}; it must be text and its score "
                "finite"
            )
    return proto


def sentencepiece_rules(proto: Any) -> str:
    """A digest of everything that decides how a sentencepiece model encodes and decodes."""
    trainer = proto.trainer_spec
    digest = hashlib.sha256(
        json.dumps(
            [
                trainer.model_type,
                trainer.byte_fallback,
                trainer.treat_whitespace_as_suffix,
                trainer.unk_surface,
            ]
        ).encode()
    )
    for part in (proto.normalizer_spec, proto.denormalizer_spec, *proto.pieces):
        digest.update(part.SerializeToString(deterministic=True) + b"\n")
    return digest.hexdigest()


def check_directory(path: Path) -> None:
    """Check the sizes of all files, and in ``tokenizer.json`` what its library does not check.

    Raises:
        ConfigError: a check fails; the message names the file and the rule.
    """
    for file in path.iterdir():
        if file.suffix in (".json", ".model", ".txt", ".jinja") and file.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"tokenizer file {file} has {file.stat().st_size} bytes; at most {MAX_BYTES} are read"
            )
    if not (path / "tokenizer.json").exists():
        return
    spec = _read_json(path / "tokenizer.json")
    _check_spec(path / "tokenizer.json", spec)
    _check_roles(path, _known_tokens(path, spec))


def check_spec_was_understood(path: Path, serialized: str) -> None:
    """Check that the library has read every key of the model in ``tokenizer.json``.

    Args:
        serialized: the tokenizer as the library writes it.

    Raises:
        ConfigError: the library does not know a key.
    """
    file = path / "tokenizer.json"
    if file.exists():
        ours, theirs = _read_json(file)["model"], json.loads(serialized)["model"]
        if unknown := sorted(set(ours) - set(theirs)):
            raise ConfigError(
                f"tokenizer file {file}: its model has a key {unknown[0]!r} that the tokenizers library does "
                "not know; it is damaged, or needs a newer library"
            )


def rules_of_json(serialized: str, left_out: Container[str] = ()) -> str:
    """A digest of everything in a tokenizer.json that decides ids and text.

    The post-processor is not part of it, because bos and eos decide how a text begins and ends.

    Args:
        serialized: the tokenizer as the library writes it.
        left_out: contents of added tokens that do not count.
    """
    spec = json.loads(serialized)
    if "merges" in spec["model"]:  # written as text until tokenizers 0.20
        spec["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in left_out]
    for key in ("version", "truncation", "padding", "post_processor"):
        spec.pop(key, None)
    return hashlib.sha256(json.dumps(_stated(spec), sort_keys=True).encode()).hexdigest()


def check_probes(path: str | Path, tokenizer: Any) -> None:
    """Encode and decode a few texts.

    Raises:
        ConfigError: that fails, or gives an id outside the vocabulary.
    """
    with named(path):
        for text in _PROBES:
            ids = tokenizer.encode(text)
            tokenizer.decode(ids)
            if any(not 0 <= i < tokenizer.vocab_size for i in ids):
                raise ConfigError(
                    f"tokenizer {path} gives id {max(ids)} for {text!r}, and has {tokenizer.vocab_size} "
                    "tokens"
                )


def _stated(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stated(item) for key, item in value.items() if item not in (None, False, [], {}, "")}
    return [_stated(item) for item in value] if isinstance(value, list) else value


def _read_json(file: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key appears twice")
        return found

    with named(file):
        return json.loads(read_file(file), object_pairs_hook=unique)


def _check_spec(file: Path, spec: Any) -> None:
    def need(ok: bool, rule: str) -> None:
        if not ok:
            raise ConfigError(
                f"tokenizer file {file}: {rule}; give an undamaged copy, or save it again with transformers"
            )

    need(isinstance(spec, dict), "a mapping is expected")
    need(set(spec) <= set(_JSON_KEYS), f"unknown key {sorted(set(spec) - set(_JSON_KEYS))[:1]}")
    need(set(_JSON_NEEDED) <= set(spec), f"the key {sorted(set(_JSON_NEEDED) - set(spec))[:1]} is missing")
    model, added = spec["model"], spec["added_tokens"]
    need(
        isinstance(model, dict) and bool(model.get("vocab")) and isinstance(model["vocab"], (dict, list)),
        "it has no vocabulary",
    )
    need(
        isinstance(added, list)
        and all(
            isinstance(t, dict) and isinstance(t.get("content"), str) and type(t.get("id")) is int
            for t in added
        ),
        "added_tokens must be a list of tokens with content and id",
    )
    vocab = _vocabulary(model)
    need(
        all(type(i) is int and i >= 0 for i in vocab.values()) and len(set(vocab.values())) == len(vocab),
        "ids in its vocabulary must be whole numbers, each once",
    )
    for token in added:
        same = vocab.setdefault(token["content"], token["id"])
        need(
            same == token["id"],
            f"added token {token['content']!r} has id {token['id']}, and {same} in the vocabulary",
        )
    need(len(set(vocab.values())) == len(vocab), "an added token has the id of another token")
    need(
        max(vocab.values()) < 2 * len(vocab) + 1000,
        f"{len(vocab)} tokens have ids up to {max(vocab.values())}",
    )


def _vocabulary(model: dict[str, Any]) -> dict[str, Any]:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return dict(vocab)
    names = [entry[0] if isinstance(entry, list) and entry else None for entry in vocab]
    found = {name: i for i, name in enumerate(names) if isinstance(name, str)}
    return found if len(found) == len(vocab) else {str(i): -1 for i in range(len(vocab))}


def _known_tokens(path: Path, spec: dict[str, Any]) -> set[str]:
    known = {*_vocabulary(spec["model"]), *(token["content"] for token in spec["added_tokens"])}
    for name, key in (("added_tokens.json", None), ("tokenizer_config.json", "added_tokens_decoder")):
        if (path / name).exists():
            more = _read_json(path / name)
            more = more.get(key, {}) if key and isinstance(more, dict) else more
            tokens = (
                (more if key is None else [t.get("content") for t in more.values() if isinstance(t, dict)])
                if isinstance(more, dict)
                else ()
            )
            known |= set(tokens)
    return known


def _check_roles(path: Path, known: set[str]) -> None:
    """Refuse a special token that is named and not defined; transformers would add it as a new one."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (path / name).exists():
            continue
        config = _read_json(path / name)
        for role in _ROLES if isinstance(config, dict) else ():
            token = config.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token not in known:
                raise ConfigError(
                    f"tokenizer file {path / name} names {role} {token!r}, which tokenizer.json does not "
                    "hold; correct it, or save the tokenizer again with transformers"
                )
