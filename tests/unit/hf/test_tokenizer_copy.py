"""A source's readable tokenizer is copied in its best form; an unreadable one is reported."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from megatron_evomoe.data.tokenizer import build_tokenizer, train_sentencepiece
from megatron_evomoe.hf.from_hf import tokenizer_copy
from megatron_evomoe.hf.from_hf.tokenizer_copy import copy_tokenizer
from tests.unit.data import helpers

pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> Path:
    return helpers.save_hf_tokenizer(tmp_path_factory.mktemp("tokenizers") / "gpt", "gpt")


def slow(fast: Path, folder: Path) -> Path:
    """The same pieces and merges in GPT-2's files from before tokenizer.json."""
    folder.mkdir()
    model = json.loads((fast / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"])
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    )
    return folder


@pytest.mark.parametrize("with_transformers", [True, False])
def test_a_fast_tokenizer(fast, tmp_path, monkeypatch, with_transformers):
    monkeypatch.setattr(tokenizer_copy, "_has_transformers", lambda: with_transformers)
    brought = copy_tokenizer(fast, tmp_path / "out")
    assert (brought.path, brought.size) == ("", build_tokenizer(fast).vocab_size)
    assert build_tokenizer(tmp_path / "out").fingerprint() == build_tokenizer(fast).fingerprint()


def test_vocabulary_and_merges_are_converted(fast, tmp_path):
    brought = copy_tokenizer(slow(fast, tmp_path / "slow"), tmp_path / "out")
    assert brought.path == "" and "converted vocab.json and merges.txt" in brought.note
    made, known = build_tokenizer(tmp_path / "out"), build_tokenizer(fast)
    for text in (*helpers.LINES, "é — 漢字 🙂"):
        assert made.encode(text) == known.encode(text)


def test_vocabulary_and_merges_without_transformers(fast, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_copy, "_has_transformers", lambda: False)
    brought = copy_tokenizer(slow(fast, tmp_path / "slow"), tmp_path / "out")
    assert (
        brought.path is None
        and "converting vocab.json and merges.txt needs transformers" in brought.note
        and "pip install" in brought.note
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / "merges.txt").write_text((f / "merges.txt").read_text() + "never seen\n"),
        lambda f: (f / "vocab.json").write_text("[1]"),
        lambda f: (f / "vocab.json").write_text("{"),
    ],
)
def test_a_conversion_that_is_another_tokenizer_is_refused(fast, tmp_path, spoil):
    folder = slow(fast, tmp_path / "slow")
    spoil(folder)
    brought = copy_tokenizer(folder, tmp_path / "out")
    assert (
        brought.path is None
        and "vocab.json cannot be used" in brought.note
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    "content", ["{", "tokenizer.json", "[]", "null", '{"model": 3}', '{"model": {"type": "BPE"}}', ""]
)
def test_a_damaged_tokenizer_is_said(fast, tmp_path, content, monkeypatch):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(content)
    for with_transformers in (True, False):
        monkeypatch.setattr(tokenizer_copy, "_has_transformers", lambda known=with_transformers: known)
        brought = copy_tokenizer(folder, tmp_path / "out")
        assert brought.path is None and brought.note.startswith("tokenizer.json cannot be used (")
        assert str(tmp_path) not in brought.note and not (tmp_path / "out").exists()
    train_sentencepiece(helpers.LINES * 5, folder / "tokenizer.model", 400)
    brought = copy_tokenizer(folder, tmp_path / "out")
    assert brought.path == "tokenizer.model" and "tokenizer.json cannot be used" in brought.note
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "tokenizer.model",
        "tokenizer.model.sha256",
    ]


@pytest.mark.parametrize("sums", ["SHA256SUMS", "tokenizer.model.sha256"])
def test_checksums_come_along_and_must_hold(fast, tmp_path, sums):
    """Checksums of the tokenizer's files are copied and verified.

    The checksum file may list weights as well.
    """
    folder, name = tmp_path / "hf", "tokenizer.json" if sums == "SHA256SUMS" else "tokenizer.model"
    shutil.copytree(fast, folder) if sums == "SHA256SUMS" else train_sentencepiece(
        helpers.LINES * 5, folder / name, 400
    )
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    others = f"{'0' * 64}  model.safetensors\n" if sums == "SHA256SUMS" else ""
    (folder / sums).write_text(f"{others}{digest}  {name}\n")
    assert copy_tokenizer(folder, tmp_path / "out").path is not None
    assert (tmp_path / "out" / sums).read_text() == f"{digest}  {name}\n"
    (folder / sums).write_text(f"{'0' * 64}  {name}\n")
    brought = copy_tokenizer(folder, tmp_path / "bad")
    assert brought.path is None and "is not the one of" in brought.note


def test_nothing_is_said(tmp_path):
    (tmp_path / "hf").mkdir()
    for name in ("vocab.json", "config.json"):  # a vocabulary without merges is not a tokenizer
        (tmp_path / "hf" / name).write_text("{}")
    note = copy_tokenizer(tmp_path / "hf", tmp_path / "out").note
    assert note.endswith("it has no tokenizer.json, no vocab.json with merges.txt and no tokenizer.model")
    assert copy_tokenizer(None, tmp_path / "out") == tokenizer_copy.CopiedTokenizer()


def test_code_beside_a_tokenizer_is_not_run(fast, tmp_path):
    folder = slow(fast, tmp_path / "slow")
    asked = {"auto_map": {"AutoTokenizer": ["tok.T", "tok.T"]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(asked))
    (folder / "tok.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')\n")
    copy_tokenizer(folder, tmp_path / "out")
    assert not (tmp_path / "boom").exists()
