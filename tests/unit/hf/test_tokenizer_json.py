"""Exported tokenizers and chat templates give the ids of training, token by token."""

from __future__ import annotations

import json
import re

import pytest

from megatron_evomoe.config import ConfigError
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.conversation import IMAGE_TOKEN, encode, encode_prompt, end_id
from megatron_evomoe.data.tokenizer import build_tokenizer, train_sentencepiece
from megatron_evomoe.hf.to_hf.chat_template import chat_template
from megatron_evomoe.hf.to_hf.tokenizer_json import check_ids, tokenizer_files
from tests.unit.data import helpers

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")
KINDS = ("unigram", "bpe", "dummy-prefix", "nmt-nfkc", "gpt", "llama")
TEXTS = [
    "hello",
    "A chat between a curious user",
    "line\n\nline",
    "é — 漢字 🙂 ＡＢ",
    "two  spaces  here ",
    "x\ty",
    "1234",
]
PROMPTS = [
    [("human", "<image>\nWhich digit is this?")],
    [("human", "Is it even? <image>")],
    [("human", "<image>a <image> b")],
    [("human", "no image  here")],
    [("system", "Be brief."), ("human", "<image>")],
    [("system", ""), ("human", "hello")],
]
HISTORY = [
    [("human", "<image>\nHow many?"), ("gpt", "It is seven."), ("human", "Is it even?")],
    [("human", "<image>\nHow many?"), ("gpt", "It is seven.")],
]
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizers")
    found = {
        kind: train_sentencepiece(
            helpers.LINES * 5,
            folder / f"{kind}.model",
            600,
            model_type=kind,
            user_defined_symbols=[*helpers.MARKUP, "\n"],
        )
        for kind in ("unigram", "bpe")
    }
    for kind, rule in (("dummy-prefix", "identity"), ("nmt-nfkc", "nmt_nfkc")):
        found[kind] = folder / f"{kind}.model"
        with found[kind].open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(helpers.LINES * 5),
                model_writer=file,
                vocab_size=450,
                hard_vocab_limit=False,
                byte_fallback=True,
                normalization_rule_name=rule,
                user_defined_symbols=helpers.MARKUP,
                minloglevel=2,
                num_threads=1,
            )
    return found | {kind: helpers.save_hf_tokenizer(folder / kind, kind) for kind in ("gpt", "llama")}


def export(path, template, folder):
    """Export a tokenizer; gives training's tokenizer, what was written, and transformers' tokenizer."""
    tokenizer = build_tokenizer(path)
    written = tokenizer_files(tokenizer, path, 4096)
    folder.mkdir(exist_ok=True)
    for name, contents in written.files.items():
        (folder / name).write_text(json.dumps(contents, ensure_ascii=False))
    end = written.pieces[end_id(tokenizer, template)]
    (folder / "chat_template.jinja").write_text(chat_template(template, end, written.template_prefix))
    return tokenizer, written, transformers.AutoTokenizer.from_pretrained(folder)


def messages(conversation):
    out = []
    for role, text in conversation:
        parts = [
            {"type": "image"} if part == IMAGE_TOKEN else {"type": "text", "text": part}
            for part in re.split(f"({IMAGE_TOKEN})", text)
            if part
        ]
        out.append({"role": ROLES[role], "content": parts})
    return out


def ids_of_training(conversation, tokenizer, template, image_token):
    turns = [{"from": role, "value": text} for role, text in conversation]
    images = sum(text.count(IMAGE_TOKEN) for _, text in conversation)
    make = encode if conversation[-1][0] == "gpt" else encode_prompt
    sample = make(turns, images, tokenizer, template, 4)
    return [
        image_token if kind == TokenType.VISION else i
        for i, kind in zip(sample.tokens, sample.token_types, strict=True)
    ]


def ids_of_transformers(conversation, hf):
    text = hf.apply_chat_template(
        messages(conversation), add_generation_prompt=conversation[-1][0] != "gpt", tokenize=False
    )
    return hf(text.replace(IMAGE_TOKEN, IMAGE_TOKEN * 4))["input_ids"]


@pytest.mark.parametrize("template", helpers.TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_trainings_ids(paths, kind, template, tmp_path):
    tokenizer, written, hf = export(paths[kind], template, tmp_path / "out")
    # Training cuts between a prompt and an earlier answer; pieces of these two toy tokenizers reach over that
    # place.
    history = [] if kind in ("llama", "nmt-nfkc") else HISTORY
    for conversation in [*PROMPTS, *history]:
        wanted = ids_of_training(conversation, tokenizer, template, written.image_token_id)
        assert ids_of_transformers(conversation, hf) == wanted, conversation


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_decoding_and_the_way_back(paths, kind, tmp_path):
    tokenizer, written, hf = export(paths[kind], "v1", tmp_path / "out")
    check_ids(written.files["tokenizer.json"], tokenizer, written.template_prefix, TEXTS)
    assert (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (
        tokenizer.bos_id if tokenizer.bos_id is not None else hf.bos_token_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    assert hf.convert_tokens_to_ids(IMAGE_TOKEN) == written.image_token_id == tokenizer.vocab_size
    assert hf.decode(hf("hello there")["input_ids"], skip_special_tokens=True) == "hello there"
    assert set(hf("a")) == {"input_ids", "attention_mask"} and hf.padding_side == "left"
    again = build_tokenizer(tmp_path / "out")
    ours, theirs = (t.fingerprint().split(".") for t in (tokenizer, again))
    assert ours[0] == theirs[0] and again.text_prefix == tokenizer.text_prefix
    assert (ours[1] == theirs[1]) == (kind == "gpt"), (
        "sentencepiece's rules and those with a prefix are written in other words"
    )


def test_an_image_token_of_its_own_keeps_its_id(paths, tmp_path):
    hf = transformers.AutoTokenizer.from_pretrained(paths["gpt"])
    hf.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, "<|after|>"]})
    hf.save_pretrained(tmp_path / "with")
    tokenizer, written, back = export(tmp_path / "with", "phi", tmp_path / "out")
    assert (
        written.image_token_id == tokenizer.special_id(IMAGE_TOKEN) == back.convert_tokens_to_ids(IMAGE_TOKEN)
    )
    assert written.image_token_id < tokenizer.vocab_size - 1


def test_turns_must_alternate(paths, tmp_path):
    *_, hf = export(paths["unigram"], "v1", tmp_path / "out")
    with pytest.raises(Exception, match="must alternate"):
        hf.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], tokenize=False
        )


def test_a_tokenizer_that_would_differ_is_refused(paths):
    tokenizer = build_tokenizer(paths["unigram"])
    spec = tokenizer_files(tokenizer, paths["unigram"], 64).files["tokenizer.json"]
    spec["pre_tokenizer"]["prepend_scheme"] = "always"
    with pytest.raises(ConfigError, match="cannot be exported: 'hello'"):
        check_ids(spec, tokenizer, "", TEXTS)


def test_word_models_are_refused(tmp_path):
    import sentencepiece

    path = tmp_path / "words.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(helpers.LINES * 5),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            model_type="word",
            minloglevel=2,
        )
    with pytest.raises(ConfigError, match="only unigram and BPE"):
        tokenizer_files(build_tokenizer(path), path, 64)
