"""What is shown is what the labels say."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
from PIL import Image

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data import inspect
from megatron_evomoe.data.image import ImageProcessor, decode_image
from megatron_evomoe.data.shards import write_shards

from .helpers import chat, jpeg


@pytest.fixture
def shards(tmp_path):
    turns = [*chat("<image>\nWhich digit is this?", "It is [bold]7[/bold]."), *chat("Is it even?", "No")]
    write_shards([({"conversations": turns}, [jpeg(4)]), ({"conversations": chat("no marker")}, [jpeg(5)])], tmp_path / "shards")
    return tmp_path / "shards"


def run(*arguments):
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    return inspect.run(parser.parse_args(list(map(str, arguments))))


@pytest.mark.parametrize(("template", "expected"), [
    ("v1", "USER: <image>\nWhich digit is this? ASSISTANT:⟦ It is [bold]7[/bold].<eos>⟧USER: Is it even? ASSISTANT:⟦ No<eos>⟧"),
    ("qwen", "<|im_start|>user\n<image>\nWhich digit is this?<|im_end|>\n<|im_start|>assistant\n"
             "⟦It is [bold]7[/bold].<|im_end|>⟧\n"),
])
def test_marks_what_is_supervised(shards, sp_path, tmp_path, capsys, template, expected):
    assert run("--data", shards, "--tokenizer", sp_path, "--template", template, "--num", 2, "--image-size", 16, "--patch-size", 8,
               "--output", tmp_path / "png") == 0
    printed = capsys.readouterr().out
    assert expected.replace("<eos>", "</s>") in printed
    assert "2 samples in 1 shards" in printed and "4 vision" in printed and "16 x 16" in printed
    assert "skipped: image-count: 0 <image> in the text, 1 images" in printed
    png = np.asarray(Image.open(tmp_path / "png" / "000000000.0.png"))
    assert np.array_equal(png, ImageProcessor(16)(decode_image(jpeg(4))).permute(1, 2, 0).numpy())


def test_bad_arguments(shards, sp_path, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        run("--data", shards, "--tokenizer", tmp_path / "gone.model")
    with pytest.raises(ConfigError, match="does not exist"):
        run("--data", tmp_path / "gone.tar", "--tokenizer", sp_path)
