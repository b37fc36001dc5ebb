"""Tokenizers encode exactly the text they are given."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_evomoe.checkpoint.record import CheckpointError
from megatron_evomoe.config import ConfigError
from megatron_evomoe.data import tokenizer_check
from megatron_evomoe.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
    same_tokenizer,
    train_sentencepiece,
)
from megatron_evomoe.data.tokenizer_check import write_sum
from megatron_evomoe.train.transition import check_tokenizer

from . import helpers

SEGMENTS = [
    "hello",
    " hello",
    "  two  spaces ",
    "\nline\n\nline",
    " ",
    "",
    "\t",
    "é — 漢字 🙂",
    "A chat",
    ":",
    " ASSISTANT:",
]


@pytest.mark.parametrize("text", SEGMENTS)
def test_decode_of_encode_is_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_segments_join_without_added_spaces(tokenizer):
    ids = [i for segment in SEGMENTS for i in tokenizer.encode(segment)]
    assert tokenizer.decode(ids) == "".join(SEGMENTS)


def test_ids_and_specials(tokenizer):
    assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.encode("".join(SEGMENTS)))
    assert tokenizer.bos_id not in tokenizer.encode("a") and tokenizer.eos_id not in tokenizer.encode("a")
    assert 0 <= tokenizer.special_id("<|im_end|>") < tokenizer.vocab_size
    assert tokenizer.special_id("<|nothing|>") is None and tokenizer.special_id("hello") is None
    assert tokenizer.decode([tokenizer.vocab_size, -1, *tokenizer.encode("a")]) == "\ufffd\ufffda"


def test_bos_is_that_of_the_family(tokenizers):
    assert tokenizers["hf-gpt"].bos_id is None  # it has a bos token but never begins with it
    assert tokenizers["hf-llama"].bos_id == tokenizers["hf-llama"].special_id("<s>")
    assert tokenizers["sp"].bos_id == 1 and tokenizers["sp"].text_prefix == ""
    assert tokenizers["sp-dummy"].text_prefix == tokenizers["hf-llama"].text_prefix == " "


def test_first_word_is_encoded_as_the_published_tokenizer_would(sp_dummy_path, tokenizers):
    import sentencepiece

    published = sentencepiece.SentencePieceProcessor(model_file=str(sp_dummy_path))
    tok = tokenizers["sp-dummy"]
    assert (
        tok.encode(tok.text_prefix + "Is it even?")
        == published.encode("Is it even?")
        != tok.encode("Is it even?")
    )


def test_fingerprint_follows_the_vocabulary(tokenizer, tokenizers, sp_path, tmp_path):
    assert len({tok.fingerprint() for tok in tokenizers.values()}) == len(tokenizers)
    assert SentencePieceTokenizer(sp_path).fingerprint() == tokenizers["sp"].fingerprint()
    other = train_sentencepiece(
        helpers.LINES * 5, tmp_path / "other.model", 320, user_defined_symbols=[*helpers.MARKUP, "\n"]
    )
    assert build_tokenizer(other).fingerprint() != tokenizers["sp"].fingerprint()


def test_training_is_reproducible(tmp_path):
    a, b = (
        train_sentencepiece(iter(helpers.LINES * 5), tmp_path / f"{n}.model", 400).read_bytes() for n in "ab"
    )
    assert a == b and sorted(p.name for p in tmp_path.iterdir()) == [
        "a.model",
        "a.model.sha256",
        "b.model",
        "b.model.sha256",
    ]


@pytest.mark.parametrize(
    "kind", ["none", "missing", "empty-file", "garbage-file", "empty-dir", "garbage-dir"]
)
def test_unreadable_tokenizers(tmp_path, kind):
    path = tmp_path / kind
    if kind.endswith("file"):
        path.write_bytes(b"" if kind == "empty-file" else b"not a model" * 50)
    elif kind.endswith("dir"):
        path.mkdir()
        if kind == "garbage-dir":
            (path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="tokenizer") as error:
        build_tokenizer(None if kind == "none" else path)
    assert kind == "none" or str(path) in str(error.value)


def test_no_code_of_a_tokenizer_directory_is_run(tmp_path):
    folder = helpers.save_hf_tokenizer(tmp_path / "tok", "gpt")
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}, "tokenizer_class": "Evil"}'
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(ConfigError):
        HuggingFaceTokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_sentencepiece_needs_no_transformers(sp_path):
    code = (
        "import sys; sys.modules['transformers'] = None; from megatron_evomoe.data.tokenizer import "
        "build_tokenizer; "
        f"print(build_tokenizer({str(sp_path)!r}).encode('a'))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_a_changed_score_is_another_tokenizer(sp_path, tmp_path):
    """The vocabulary is the same but the ids of a text differ."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(sp_path.read_bytes())
    good, piece = build_tokenizer(sp_path), next(p for p in proto.pieces if p.type == 1 and len(p.piece) > 3)
    piece.score -= 100
    (tmp_path / "changed.model").write_bytes(proto.SerializeToString())
    changed = build_tokenizer(tmp_path / "changed.model")
    text = piece.piece.replace("▁", " ")
    assert changed.encode(text) != good.encode(text)
    old = good.fingerprint().split(".")[0]
    assert changed.fingerprint().split(".")[0] == old and changed.fingerprint() != good.fingerprint()
    assert same_tokenizer(good.fingerprint(), good.fingerprint())
    assert not same_tokenizer(good.fingerprint(), changed.fingerprint())
    # Earlier versions recorded no fingerprint, or its first part alone.
    assert same_tokenizer(old, changed.fingerprint()) and same_tokenizer("", changed.fingerprint())
    source = SimpleNamespace(
        parts=["language_model"], tokenizer_fingerprint=good.fingerprint(), vocab_size=good.vocab_size
    )
    with pytest.raises(CheckpointError, match="the same pieces by other rules or scores"):
        check_tokenizer(source, tmp_path, changed.fingerprint())


def test_a_checksum_beside_the_file_must_hold(sp_path, tmp_path):
    path = tmp_path / "copy.model"
    data = bytearray(sp_path.read_bytes())
    path.write_bytes(data)
    write_sum(path)
    assert build_tokenizer(path).fingerprint() == build_tokenizer(sp_path).fingerprint()
    data[data.index(b"assistant")] ^= 1  # still a valid model
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"copy.model is not the one of .*copy.model.sha256"):
        build_tokenizer(path)
    path.with_name("copy.model.sha256").unlink()
    assert build_tokenizer(path).fingerprint() != build_tokenizer(sp_path).fingerprint()


def _without(spec, *path):
    *parents, key = path
    for parent in parents:
        spec = spec[parent]
    del spec[key]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.json", lambda spec: _without(spec, "normalizer"), "the key .'normalizer'. is missing"),
        ("tokenizer.json", lambda spec: spec.update(normaliser=None), "unknown key .'normaliser'."),
        (
            "tokenizer.json",
            lambda spec: spec["model"].update(byte_fallbakc=True),
            "'byte_fallbakc' that the tokenizers library",
        ),
        ("tokenizer.json", lambda spec: spec["model"]["vocab"].update(one=5, two=5), "each once"),
        ("tokenizer.json", lambda spec: spec["added_tokens"][0].update(id=17), "an added token|added token"),
        (
            "tokenizer.json",
            lambda spec: spec["added_tokens"][0].update(content="<|im_strat|>"),
            "an added token|names",
        ),
        (
            "tokenizer_config.json",
            lambda spec: spec.update(eos_token="<|endoftexu|>"),
            "names eos_token '<.endoftexu.>', which",
        ),
    ],
)
def test_what_a_library_would_pass_over(tmp_path, name, change, message):
    folder = helpers.save_hf_tokenizer(tmp_path / "tok", "gpt")
    spec = json.loads((folder / name).read_text())
    change(spec)
    (folder / name).write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match=message) as error:
        build_tokenizer(folder)
    assert str(folder) in str(error.value)


def test_files_have_a_largest_size(sp_path, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_check, "MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match="at most 1000 are read"):
        build_tokenizer(sp_path)
    with pytest.raises(ConfigError, match="at most 1000 are read"):
        build_tokenizer(helpers.save_hf_tokenizer(tmp_path / "tok", "gpt"))
