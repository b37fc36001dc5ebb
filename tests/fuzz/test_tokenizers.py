"""A damaged tokenizer is refused by name, is unchanged, or differs by checksum and by fingerprint."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.tokenizer import build_tokenizer, same_tokenizer, train_sentencepiece
from tests.unit.data import helpers

TEXTS = [
    "Hello world, 123 ça 漢字 <|im_end|>",
    "USER: x ASSISTANT: It is seven. How many are there of 3?",
    *helpers.LINES,
    "a\u0301 ﬁ  two  spaces\n\n\ttab 🙂\x00",
]
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    2**40,
    1e400,
    "",
    "x",
    "\ud800",
    [],
    {},
    [[]],
    {"type": "Split"},
    "a" * 9999,
]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Apply one kind of damage that a disk, a transfer or an editor can do."""
    out, at = bytearray(data), draw.randrange(len(data))
    kind = draw.choice(["bit", "bit", "bit", "bytes", "cut", "insert", "zeros", "swap"])
    if kind == "bit":
        out[at] ^= 1 << draw.randrange(8)
    elif kind == "bytes":
        for _ in range(draw.randrange(1, 9)):
            out[draw.randrange(len(out))] = draw.randrange(256)
    elif kind == "cut":
        del out[at:]
    elif kind == "insert":
        out[at:at] = draw.randbytes(draw.randrange(1, 20))
    elif kind == "zeros":
        out[at : at + 64] = bytes(len(out[at : at + 64]))
    else:
        out[at : at + 8], out[: len(out[at : at + 8])] = out[: len(out[at : at + 8])], out[at : at + 8]
    return bytes(out)


def rewritten(data: bytes, draw: random.Random) -> bytes:
    """Remove one node of a JSON file or give it another value."""
    whole = json.loads(data)
    places = list(_places(whole))
    # without this list, nearly all changes would be in the vocabulary
    few = [(parent, key) for parent, key in places if isinstance(parent, dict) and len(parent) < 20]
    parent, key = draw.choice(draw.choice([places, few]))
    if draw.random() < 0.4:
        del parent[key]
    else:
        parent[key] = draw.choice(VALUES)
    return json.dumps(whole).encode()


def _places(value: Any):
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def outcome(path: Path, good: Any) -> str:
    """Build the tokenizer at `path` and compare it with the undamaged one; returns the outcome."""
    try:
        found = build_tokenizer(path)
        fingerprint = found.fingerprint()
    except ConfigError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return "named"
    if not same_tokenizer(good.fingerprint(), fingerprint):
        return "another"  # a valid but different tokenizer: resuming the run would refuse it
    assert [found.encode(text) for text in TEXTS] == [good.encode(text) for text in TEXTS]
    assert all(found.decode(good.encode(text)) == good.decode(good.encode(text)) for text in TEXTS)
    assert (found.bos_id, found.eos_id, found.pad_id, found.vocab_size, found.text_prefix) == (
        good.bos_id,
        good.eos_id,
        good.pad_id,
        good.vocab_size,
        good.text_prefix,
    )
    return "right"


def test_sentencepiece_models(tally, tmp_path):
    paths = [
        train_sentencepiece(
            helpers.LINES * 5,
            tmp_path / f"{kind}.model",
            400,
            model_type=kind,
            user_defined_symbols=[*helpers.MARKUP, "\n"],
        )
        for kind in ("unigram", "bpe")
    ]
    goods, bad = [(path, build_tokenizer(path), path.read_bytes()) for path in paths], tmp_path / "bad.model"
    for draw in tally.draws(240):
        path, good, data = draw.choice(goods)
        bad.with_name("bad.model.sha256").unlink(missing_ok=True)
        bad.write_bytes(damaged(data, draw))
        found = outcome(bad, good)
        if found == "another":
            sums = path.with_name(f"{path.name}.sha256").read_text()
            bad.with_name("bad.model.sha256").write_text(sums.replace(path.name, bad.name))
            with pytest.raises(ConfigError, match="is not the one of"):
                build_tokenizer(bad)
            found = "named"
        tally.add(found)


def test_tokenizer_directories(tally, tmp_path):
    pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    goods, folder = [], tmp_path / "bad"
    for kind in ("gpt", "llama"):
        source = helpers.save_hf_tokenizer(tmp_path / kind, kind)
        goods.append((build_tokenizer(source), {file.name: file.read_bytes() for file in source.iterdir()}))
    for draw in tally.draws(80):
        good, files = draw.choice(goods)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        name = draw.choice(
            sorted({"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} & set(files))
        )
        (folder / name).write_bytes((rewritten if draw.random() < 0.5 else damaged)(files[name], draw))
        found = outcome(folder, good)
        if found == "another":
            sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
            (folder / "SHA256SUMS").write_text(sums)
            with pytest.raises(ConfigError, match="is not the one of"):
                build_tokenizer(folder)
            found = "named"
        tally.add(found)
