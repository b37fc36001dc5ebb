"""Translates a sentencepiece model to the contents of a ``tokenizer.json``, without a prefix."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_evomoe.config import ConfigError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_UNIGRAM, _BPE = 1, 2


def read_sentencepiece(path: Path) -> dict[str, Any]:
    """The ``tokenizer.json`` contents for the ``.model`` file at `path`. Whitespace is kept, as in training.

    Raises:
        ConfigError: the file holds a word or character model, or protobuf, which reads it, is not installed.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ConfigError(
            "exporting a sentencepiece tokenizer needs protobuf: pip install protobuf"
        ) from None
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    kind = proto.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE):
        raise ConfigError(
            f"tokenizer {path} is a word or character model; only unigram and BPE models can be exported"
        )
    pieces = list(proto.pieces)
    names = [p.piece for p in pieces]
    unknown = next(i for i, p in enumerate(pieces) if p.type == _UNKNOWN)
    if kind == _UNIGRAM:
        model = {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[p.piece, p.score] for p in pieces],
            "byte_fallback": proto.trainer_spec.byte_fallback,
        }
    else:
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": list(_merges(pieces)),
        }
    charsmap = proto.normalizer_spec.precompiled_charsmap
    normalizer = (
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
        if charsmap
        else None
    )
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added(pieces)),
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": model,
    }


def _added(pieces: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Control and user-defined pieces, which are found in a text before any other piece."""
    from megatron_evomoe.data.tokenizer import is_markup

    for i, piece in enumerate(pieces):
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special = piece.type != _USER_DEFINED or is_markup(piece.piece)
            yield {
                "id": i,
                "content": piece.piece.replace("▁", " ") if not special else piece.piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": special,
            }


def _merges(pieces: Sequence[Any]) -> Iterator[list[str]]:
    """All pairs of pieces that form another piece, ordered by sentencepiece's preference for it."""
    ids = {p.piece: i for i, p in enumerate(pieces) if p.type == _NORMAL}
    for piece in sorted(ids, key=lambda name: -pieces[ids[name]].score):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        for left, right in sorted(
            (p for p in pairs if p[0] in ids and p[1] in ids), key=lambda p: (ids[p[0]], ids[p[1]])
        ):
            yield [left, right]
