"""Tokenizers and shards that the data tests share; each is built once."""

from __future__ import annotations

import pytest

from megatron_evomoe.data.image import ImageProcessor
from megatron_evomoe.data.shards import ShardDataset, write_shards
from megatron_evomoe.data.tokenizer import build_tokenizer, train_sentencepiece

from . import helpers


@pytest.fixture(scope="session")
def sp_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "tiny.model"
    return train_sentencepiece(helpers.LINES * 5, path, 600, user_defined_symbols=[*helpers.MARKUP, "\n"])


@pytest.fixture(scope="session")
def sp_dummy_path(tmp_path_factory):
    """A tokenizer trained with sentencepiece's own defaults.

    It has a dummy prefix, squeezes whitespace, and has a user-defined <|im_end|>.
    """
    import sentencepiece

    path = tmp_path_factory.mktemp("sp") / "dummy.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(helpers.LINES * 5),
            model_writer=file,
            vocab_size=450,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            user_defined_symbols=helpers.MARKUP,
            minloglevel=2,
            num_threads=1,
        )
    return path


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory, sp_path, sp_dummy_path):
    folder = tmp_path_factory.mktemp("hf")
    paths = {
        "sp": sp_path,
        "sp-dummy": sp_dummy_path,
        **{f"hf-{kind}": helpers.save_hf_tokenizer(folder / kind, kind) for kind in ("gpt", "llama")},
    }
    return {name: build_tokenizer(path) for name, path in paths.items()}


@pytest.fixture(scope="session", params=["sp", "sp-dummy", "hf-gpt", "hf-llama"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def sp(tokenizers):
    return tokenizers["sp"]


@pytest.fixture(scope="session")
def processor():
    return ImageProcessor(8)


@pytest.fixture(scope="session")
def shard_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(helpers.samples(50), folder, samples_per_shard=20)
    return folder


@pytest.fixture
def dataset(shard_dir):
    data = ShardDataset(shard_dir)
    yield data
    data.close()
