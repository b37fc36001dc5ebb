"""`inspect-data` marks the same text as supervised that the labels supervise."""

from __future__ import annotations

import argparse
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from megatron_evomoe.commands import inspect_data
from megatron_evomoe.config import ConfigError, load_config
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.data.image import ImageProcessor, decode_image
from megatron_evomoe.data.lengths import open_lengths
from megatron_evomoe.data.order import SampleOrder
from megatron_evomoe.data.shards import ShardDataset, write_shards
from megatron_evomoe.data.tokenizer import build_tokenizer
from megatron_evomoe.train.training_set import train_loader

from .helpers import chat, jpeg, take


@pytest.fixture
def shards(tmp_path):
    turns = [*chat("<image>\nWhich digit is this?", "It is [bold]7[/bold]."), *chat("Is it even?", "No")]
    write_shards(
        [({"conversations": turns}, [jpeg(4)]), ({"conversations": chat("no marker")}, [jpeg(5)])],
        tmp_path / "shards",
    )
    return tmp_path / "shards"


def run(*arguments):
    parser = argparse.ArgumentParser()
    inspect_data.add_arguments(parser)
    return inspect_data.run(parser.parse_args(list(map(str, arguments))))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "v1",
            "USER: <image>\nWhich digit is this? ASSISTANT:⟦ It is [bold]7[/bold].<eos>⟧USER: Is it even? "
            "ASSISTANT:⟦ No<eos>⟧",
        ),
        (
            "qwen",
            "<|im_start|>user\n<image>\nWhich digit is this?<|im_end|>\n<|im_start|>assistant\n"
            "⟦It is [bold]7[/bold].<|im_end|>⟧\n",
        ),
    ],
)
def test_marks_what_is_supervised(shards, sp_path, tmp_path, capsys, template, expected):
    assert (
        run(
            "--data",
            shards,
            "--tokenizer",
            sp_path,
            "--template",
            template,
            "--num",
            2,
            "--image-size",
            16,
            "--patch-size",
            8,
            "--output",
            tmp_path / "png",
        )
        == 0
    )
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


@pytest.fixture
def run_yaml(shards, sp_path, tmp_path):
    """A run of three stages, two of which see the same data."""
    asked = [chat(f"<image>\nHow many are there of {i}?", f"There are {i}.") for i in range(9)]
    write_shards([({"conversations": turns}, [jpeg(i)]) for i, turns in enumerate(asked)], tmp_path / "more")
    write_shards(
        [
            (
                {
                    "conversations": [
                        *chat("<image>\nWhich digit is this?", "A seven"),
                        *chat("Is it even?", "No"),
                    ]
                },
                [jpeg(3)],
            )
        ],
        tmp_path / "held-out",
    )
    path = tmp_path / "run.yaml"
    path.write_text(f"""
data:
  {{tokenizer: {sp_path}, train_data: [{tmp_path}/more], eval_data: [{tmp_path}/held-out], seq_length: 200}}
vision: {{image_size: 24, patch_size: 12}}
train: {{micro_batch_size: 1, global_batch_size: 2, seed: 7}}
stages:
  - {{name: align, conversation_template: plain, image_aspect_ratio: square}}
  - {{name: warmup}}
  - {{name: route, seq_length: 200, lr: 0.1, continue_data: true}}
""")
    return path


def test_a_runs_configuration_shows_what_the_run_sees(run_yaml, tmp_path, capsys):
    """The output is compared with each stage's loader, built the way training builds it."""
    assert run("--config", run_yaml, "--num", 3, "--output", tmp_path / "png") == 0
    printed = capsys.readouterr().out
    align, rest = printed.split("stages warmup, route: ")
    assert align.startswith(
        "stage align: template plain, 24 x 24 pixels (square, clip), 4 tokens an image, seq_length 200"
    )
    assert rest.startswith("template v1, 24 x 24 pixels (pad, clip)") and "training order of seed 7" in rest
    config = load_config(run_yaml)
    for name, text in (("align", align), ("warmup", rest)):
        stage = config.for_stage(name)
        session = SimpleNamespace(
            topology=SimpleNamespace(reads_data=True, data=SimpleNamespace(rank=0, size=1)),
            tokenizer=build_tokenizer(stage.data.tokenizer),
        )
        stage.language.vocab_size = session.tokenizer.vocab_size
        steps = take(
            train_loader(
                session,
                stage,
                StageKind(name),
                ShardDataset(stage.data.train_data),
                order=SampleOrder(9, 7, key=name),
                lengths=None,
                start_position=0,
                features=None,
            ),
            2,
        )
        batches = [batch for step in steps for batch in step.microbatches][:3]
        places = [text.index(f"{batch.keys[0]} of ") for batch in batches]
        assert (
            places == sorted(places)
            and {"align": "<image>⟦There are", "warmup": "ASSISTANT:⟦ There are"}[name] in text
        )
        for batch in batches:
            png = np.asarray(Image.open(tmp_path / "png" / name / f"{batch.keys[0]}.0.png"))
            assert np.array_equal(png, batch.images[0].permute(1, 2, 0).numpy())


def test_stages_are_shown_together_if_their_samples_and_order_are_the_same(run_yaml, capsys):
    assert run("--config", run_yaml, "--num", 0, "--conversation-template", "v1") == 0
    assert "stages warmup, route: " in capsys.readouterr().out
    run_yaml.write_text(run_yaml.read_text().replace("continue_data: true", "continue_data: false"))
    assert run("--config", run_yaml, "--num", 0) == 0
    printed = capsys.readouterr().out
    assert "stage warmup: " in printed and "stage route: " in printed
    assert run("--config", run_yaml, "--num", 0, "--stored-order") == 0
    assert "stages warmup, route: " in capsys.readouterr().out


def test_one_stage_flags_and_held_out_questions(run_yaml, shards, tmp_path, capsys):
    assert run("--config", run_yaml, "--stage", "warmup", "--eval", "--num", 1) == 0
    printed = capsys.readouterr().out
    assert (
        "USER: <image>\nWhich digit is this? ASSISTANT:\nexpected: A seven" in printed and "⟦" not in printed
    )
    assert (
        "ASSISTANT: A seven</s>USER: Is it even? ASSISTANT:\nexpected: No" in printed
        and "stored order" in printed
    )
    assert (
        run(
            "--config",
            run_yaml,
            "--data",
            shards,
            "--template",
            "qwen",
            "--image-size",
            48,
            "--seq-length",
            400,
            "--num",
            1,
            "--stored-order",
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "<|im_start|>user" in printed
        and "48 x 48 pixels" in printed
        and "seq_length 400" in printed
        and "1 shards" in printed
    )
    with pytest.raises(ConfigError, match="no stage 'gone'"):
        run("--config", run_yaml, "--stage", "gone")
    with pytest.raises(ConfigError, match="--stage warmup is a stage of a run"):
        run("--data", shards, "--stage", "warmup")
    with pytest.raises(ConfigError, match="must not be negative"):
        run("--config", run_yaml, "--start", "-1")
    with pytest.raises(ConfigError, match="no shards to show"):
        run("--tokenizer", tmp_path)


def test_without_a_configuration_a_seed_shuffles(run_yaml, sp_path, tmp_path, capsys):
    found = {}
    for name, flags in {
        "stored": [],
        "seed": ["--seed", "7"],
        "run": ["--config", run_yaml, "--stage", "warmup"],
    }.items():
        assert (
            run(
                *(
                    flags
                    if "--config" in flags
                    else [
                        "--data",
                        tmp_path / "more",
                        "--tokenizer",
                        sp_path,
                        "--image-size",
                        24,
                        "--patch-size",
                        12,
                        *flags,
                    ]
                ),
                "--num",
                9,
            )
            == 0
        )
        found[name] = re.findall(r"^(\d{9}) of ", capsys.readouterr().out, re.M)
    assert found["stored"] == sorted(found["stored"]) == sorted(found["seed"]) == sorted(found["run"])
    assert found["seed"] != found["stored"] and found["run"] != found["stored"]


def test_page_of_a_run(run_yaml, tmp_path, capsys):
    """The page has a section for each group of stages, with figures of all samples and some of them shown."""
    page = tmp_path / "out" / "page.html"
    assert run("--config", run_yaml, "--html", page, "--num", 3, "--processes", 1) == 0
    text = page.read_text()
    assert (
        text.count("<h2>") == 2 and "<h2>stage align</h2>" in text and "<h2>stages warmup, route</h2>" in text
    )
    assert text.count("<article>") == text.count("<img") == 6
    assert re.search(r"<mark> There are \d\.&lt;/s&gt;</mark>", text)
    for title in ("Lengths", "Tokens of a sample", "Padding", "Left out", "Duplicates"):
        assert text.count(f"<h3>{title}</h3>") == 2
    assert "among 9 of 9 samples: 0 could be left out" in text
    assert "9 of 9, evenly spread; 0 of them are unusable" in text
    assert f"wrote {page}" in capsys.readouterr().out
    assert run("--config", run_yaml, "--stage", "align", "--html", page, "--eval") == 0
    text = page.read_text()
    assert "<p>expected:</p><pre>A seven</pre>" in text and "<h3>Padding</h3>" not in text


def test_lengths_of_a_run(run_yaml, tmp_path, capsys):
    """`--lengths` counts what training will look for, and says what a sample's length means for the run."""
    arguments = ["--config", run_yaml, "--lengths", "--processes", 1, "--seq-length", 60]
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"lengths of samples in \S+: 9 of 9 samples", printed)
    config = load_config(run_yaml).for_stage("warmup")
    lengths = open_lengths(
        ShardDataset(config.data.train_data),
        build_tokenizer(config.data.tokenizer),
        config.data,
        config.vision.tokens_per_image,
        say=lambda line: pytest.fail(f"counted again: {line}"),
    )
    assert f"lengths: {lengths.path}" in printed
    longer = int((lengths[range(9)] > 60).sum())
    assert longer > 0 and re.search(rf"left out as too long +{longer}\n", printed.split("stages warmup")[1])
    assert re.search(r"(?m)^pack +0\.0 %", printed)
    assert run(*arguments) == 0  # `align`, whose samples are short, has usable ones
    assert run(*arguments, "--stage", "warmup") == 1
    assert "9 of 9 samples" not in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match="--replicas 2 x micro_batch_size 2 must divide global_batch_size 2"
    ):
        run(*arguments, "--replicas", 2, "--micro-batch-size", 2)
    with pytest.raises(ConfigError, match="--lengths is about training samples"):
        run(*arguments, "--eval")
