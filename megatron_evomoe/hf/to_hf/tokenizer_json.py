"""Translates the tokenizer of a run to a Hugging Face tokenizer that gives the same ids.

Training encodes a conversation in segments. Only the first one gets the space that some tokenizers put before
a text (`data/tokenizer.py`). Here a Metaspace does so for the first section only, and special tokens separate
sections as they separate segments. One difference remains: a text that *spells* a special token is plain
characters in training, and that token here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.conversation import IMAGE_TOKEN
from megatron_evomoe.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_evomoe.hf.to_hf.sentencepiece_spec import read_sentencepiece

Spec = dict[str, Any]
"""The contents of a ``tokenizer.json``."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer's files in an export, and facts that other files depend on."""

    files: dict[str, Any]
    """File name -> JSON contents."""
    image_token_id: int
    template_prefix: str
    """Text that the chat template must put before the first word, because the tokenizer does not."""
    pieces: dict[int, str]
    """Id -> text of every special token."""


def tokenizer_files(
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer, path: Path, max_length: int
) -> TokenizerFiles:
    """Make all files of the tokenizer but the chat template.

    Args:
        tokenizer: the tokenizer as training uses it.
        path: the file or directory it was read from.
        max_length: number of positions of the model.

    Raises:
        ConfigError: the sentencepiece model is of a kind that Hugging Face tokenizers do not have.
    """
    spec = (
        read_sentencepiece(path)
        if isinstance(tokenizer, SentencePieceTokenizer)
        else json.loads(tokenizer.to_json())
    )
    prepends = bool(tokenizer.text_prefix) and _prepend_to_first(spec)
    spec["post_processor"] = None
    vocab = {**_vocabulary(spec["model"]), **{t["content"]: t["id"] for t in spec["added_tokens"]}}
    image_token_id = _add_image_token(spec, vocab)
    piece = {i: text for text, i in vocab.items()}
    if tokenizer.bos_id is not None:
        spec["post_processor"] = _begin_with(piece[tokenizer.bos_id], tokenizer.bos_id)
    roles = {"eos_token": piece[tokenizer.eos_id], "pad_token": piece[tokenizer.pad_id]}
    if tokenizer.bos_id is not None:
        roles["bos_token"] = piece[tokenizer.bos_id]
    if unknown := spec["model"].get("unk_token") or _unigram_unknown(spec["model"]):
        roles["unk_token"] = unknown
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        **roles,
        "image_token": IMAGE_TOKEN,
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return TokenizerFiles(
        files={
            "tokenizer.json": spec,
            "tokenizer_config.json": settings,
            "special_tokens_map.json": {**roles, "image_token": IMAGE_TOKEN},
        },
        image_token_id=image_token_id,
        template_prefix="" if prepends else tokenizer.text_prefix,
        pieces={t["id"]: t["content"] for t in spec["added_tokens"] if t["special"]},
    )


def _prepend_to_first(spec: Spec) -> bool:
    """Change a specification without prefix so that it puts a space before the first word of a text.

    Returns:
        False if the specification cannot express it.
    """
    normalizer, splitter = spec.get("normalizer"), spec.get("pre_tokenizer")
    if (
        splitter is None and (rest := _without_space_marker(normalizer)) != normalizer
    ):  # as in older Llama files
        spec["normalizer"] = rest
        spec["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
    elif (marker := _find(splitter, "Metaspace")) is not None:
        marker["prepend_scheme"] = "first"
    else:
        return False
    steps = spec["decoder"]["decoders"] if spec["decoder"].get("type") == "Sequence" else [spec["decoder"]]
    for step in steps:
        if step["type"] == "Metaspace":  # removes the first space itself
            step["prepend_scheme"] = "first"
            return True
    spec["decoder"] = {
        "type": "Sequence",
        "decoders": [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    return True


def _without_space_marker(normalizer: Spec | None) -> Spec | None:
    """The normalizer without its ``Replace " " → "▁"``."""
    if normalizer is None:
        return None
    if normalizer["type"] == "Sequence":
        kept = [n for n in map(_without_space_marker, normalizer["normalizers"]) if n is not None]
        return {**normalizer, "normalizers": kept} if kept else None
    is_marker = (
        normalizer["type"] == "Replace"
        and normalizer["pattern"] == {"String": " "}
        and normalizer["content"] == "▁"
    )
    return None if is_marker else normalizer


def _find(part: Spec | None, kind: str) -> Spec | None:
    if part is None or part.get("type") == kind:
        return part
    return next(
        (found for inner in part.get("pretokenizers", []) if (found := _find(inner, kind)) is not None), None
    )


def _vocabulary(model: Spec) -> dict[str, int]:
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def _unigram_unknown(model: Spec) -> str | None:
    return model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None


def _add_image_token(spec: Spec, vocab: dict[str, int]) -> int:
    """Add ``<image>`` with its own id, or the first one after the vocabulary, and return the id."""
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != IMAGE_TOKEN]
    found = vocab.setdefault(IMAGE_TOKEN, max(vocab.values()) + 1)
    spec["added_tokens"].append(
        {
            "id": found,
            "content": IMAGE_TOKEN,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    spec["added_tokens"].sort(key=lambda token: token["id"])
    return found


def _begin_with(piece: str, piece_id: int) -> Spec:
    special, text = {"SpecialToken": {"id": piece, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, second],
        "special_tokens": {piece: {"id": piece, "ids": [piece_id], "tokens": [piece]}},
    }


def check_ids(
    written: Spec, tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer, prefix: str, texts: list[str]
) -> None:
    """Check that both tokenizers encode `texts` alike, at the start of a sequence and after an image.

    Args:
        written: contents of the exported ``tokenizer.json``.
        tokenizer: the tokenizer as training uses it.
        prefix: `TokenizerFiles.template_prefix`.
        texts: must not begin with a space; prompts in training do not.

    Raises:
        ConfigError: the ids of a text differ.
    """
    from tokenizers import Tokenizer

    exported = Tokenizer.from_str(json.dumps(written))
    for text in texts:
        first = exported.encode(prefix + text, add_special_tokens=False).ids
        behind = exported.encode(f"{IMAGE_TOKEN}\n{text}", add_special_tokens=False).ids[1:]
        for got, wanted in (
            (first, tokenizer.encode(tokenizer.text_prefix + text)),
            (behind, tokenizer.encode(f"\n{text}")),
        ):
            if got != wanted:
                raise ConfigError(
                    f"the tokenizer cannot be exported: {text!r} is {wanted[:12]} in training but would be "
                    f"{got[:12]} in transformers; give a Hugging Face directory of the same tokenizer with "
                    "--tokenizer"
                )
