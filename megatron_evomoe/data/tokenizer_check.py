"""What a tokenizer's files must be before a library reads them, and errors in place of the libraries' own.

Neither format has a checksum of its own. Where one lies beside the files (`sha256sum`'s format:
``FILE.sha256``, or ``SHA256SUMS`` in a directory) it must hold; otherwise a change that leaves a valid
tokenizer shows at the checkpoint, by `Tokenizer.fingerprint`.
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
"""Of one file; the largest published are Gemma's 33 MB (JSON) and XLM-V's 15 MB (sentencepiece)."""
_JSON_NEEDED = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
_JSON_KEYS = ("version", "truncation", "padding", *_JSON_NEEDED)
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_PROBES = (
    "USER: What is this? ASSISTANT:",
    "Ça, é — 漢字 🙂\tund\n\nso  weiter.",
    "<s>\x00\x7f\ufffd</s> [INST] <|im_end|>",
    " ",
)
_FIRST_EXTENSION = 200  # of a sentencepiece model's fields


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Whatever a library raises on these files as a `ConfigError` that names them; Rust's panics too, which
    are no `Exception`.
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
    """The contents, if they are no larger than `MAX_BYTES`."""
    if not path.is_file():
        raise ConfigError(f"tokenizer file {path} is no regular file")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(
            f"tokenizer file {path} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read"
        )
    return path.read_bytes()


def check_sums(path: Path) -> None:
    """Raise `ConfigError` where a checksum lies beside a file (or in a directory) and does not hold."""
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
                f"{sums.name} if "
                "the change was meant"
            )


def write_sum(path: Path) -> None:
    """Put ``FILE.sha256`` beside a file."""
    path.with_name(f"{path.name}.sha256").write_text(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    )


def parse_sentencepiece(path: Path, data: bytes) -> Any:
    """A model file as a ``ModelProto`` in which everything is known, present and within its range.

    Raises:
        ConfigError: anything else, with the rule.
    """
    from google.protobuf.unknown_fields import UnknownFieldSet
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    with named(path):
        proto.ParseFromString(data)
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if not pieces:
        raise ConfigError(f"tokenizer {path} holds no pieces; it is no sentencepiece model, or empty")
    if lacking := [name for name in ("trainer_spec", "normalizer_spec") if not proto.HasField(name)]:
        raise ConfigError(f"tokenizer {path} has no {lacking[0]}; it was cut off, give an undamaged copy")
    for part in (proto, proto.trainer_spec, proto.normalizer_spec, proto.denormalizer_spec, *proto.pieces):
        if unknown := [
            field.field_number for field in UnknownFieldSet(part) if field.field_number < _FIRST_EXTENSION
        ]:
            raise ConfigError(
                f"tokenizer {path} has a field {unknown[0]} in its {part.DESCRIPTOR.name} that this "
                "sentencepiece "
                "does not know; it is damaged, or needs a newer sentencepiece"
            )
    for i, (piece, score) in enumerate(pieces):
        if (
            not piece or not isinstance(piece, str) or not math.isfinite(score)
        ):  # protobuf gives bytes where they are no UTF-8
            raise ConfigError(
                f"tokenizer {path}: piece {i} is {piece!r} with score {score}; it must be text and its score "
                "finite"
            )
    return proto


def sentencepiece_rules(proto: Any) -> str:
    """A digest of all that decides how a sentencepiece model encodes and decodes."""
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
    """Sizes of all files, and of ``tokenizer.json`` what its library would pass over.

    Raises:
        ConfigError: with the file and the rule.
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
    """Raise `ConfigError` where ``tokenizer.json`` says of its model what the library has not taken up.

    Args:
        serialized: the library's own account of what it read.
    """
    file = path / "tokenizer.json"
    if file.exists():
        ours, theirs = _read_json(file)["model"], json.loads(serialized)["model"]
        if unknown := sorted(set(ours) - set(theirs)):
            raise ConfigError(
                f"tokenizer file {file}: its model has a key {unknown[0]!r} that the tokenizers library does "
                "not "
                "know; it is damaged, or needs a newer library"
            )


def rules_of_json(serialized: str, left_out: Container[str] = ()) -> str:
    """A digest of all in a tokenizer.json, as the library writes it, that decides ids and text; not of the
    post-processor, for what begins and ends a text is said by bos and eos.

    Args:
        left_out: contents of added tokens that do not count.
    """
    spec = json.loads(serialized)
    if "merges" in spec["model"]:  # written as text until tokenizers 0.20
        spec["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in left_out]
    for key in ("version", "truncation", "padding", "post_processor"):
        spec.pop(key, None)
    return hashlib.sha256(json.dumps(_said(spec), sort_keys=True).encode()).hexdigest()


def check_probes(path: str | Path, tokenizer: Any) -> None:
    """Encode and decode a few texts, so that a tokenizer that fails at it fails now and by name."""
    with named(path):
        for text in _PROBES:
            ids = tokenizer.encode(text)
            tokenizer.decode(ids)
            if any(not 0 <= i < tokenizer.vocab_size for i in ids):
                raise ConfigError(
                    f"tokenizer {path} gives id {max(ids)} for {text!r}, and has {tokenizer.vocab_size} "
                    "tokens"
                )


def _said(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _said(item) for key, item in value.items() if item not in (None, False, [], {}, "")}
    return [_said(item) for item in value] if isinstance(value, list) else value


def _read_json(file: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
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
    """transformers would make a token that a configuration names and nothing defines, behind the
    vocabulary.
    """
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
                    "hold; "
                    "correct it, or save the tokenizer again with transformers"
                )
