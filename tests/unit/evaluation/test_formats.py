"""Each published format is read from a minimal file; other files are refused with an error."""

from __future__ import annotations

import json

import pytest

from megatron_evomoe.evaluation.item import BenchmarkError, Source, first_groups
from megatron_evomoe.evaluation.registry import BENCHMARKS

from . import helpers

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def read(name, *args, **kwargs):
    return BENCHMARKS[name].read(Source(*args, **kwargs))


def test_pope(tmp_path):
    path, images = helpers.write_pope(tmp_path, 2)
    first, second = read("pope", path, images)
    assert first.id == "random/1"
    assert first.prompt == f"Is there a number 1 in the image?\n{SHORT}"
    assert first.images == (images / "COCO_val2014_000000000000.jpg",)
    assert (first.metadata["answer"], second.metadata["answer"]) == ("yes", "no")
    helpers.write_pope(tmp_path, 1, "popular")
    # Images in the subfolder val2014/ are found too.
    assert [i.id for i in read("pope", tmp_path, tmp_path)] == [
        "popular/1",
        "random/1",
        "random/2",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 1, "image": "a.jpg", "text": "q"}', "pope.json:2: field 'label' is missing"),
        (
            '{"question_id": 1, "image": "a.jpg", "text": "q", "label": "maybe"}',
            "pope.json:2: label must be yes or no, got 'maybe'",
        ),
        (
            '{"question_id": 1, "image": "b.jpg", "text": "q", "label": "no"}',
            "pope.json:2: image b.jpg or val2014/b.jpg is not in",
        ),
        (
            '{"question_id": 1, "image": 7, "text": "q", "label": "no"}',
            "pope.json:2: field 'image' must be str, got 7",
        ),
        ("{", "pope.json:2 is not valid JSON"),
        ("[]", "pope.json:2: expected an object with 'image', got a list"),
    ],
)
def test_pope_errors(tmp_path, line, message):
    helpers.picture(tmp_path / "a.jpg")
    path = tmp_path / "pope.json"
    path.write_text(f"\n{line}\n")
    with pytest.raises(BenchmarkError, match=message):
        read("pope", path, tmp_path)


@pytest.mark.parametrize("nested", [True, False])
def test_mme(tmp_path, nested):
    folder = tmp_path / "count"
    helpers.picture(folder / ("images/a.png" if nested else "a.png"))
    text = folder / ("questions_answers_YN/a.txt" if nested else "a.txt")
    text.parent.mkdir(exist_ok=True)
    text.write_text(
        "Is there one dog? Please answer yes or no.\tYes\nAre there two? Please answer yes or no.\tNo\n"
    )
    (tmp_path / "eval_tool").mkdir()
    first, second = read("mme", tmp_path)
    assert first.prompt == f"Is there one dog?\n{SHORT}"
    assert (first.id, first.group, first.metadata) == (
        "count/a/0",
        "count/a",
        {"category": "count", "answer": "yes"},
    )
    assert second.metadata["answer"] == "no"
    assert first_groups([first, second], 1) == [first, second]  # both questions of an image stay together


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Q?\tYes\n", "has 1 questions; MME has two"),
        ("Q? Yes\nQ?\tNo\n", "a.txt:1 is not 'question TAB Yes|No'"),
        ("Q?\tYes\nQ?\tPerhaps\n", "a.txt:2: the answer must be yes or no"),
    ],
)
def test_mme_errors(tmp_path, text, message):
    helpers.picture(tmp_path / "count" / "a.jpg")
    (tmp_path / "count" / "a.txt").write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        read("mme", tmp_path)


def test_mme_without_categories(tmp_path):
    with pytest.raises(BenchmarkError, match="holds none of MME's categories"):
        read("mme", tmp_path)


def textvqa_file(folder, **record):
    helpers.picture(folder / "train_images" / "0a1b.jpg")
    full = {
        "question_id": 34602,
        "image_id": "0a1b",
        "question": "what brand is this?",
        "set_name": "val",
        **record,
    }
    return helpers.write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_version": "0.5.1", "data": [full]})


def test_textvqa(tmp_path):
    [item] = read("textvqa", textvqa_file(tmp_path, answers=["nokia"] * 10), tmp_path)
    assert (item.id, item.prompt) == ("34602", f"what brand is this?\n{SHORT}")
    assert item.metadata["answer"] == ["nokia"] * 10
    record = {"image_id": "0a1b", "ocr_tokens": ["NOKIA", "D80"], "ocr_info": []}
    tokens = helpers.write_json(tmp_path / "ocr.json", {"data": [record]})
    [item] = read("textvqa", tmp_path / "TextVQA_0.5.1_val.json", tmp_path, ocr_tokens=tokens)
    assert item.prompt == f"what brand is this?\nReference OCR token: NOKIA, D80\n{SHORT}"


def test_textvqa_submission(tmp_path):
    items = read("textvqa", textvqa_file(tmp_path), tmp_path)  # the test split has no answers
    assert BENCHMARKS["textvqa"].score(items, {"34602": "x"}) == {}
    [path] = BENCHMARKS["textvqa"].submission(items, {"34602": "The Nokia."}, tmp_path)
    assert json.loads(path.read_text()) == [{"question_id": 34602, "answer": "nokia"}]


def vqav2_files(folder, split="val2014"):
    helpers.picture(folder / split.replace("-dev", "") / f"COCO_{split.replace('-dev', '')}_000000000042.jpg")
    questions = [{"image_id": 42, "question": "Is it red?", "question_id": 42001}]
    answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    annotation = {
        "question_id": 42001,
        "image_id": 42,
        "question_type": "is it",
        "answer_type": "yes/no",
        "answers": answers,
        "multiple_choice_answer": "yes",
    }
    return (
        helpers.write_json(
            folder / "questions.json", {"data_type": "mscoco", "data_subtype": split, "questions": questions}
        ),
        helpers.write_json(folder / "annotations.json", {"data_subtype": split, "annotations": [annotation]}),
    )


def test_vqav2(tmp_path):
    questions, annotations = vqav2_files(tmp_path)
    [item] = read("vqav2", questions, tmp_path, annotations)
    assert (item.id, item.prompt) == ("42001", f"Is it red?\n{SHORT}")
    assert item.images == (tmp_path / "val2014" / "COCO_val2014_000000000042.jpg",)
    assert item.metadata == {"answer": ["yes"] * 10, "answer_type": "yes/no", "question_type": "is it"}
    helpers.write_json(annotations, {"annotations": []})
    with pytest.raises(BenchmarkError, match=r"questions\[0\]: question_id 42001 is not in"):
        read("vqav2", questions, tmp_path, annotations)


def test_vqav2_submission(tmp_path):
    questions, _ = vqav2_files(tmp_path, "test-dev2015")
    items = read("vqav2", questions, tmp_path / "test2015")
    [path] = BENCHMARKS["vqav2"].submission(items, {"42001": "Two."}, tmp_path)
    assert json.loads(path.read_text()) == [{"question_id": 42001, "answer": "2"}]


def gqa_file(folder, **record):
    helpers.picture(folder / "n161313.jpg")
    full = {
        "question": "What color is it?",
        "imageId": "n161313",
        "isBalanced": True,
        "groups": {"global": "color", "local": "x"},
        "types": {"structural": "query", "semantic": "attr", "detailed": "directOf"},
        **record,
    }
    return helpers.write_json(folder / "testdev_balanced_questions.json", {"201307251": full})


def test_gqa(tmp_path):
    [item] = read("gqa", gqa_file(tmp_path, answer="red"), tmp_path)
    assert (item.id, item.prompt) == ("201307251", f"What color is it?\n{SHORT}")
    assert item.metadata["answer"] == "red"
    [path] = BENCHMARKS["gqa"].submission([item], {"201307251": "Red."}, tmp_path)
    assert json.loads(path.read_text()) == [{"questionId": "201307251", "prediction": "red"}]
    [item] = read("gqa", gqa_file(tmp_path), tmp_path)  # the test split has no answers
    assert BENCHMARKS["gqa"].score([item], {"201307251": "red"}) == {}


def test_gqa_is_no_list(tmp_path):
    with pytest.raises(BenchmarkError, match="expected an object of question id to question, got a list"):
        read("gqa", helpers.write_json(tmp_path / "q.json", []), tmp_path)


def scienceqa_folder(folder):
    problem = {
        "question": "Which one?",
        "choices": ["a  rock", "a tree"],
        "answer": 1,
        "hint": "",
        "image": None,
        "subject": "natural science",
        "grade": "grade8",
        "split": "test",
    }
    helpers.write_json(
        folder / "problems.json", {"4": problem, "5": {**problem, "image": "image.png", "hint": "Look."}}
    )
    helpers.write_json(folder / "pid_splits.json", {"test": ["4", "5"], "val": []})
    helpers.picture(folder / "images" / "test" / "5" / "image.png")
    return folder


def test_scienceqa(tmp_path):
    text, image = read("scienceqa", scienceqa_folder(tmp_path), tmp_path / "images")
    assert text.prompt == f"Context: N/A\nQuestion: Which one?\nOptions: (A) a rock (B) a tree\n{LETTER}"
    assert (text.images, text.metadata["answer"], text.metadata["grade"]) == ((), "B", 8)
    assert image.prompt.startswith("Context: Look.\n")
    assert image.images == (tmp_path / "images" / "test" / "5" / "image.png",)
    with pytest.raises(BenchmarkError, match="has no split 'dev'; it has test, val"):
        read("scienceqa", tmp_path / "problems.json", tmp_path, split="dev")


def mmbench_row(**columns):
    return {
        "index": 7,
        "question": "What is it?",
        "hint": "nan",
        "A": "dog",
        "B": "cat",
        "C": "",
        "D": "",
        "answer": "B",
        "category": "x",
        "image": helpers.encoded(),
        "l2-category": "y",
        "split": "dev",
        **columns,
    }


def test_mmbench_makes_rotations(tmp_path):
    row = mmbench_row(hint="Look.", C="a cow\twith tabs")
    items = read("mmbench", helpers.write_mmbench(tmp_path / "m.tsv", [row]))
    assert [i.id for i in items] == ["7", "1000007", "2000007"]
    assert items[0].prompt == f"Look.\nWhat is it?\nA. dog\nB. cat\nC. a cow\twith tabs\n{LETTER}"
    assert items[1].metadata["options"] == {"A": "cat", "B": "a cow\twith tabs", "C": "dog"}
    assert [i.metadata["answer"] for i in items] == ["B", "A", "C"]  # the rotation moves cat up
    assert items[0].images == (helpers.png(),)
    assert len(first_groups(items, 1)) == 3


def test_mmbench_published_rotations_and_image_references(tmp_path):
    rows = [mmbench_row(), mmbench_row(index=1_000_007, A="cat", B="dog", answer="A", image="7")]
    first, second = read("mmbench", helpers.write_mmbench(tmp_path / "m.tsv", rows))
    assert first.prompt.startswith("What is it?\nA. dog")
    assert (second.images, second.group) == (first.images, first.group)


def test_mmbench_chinese_prompt(tmp_path):
    [item, _] = read(
        "mmbench", helpers.write_mmbench(tmp_path / "m.tsv", [mmbench_row(question="这是什么?")])
    )
    assert item.prompt.endswith("\n请直接回答选项字母。")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"index": "x"}, "m.tsv:2: index must be a number"),
        ({"image": "?"}, "m.tsv:2: image is neither base64"),
        ({"answer": "D"}, "m.tsv:2: answer 'D' is none of A, B"),
        ({"B": "nan"}, "m.tsv:2: fewer than two options"),
    ],
)
def test_mmbench_errors(tmp_path, columns, message):
    with pytest.raises(BenchmarkError, match=message):
        read("mmbench", helpers.write_mmbench(tmp_path / "m.tsv", [mmbench_row(**columns)]))


def test_mmbench_header(tmp_path):
    (tmp_path / "m.tsv").write_text("index,question\n1,x\n")
    with pytest.raises(
        BenchmarkError, match="is not a header of MMBench: column A, B, image, index, question is missing"
    ):
        read("mmbench", tmp_path / "m.tsv")


def test_mmbench_submission(tmp_path):
    # The file of the test split has no answers.
    row = {name: value for name, value in mmbench_row().items() if name != "answer"}
    items = read("mmbench", helpers.write_mmbench(tmp_path / "m.tsv", [row]))
    assert BENCHMARKS["mmbench"].score(items, {"7": "B"}) == {}
    paths = BENCHMARKS["mmbench"].submission(items, {"7": "B\x00"}, tmp_path)
    assert paths[0].read_text() == "index\tquestion\tA\tB\tprediction\n7\tWhat is it?\tdog\tcat\tB\n"
    openpyxl = pytest.importorskip("openpyxl")
    rows = list(openpyxl.load_workbook(paths[1]).active.values)
    assert rows == [("index", "question", "A", "B", "prediction"), (7, "What is it?", "dog", "cat", "B")]
