"""The `evaluate` command runs end to end on a tiny model."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_evomoe.cli import main
from megatron_evomoe.evaluation.item import BenchmarkError
from megatron_evomoe.evaluation.registry import BENCHMARKS
from megatron_evomoe.evaluation.score_report import report
from tests import programs

from . import helpers

ROOT = Path(__file__).parents[3]
QUESTIONS = 150


def arguments(model, questions, images, output, *more):
    return [
        *map(
            str,
            (
                "evaluate",
                "--model",
                model,
                "--benchmark",
                "pope",
                "--questions",
                questions,
                "--images",
                images,
                "--output",
                output,
                "--max-new-tokens",
                3,
                "--dtype",
                "float32",
                "--device",
                "cpu",
                *more,
            ),
        )
    ]


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    return helpers.write_pope(tmp_path_factory.mktemp("pope"), QUESTIONS)


@pytest.fixture(scope="module")
def alone(pope, model_dir, tmp_path_factory):
    """The output of an uninterrupted run on one rank."""
    output = tmp_path_factory.mktemp("alone")
    assert main(arguments(model_dir, *pope, output, "--batch-size", 16)) == 0
    return output


def lines(output):
    return [
        json.loads(line)
        for path in sorted((output / "answers").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def test_predictions_and_metrics(alone):
    predictions = [json.loads(line) for line in (alone / "predictions.jsonl").read_text().splitlines()]
    assert [p["question_id"] for p in predictions] == [f"random/{n}" for n in range(1, QUESTIONS + 1)]
    assert len({p["text"] for p in predictions}) > 1  # the answers depend on the input
    document = json.loads((alone / "metrics.json").read_text())
    assert document["questions"] == QUESTIONS
    assert document["metrics"]["yes_ratio"] == 100  # the untrained model never says no
    assert document["metrics"]["accuracy"] == 50


def test_a_batch_answers_as_single_questions_do(alone, pope, model_dir, tmp_path):
    assert main(arguments(model_dir, *pope, tmp_path, "--batch-size", 1, "--limit", 20)) == 0
    whole = (alone / "predictions.jsonl").read_text().splitlines()
    assert (tmp_path / "predictions.jsonl").read_text().splitlines() == whole[:20]


def test_killed_then_finished_by_two_ranks(alone, pope, model_dir, tmp_path):
    one_by_one = arguments(model_dir, *pope, tmp_path, "--batch-size", 1)
    process = programs.start("-m", "megatron_evomoe", *one_by_one, output=tmp_path / "log.txt")
    path = tmp_path / "answers" / "rank-00000.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    process.kill()
    process.wait()
    whole = path.read_bytes().count(b"\n")
    assert 3 <= whole < QUESTIONS
    assert not (tmp_path / "metrics.json").exists()
    with open(path, "ab") as file:
        file.write(b'{"id": "random/149", "answer": "to')
    in_batches = arguments(model_dir, *pope, tmp_path, "--batch-size", 7)
    finished = programs.run("-m", "megatron_evomoe", *in_batches, ranks=2, timeout=120)
    assert finished.stdout.count("yes_ratio") == 2  # printed once: among the means, and as a column
    # No question is answered twice.
    assert sorted(p["id"] for p in lines(tmp_path)) == sorted(f"random/{n}" for n in range(1, QUESTIONS + 1))
    assert (tmp_path / "answers" / "rank-00001.jsonl").exists()
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / name).read_bytes() == (alone / name).read_bytes()


def test_a_raised_limit_goes_on(pope, model_dir, tmp_path):
    assert main(arguments(model_dir, *pope, tmp_path, "--limit", 2)) == 0
    assert main(arguments(model_dir, *pope, tmp_path, "--limit", 4)) == 0
    assert [p["id"] for p in lines(tmp_path)] == [f"random/{n}" for n in range(1, 5)]


def test_missing_answers_are_not_scored(tmp_path):
    items = [
        helpers.item("a", category="random", answer="yes"),
        helpers.item("b", category="random", answer="yes"),
    ]
    with pytest.raises(BenchmarkError, match="1 of 2 questions have no answer, the first: b"):
        report(BENCHMARKS["pope"], items, {"a": "yes"}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_model_in_the_same_folder(alone, pope, model_dir, tmp_path, capsys):
    other = tmp_path / "other"
    helpers.write_model(other, positions=512)
    assert main(arguments(other, *pope, alone)) == 2
    assert "holds answers of another run: model differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--questions": "nowhere.json"}, "--questions nowhere.json does not exist"),
        ({"--images": "nowhere"}, "--images nowhere is not a folder"),
        ({"--model": "nowhere"}, "--model nowhere is not a directory"),
        ({"--batch-size": "0"}, "must be at least 1"),
        ({"--max-new-tokens": "4", "--questions": "EMPTY"}, "holds no questions"),
    ],
)
def test_errors_take_one_line(pope, model_dir, tmp_path, capsys, change, message):
    (tmp_path / "empty.json").write_text("\n")
    command = arguments(model_dir, *pope, tmp_path / "out", "--batch-size", 8)
    for flag, value in change.items():
        command[command.index(flag) + 1] = str(tmp_path / "empty.json") if value == "EMPTY" else value
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_broken_picture_is_named(pope, model_dir, tmp_path, capsys):
    path, images = helpers.write_pope(tmp_path, 2)
    (images / "COCO_val2014_000000000001.jpg").write_bytes(b"no picture")
    assert main(arguments(model_dir, path, images, tmp_path / "out")) == 2
    assert "question random/2: " in capsys.readouterr().err


def test_a_prompt_too_long_is_named(pope, tmp_path, capsys):
    model = helpers.write_model(tmp_path / "short", positions=32)
    assert main(arguments(model, *pope, tmp_path / "out", "--limit", 1)) == 2
    assert "questions random/1 to random/1: the prompt has" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llava", "evomoe"])
def test_text_only_and_image_questions_share_a_batch(kind, tmp_path):
    problem = {
        "question": "Which?",
        "choices": ["x", "y"],
        "answer": 0,
        "hint": "",
        "image": None,
        "subject": "natural science",
        "grade": "grade1",
    }
    helpers.write_json(
        tmp_path / "problems.json", {"1": problem, "2": {**problem, "image": "image.png"}, "3": problem}
    )
    helpers.write_json(tmp_path / "pid_splits.json", {"test": ["1", "2", "3"]})
    helpers.picture(tmp_path / "images" / "2" / "image.png")
    model = helpers.write_model(tmp_path / "model", kind)
    command = arguments(model, tmp_path, tmp_path / "images", tmp_path / "out", "--batch-size", 3)
    command[command.index("pope")] = "scienceqa"
    assert main(command) == 0
    texts = [
        json.loads(line)["text"] for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    ]
    assert texts[0] == texts[2] != texts[1]
