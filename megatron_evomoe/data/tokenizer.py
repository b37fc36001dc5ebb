"""Sentencepiece and Hugging Face tokenizers behind one small protocol.

Both encode pieces of a sequence: `encode` gives the ids of exactly the given characters. Sentencepiece and
    Llama
tokenizers put a space before every text (the dummy prefix). That is switched off, because a prompt that is
encoded in three calls would get three of them; the templates write their spaces themselves. `encode` never
gives a special
token: a text that spells one is encoded as its characters.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.tokenizer_check import (
    check_directory,
    check_probes,
    check_spec_was_understood,
    check_sums,
    named,
    parse_sentencepiece,
    read_file,
    rules_of_json,
    sentencepiece_rules,
    write_sum,
)

# Field 3 (normalizer_spec) of a ModelProto with add_dummy_prefix (3) = false and remove_extra_whitespaces (4)
# = false. Protocol buffers merge a message that occurs twice, so appending this overrides these two fields
# only.
_VERBATIM_WHITESPACE = bytes([0x1A, 4, 0x18, 0, 0x20, 0])
_MARKUP = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")
# An export adds it after the vocabulary for transformers' processors. No model has an embedding for it, and
# no text is encoded as it.
_IMAGE_PLACEHOLDER = "<image>"


class Tokenizer(Protocol):
    """The interface that the package requires of a tokenizer."""

    vocab_size: int
    """The largest id + 1."""
    bos_id: int | None
    """The id with which every sequence begins; None for families that have none (Qwen, Phi)."""
    eos_id: int
    """The id of the end of text."""
    pad_id: int
    """The id at positions of padding and of images."""
    text_prefix: str
    """Prefix that the published tokenizer puts before a text.

    The templates put it before the first word of a sequence.
    """

    def encode(self, text: str) -> list[int]:
        """The ids of exactly these characters: without bos, eos, special tokens and added spaces."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """The number of ids that `encode` gives for each text; faster than to encode them one by one."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Special tokens give nothing, an id outside the vocabulary gives U+FFFD."""

    def fingerprint(self) -> str:
        """A hash of the vocabulary and the special ids, a dot, and a hash of all other rules."""

    def special_id(self, piece: str) -> int | None:
        """The id of a special token such as ``<|im_end|>``; None if there is no such token."""


def build_tokenizer(path: str | Path | None) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    """The tokenizer of a sentencepiece ``.model`` file, or of a directory with ``tokenizer.json``.

    Raises:
        ConfigError: no path is given, it does not exist, or it is not a tokenizer.
    """
    if path is None or not str(path):
        raise ConfigError(
            "no tokenizer given; set --tokenizer to a sentencepiece .model file or a tokenizer directory"
        )
    found = Path(path).expanduser()
    if not found.exists():
        raise ConfigError(
            f"tokenizer {found} does not exist; give a sentencepiece .model file or a tokenizer directory"
        )
    with named(found):
        check_sums(found)
    return HuggingFaceTokenizer(found) if found.is_dir() else SentencePieceTokenizer(found)


class SentencePieceTokenizer:
    """A sentencepiece model that keeps whitespace as it is."""

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        path = Path(path)
        with named(path):
            data = read_file(path)
            proto = parse_sentencepiece(path, data)
            sp = sentencepiece.SentencePieceProcessor(model_proto=data + _VERBATIM_WHITESPACE)
            as_published = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.text_prefix = " " if as_published.encode("a") != sp.encode("a") else ""
            self._pieces: list[str] = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
        if sp.eos_id() < 0:
            raise ConfigError(f"tokenizer {path} has no end-of-text token; train it with eos_id set")
        self._sp = sp
        self.vocab_size: int = sp.get_piece_size()
        self.bos_id: int | None = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_id: int = sp.eos_id()
        self.pad_id: int = next(i for i in (sp.pad_id(), sp.unk_id(), sp.eos_id()) if i >= 0)
        self._rules = sentencepiece_rules(proto)
        # sentencepiece finds user-defined pieces in text and decodes them as text; for those that look like
        # markup it must do neither
        user_defined = {i: piece for i, piece in enumerate(self._pieces) if _is_user_defined(sp, i)}
        self._markup = {i: piece for i, piece in user_defined.items() if _MARKUP.fullmatch(piece)}
        longest_first = sorted(map(re.escape, self._markup.values()), key=len, reverse=True)
        self._breaks = re.compile("|".join(longest_first)) if longest_first else None
        check_probes(path, self)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        if self._breaks is None:
            return self._sp.encode(text)
        cuts = [0, *(match.start() + 1 for match in self._breaks.finditer(text)), len(text)]
        return [i for start, end in itertools.pairwise(cuts) for i in self._sp.encode(text[start:end])]

    def count(self, texts: Sequence[str]) -> list[int]:
        """See `Tokenizer`."""
        if self._breaks is None:
            return [len(ids) for ids in self._sp.encode(list(texts), num_threads=1)]
        return [len(self.encode(text)) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return _decode_known([i for i in ids if int(i) not in self._markup], self.vocab_size, self._sp.decode)

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return _fingerprint(enumerate(self._pieces), self, self._rules)

    def special_id(self, piece: str) -> int | None:
        """See `Tokenizer`."""
        found = self._sp.piece_to_id(piece)
        is_special = self._sp.id_to_piece(found) == piece and (
            self._sp.is_control(found) or _is_user_defined(self._sp, found)
        )
        return found if is_special else None


def _is_user_defined(sp: Any, piece_id: int) -> bool:
    """Whether a piece is user-defined. The first merge of a BPE model counts as well.

    sentencepiece has no public test for it; user-defined pieces have score 0 and are of no other type.
    """
    is_other = (
        sp.is_control(piece_id) or sp.is_unknown(piece_id) or sp.is_unused(piece_id) or sp.is_byte(piece_id)
    )
    return not is_other and sp.get_score(piece_id) == 0.0


class HuggingFaceTokenizer:
    """A directory that transformers' AutoTokenizer reads as a fast tokenizer, without running its code."""

    def __init__(self, path: str | Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ConfigError(
                f"tokenizer {path} is a directory; that needs transformers: pip install transformers"
            ) from None
        path = Path(path)
        with named(path):
            check_directory(path)
            hf = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False, use_fast=True
            )
        if not getattr(hf, "is_fast", False):
            raise ConfigError(f"tokenizer {path} has no fast version; save a tokenizer.json into it")
        if hf.eos_token_id is None:
            raise ConfigError(f"tokenizer {path} names no eos_token; set it in its tokenizer_config.json")
        with named(path):
            check_spec_was_understood(path, hf.backend_tokenizer.to_str())
            self._encoder, self._decoder = _verbatim(hf.backend_tokenizer.to_str())
            as_published = hf.backend_tokenizer.encode("a", add_special_tokens=False).ids
            self.text_prefix = " " if as_published != self.encode("a") else ""
            self._read_ids(hf)
        check_probes(path, self)

    def _read_ids(self, hf: Any) -> None:
        vocab = self._decoder.get_vocab(with_added_tokens=True)
        if vocab.get(_IMAGE_PLACEHOLDER) == max(vocab.values()):
            del vocab[_IMAGE_PLACEHOLDER]
        self._vocab: dict[str, int] = vocab
        self._added = {str(token.content): i for i, token in self._decoder.get_added_tokens_decoder().items()}
        self.vocab_size: int = max(vocab.values()) + 1
        self.eos_id: int = hf.eos_token_id
        ids = hf("a", add_special_tokens=True)["input_ids"]
        self.bos_id: int | None = hf.bos_token_id if ids and ids[0] == hf.bos_token_id else None
        self.pad_id: int = next(
            i for i in (hf.pad_token_id, hf.unk_token_id, hf.eos_token_id) if i is not None
        )

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self._encoder.encode(text, add_special_tokens=False).ids

    def count(self, texts: Sequence[str]) -> list[int]:
        """See `Tokenizer`."""
        # without offsets in the text, where the installed tokenizers can leave them out
        encode = getattr(self._encoder, "encode_batch_fast", self._encoder.encode_batch)
        return [len(encoding) for encoding in encode(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return _decode_known(
            ids, self.vocab_size, lambda known: self._decoder.decode(known, skip_special_tokens=True)
        )

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        left_out = {_IMAGE_PLACEHOLDER} - set(self._vocab)
        return _fingerprint(
            sorted((i, piece) for piece, i in self._vocab.items()),
            self,
            rules_of_json(self._decoder.to_str(), left_out),
        )

    def special_id(self, piece: str) -> int | None:
        """See `Tokenizer`."""
        return self._added.get(piece)

    def to_json(self) -> str:
        """This tokenizer as a ``tokenizer.json``, which neither adds nor strips a leading space."""
        return self._decoder.to_str()


def is_markup(piece: str) -> bool:
    """Whether a user-defined piece looks like markup, which is neither found in text nor decoded to text."""
    return bool(_MARKUP.fullmatch(piece))


def _verbatim(serialized: str) -> tuple[Any, Any]:
    """A `tokenizers.Tokenizer` for encoding and one for decoding; neither adds or strips a leading space."""
    from tokenizers import Tokenizer as Backend

    spec = json.loads(serialized)
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        spec[key] = _without_prefix(spec.get(key), key)
    spec["truncation"] = spec["padding"] = None
    decoder = Backend.from_str(json.dumps(spec))
    for token in spec.get("added_tokens", []):
        token["special"] = token["special"] or bool(_MARKUP.fullmatch(token["content"]))
    encoder = Backend.from_str(json.dumps(spec))
    encoder.encode_special_tokens = True  # text that spells a special token stays text
    return encoder, decoder


def _without_prefix(part: dict | None, key: str) -> dict | None:
    """A part of a tokenizer.json without what adds or strips a leading space; None if nothing is left."""
    if part is None:
        return None
    kind = part.get("type")
    if kind == "Sequence":
        inner = next(name for name in ("normalizers", "pretokenizers", "decoders") if name in part)
        kept = [new for old in part[inner] if (new := _without_prefix(old, key)) is not None]
        return {**part, inner: kept} if kept else None
    if kind == "Prepend" or (kind == "Strip" and key == "decoder" and part.get("start", 0)):
        return None
    if kind == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if kind == "ByteLevel" and key == "pre_tokenizer":
        return {**part, "add_prefix_space": False}
    return part


def _decode_known(ids: Sequence[int], vocab_size: int, decode: Any) -> str:
    """Decode ids. An unknown one, which a padded embedding can give, becomes U+FFFD and raises no error."""
    out, run = [], []
    for i in map(int, ids):
        if 0 <= i < vocab_size:
            run.append(i)
            continue
        out += [decode(run) if run else "", "\ufffd"]
        run = []
    return "".join([*out, decode(run) if run else ""])


def same_tokenizer(recorded: str, found: str) -> bool:
    """Whether a recorded fingerprint matches this one.

    It matches if they are equal, if none was recorded, or if an old one of the vocabulary alone was recorded
    and the vocabularies are equal.
    """
    return recorded in ("", found, found.partition(".")[0])


def _fingerprint(pieces: Iterable[tuple[int, str]], tokenizer: Any, rules: str) -> str:
    digest = hashlib.sha256(
        f"bos {tokenizer.bos_id} eos {tokenizer.eos_id} pad {tokenizer.pad_id}\n".encode()
    )
    for i, piece in pieces:
        digest.update(json.dumps([i, piece]).encode() + b"\n")
    return f"{digest.hexdigest()}.{rules[:16]}"


def train_sentencepiece(
    lines: Iterable[str],
    path: str | Path,
    vocab_size: int,
    *,
    user_defined_symbols: Sequence[str] = (),
    model_type: Literal["unigram", "bpe"] = "unigram",
) -> Path:
    """Train a sentencepiece model and write it to a file; the same lines give the same bytes.

    Every byte has a piece, so any text can be encoded, and each digit is a piece of its own.

    Args:
        lines: the texts to train on.
        path: the ``.model`` file, which is replaced atomically.
        vocab_size: the largest number of pieces; a small corpus gives fewer.
        user_defined_symbols: texts that become pieces. Those that look like markup (``<|im_end|>``) exist by
            id only and are never found in text.

    Raises:
        ConfigError: sentencepiece cannot train on these lines.
    """
    import sentencepiece

    markup = [symbol for symbol in user_defined_symbols if _MARKUP.fullmatch(symbol)]
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=buffer,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type=model_type,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=markup,
            user_defined_symbols=[symbol for symbol in user_defined_symbols if symbol not in markup],
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"sentencepiece could not train {vocab_size} pieces (260 are bytes and specials): {error}"
        ) from None
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    temporary.write_bytes(buffer.getvalue())
    # removed first, so that a kill does not leave the checksum of another file
    target.with_name(f"{target.name}.sha256").unlink(missing_ok=True)
    os.replace(temporary, target)
    write_sum(target)
    return target
