"""Every command line of the README is run as it is written there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT, environment

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (\S.*)$", README, re.M)
ELSEWHERE = {
    "bash tests/run.sh": "this suite is what it runs",
    "pip install .": "every installation of examples/setup_venv.sh does it, and test_wheel_is_complete looks "
    "at the result",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, digits) -> Path:
    """A folder that looks like a checkout with a user's data, as the README's commands assume."""
    folder = tmp_path_factory.mktemp("readme")
    for name in (
        "examples",
        "tests",
        "tools",
        "megatron_evomoe",
        "constraints.txt",
        "pyproject.toml",
        "README.md",
    ):
        (folder / name).symlink_to(ROOT / name)
    from megatron_evomoe.data.shards import ShardDataset

    (folder / "data" / "images").mkdir(parents=True)
    (folder / "data" / "tokenizer.model").symlink_to(digits / "tokenizer.model")
    dataset, entries = ShardDataset([str(digits / "instruct")]), []
    for i in range(24):
        raw = dataset.read(i)
        entry = {"id": str(i), "conversations": raw.record["conversations"]}
        if raw.images:
            entry["image"] = f"{i}.png"
            (folder / "data" / "images" / entry["image"]).write_bytes(raw.images[0])
        entries.append(entry)
    (folder / "data" / "llava.json").write_text(json.dumps(entries))
    gqa_questions(
        folder / "data" / "gqa", [folder / "data" / "images" / e["image"] for e in entries if "image" in e]
    )
    pretrained_llava(
        folder / "models" / "llava", [turn["value"] for e in entries for turn in e["conversations"]]
    )
    yaml_block = re.search(r"```yaml\n(# run\.yaml.*?)```", README, re.S)
    (folder / "run.yaml").write_text(yaml_block.group(1))
    return folder


def gqa_questions(folder: Path, pictures: list[Path]) -> None:
    """The files of a benchmark as it is published, with questions about our own pictures."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.open(picture).convert("RGB").save(folder / "images" / f"{i}.jpg")
    asked = {
        str(i): {
            "imageId": str(i),
            "question": "Which digit is this?",
            "answer": "four",
            "isBalanced": True,
            "types": {"structural": "query", "semantic": "obj"},
        }
        for i in range(len(pictures))
    }
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(asked))


def pretrained_llava(folder: Path, corpus: list[str]) -> None:
    """A small random LLaVA as transformers saves it, with a tokenizer trained on `corpus`."""
    import tokenizers
    import transformers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        corpus,
        tokenizers.trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", add_bos_token=True
    ).save_pretrained(folder)
    text = transformers.LlamaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    tower = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    config = transformers.LlavaConfig(
        text_config=text, vision_config=tower, image_token_index=text.vocab_size - 1
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)


def test_readme_has_commands():
    assert len(COMMANDS) >= 14, COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ELSEWHERE])
def test_command_runs(command, checkout, digits, tmp_path_factory):
    extra = {"SMOKE": "1", "VENV": sys.prefix, "PYTHON": sys.executable, "GPUS_PER_NODE": "2"}
    extra["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # the recipe is for the paper's model and data; here it runs with a tiny preset and little data
    if "evomoe_llava" in command:
        small = tmp_path_factory.mktemp("recipe")
        for name in ("llava-558k", "hybrid-pt", "llava-mix-665k"):
            (small / name).symlink_to(digits / ("captions" if name == "llava-558k" else "instruct"))
        extra |= {
            "DATA": str(small),
            "TOKENIZER": str(digits / "tokenizer.model"),
            "PRESET": "tiny",
            "SAVE": str(small / "run"),
        }
        command += " --train-iters 2 --global-batch-size 4 --micro-batch-size 1 --num-workers 0"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=checkout,
        env=environment(**extra),
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if command.startswith("bash examples/quickstart.sh"):
        assert (
            checkout / "runs/quickstart/figures/loss.png"
        ).exists() and "Held-out exact match" in done.stdout


def test_wheel_is_complete(tmp_path):
    """The wheel contains every module, and the marker file of a typed package."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        check=True,
        timeout=300,
        capture_output=True,
    )
    import zipfile

    packed = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "megatron_evomoe").rglob("*.py")}
    expected = modules | {"megatron_evomoe/py.typed"}
    assert expected <= packed, sorted(expected - packed)
