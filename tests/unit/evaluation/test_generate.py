"""The `generate` command and its chat, run as users start them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_evomoe.cli import main
from megatron_evomoe.generate.dialogue import Dialogue
from megatron_evomoe.generate.loading import ModelError, load
from tests import programs

from . import helpers

ROOT = Path(__file__).parents[3]


def run(*args, typed=""):
    argv = ("-m", "megatron_evomoe", "generate", *map(str, args))
    return programs.run(*argv, typed=typed, expect=None, timeout=60)


@pytest.fixture(scope="module")
def loaded(model_dir):
    return load(model_dir, "float32", "cpu")


@pytest.fixture
def image(tmp_path):
    return helpers.picture(tmp_path / "x.png", 200)


def test_one_answer_in_a_process(tmp_path, image):
    model_dir = helpers.write_model(tmp_path / "model", "evomoe")
    loaded = load(model_dir, "float32", "cpu")
    finished = run(
        "--model",
        model_dir,
        "--image",
        image,
        "--prompt",
        "What is it?",
        "--max-new-tokens",
        6,
        "--dtype",
        "float32",
    )
    assert finished.returncode == 0, finished.stderr
    conversation = Dialogue()
    conversation.attach(image)
    conversation.ask("What is it?")
    said = loaded.answer(
        loaded.encode([conversation.messages], conversation.images), max_new_tokens=6, do_sample=False
    )[0]
    assert said
    assert finished.stdout.strip() == said


def test_chat_in_a_process(model_dir, image, loaded):
    typed = f"hello\n/image {image}\nlook\n/image nowhere.png\n/what\n/reset\n\nhello\n/quit\nnever read\n"
    finished = run("--model", model_dir, "--max-new-tokens", 4, "--dtype", "float32", typed=typed)
    assert finished.returncode == 0, finished.stderr
    assert "error: image nowhere.png cannot be read: No such file or directory" in finished.stderr
    # The help is printed at the start and for the unknown command /what.
    assert finished.stderr.count("/reset starts a new conversation") == 2
    conversation = Dialogue()
    first = answer(loaded, conversation, "hello")
    conversation.attach(image)
    second = answer(loaded, conversation, "look")
    # After /reset the first question gets the first answer again.
    assert words(finished.stdout) == words(f"{first}\n{second}\n{first}\n")


def answer(model, conversation, question):
    conversation.ask(question)
    said = model.answer(
        model.encode([conversation.messages], conversation.images), max_new_tokens=4, do_sample=False
    )[0]
    conversation.answered(said)
    return said


def words(text):
    """`text` without whitespace, which the stream keeps but answers lack at their ends."""
    return "".join(text.split())


def ask(capsys, model_dir, *args):
    assert (
        main(
            [
                "generate",
                "--model",
                str(model_dir),
                "--prompt",
                "Tell me",
                "--max-new-tokens",
                "8",
                *map(str, args),
            ]
        )
        == 0
    )
    return capsys.readouterr().out


def test_sampling_follows_the_seed(capsys, model_dir):
    options = ("--temperature", 1.5, "--top-p", 0.95)
    texts = [ask(capsys, model_dir, *options, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_beams(capsys, model_dir):
    assert ask(capsys, model_dir, "--num-beams", 3) == ask(capsys, model_dir, "--num-beams", 3)


def test_two_images(capsys, model_dir, image, tmp_path):
    other = helpers.picture(tmp_path / "y.png", 20)
    texts = [
        ask(capsys, model_dir, "--image", image, "--image", other),
        ask(capsys, model_dir, "--image", image, "--image", image),
    ]
    assert texts[0] != texts[1]


def test_withdrawing_a_question_takes_its_images_along(image):
    conversation = Dialogue()
    conversation.attach(image)
    conversation.ask("one")
    conversation.answered("yes")
    conversation.attach(image)
    conversation.attach(image)
    conversation.ask("two")
    conversation.withdraw()
    assert len(conversation.images) == 1
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--temperature", "-1"), "argument --temperature: must be at least 0, got -1"),
        (("--temperature", "1e-9"), "--temperature 1e-09 is too low"),
        (("--top-p", "0"), "argument --top-p: must be more than 0, got 0"),
        (("--seed", "-1"), "argument --seed: must be at least 0"),
        (("--num-beams", "0"), "must be at least 1"),
        (("--image", "nowhere.png"), "image nowhere.png cannot be read"),
        (("--device", "toaster"), "cannot be put on device toaster"),
    ],
)
def test_errors_take_one_line(capsys, model_dir, args, message):
    assert main(["generate", "--model", str(model_dir), "--prompt", "x", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture
def broken(tmp_path):
    return helpers.write_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "lacks weights: model.safetensors"),
        ("tokenizer.json", "has no tokenizer"),
        ("*processor_config.json", "has no image processor"),
        ("chat_template.jinja", "has no chat template"),
    ],
)
def test_a_missing_file_is_named(broken, names, message):
    for path in broken.glob(names):
        path.unlink()
    with pytest.raises(ModelError, match=message):
        load(broken, device="cpu")


def test_missing_tensors_are_refused(broken):
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    name = next(key for key in tensors if "multi_modal_projector" in key)
    del tensors[name]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"1 tensors do not fit the architecture, the first: missing .*multi_modal_projector"
    ):
        load(broken, device="cpu")


def test_code_of_the_directory_is_not_run(broken):
    config = json.loads((broken / "config.json").read_text())
    config |= {
        "model_type": "mystery",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"},
    }
    helpers.write_json(broken / "config.json", config)
    (broken / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(broken, device="cpu")
    assert not (broken / "ran").exists()
