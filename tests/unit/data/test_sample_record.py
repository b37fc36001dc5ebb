"""Records of all kinds are read as what they say, or refused with a reason.

A record that names more than text is never trained on as text alone.
"""

from __future__ import annotations

import json

import pytest

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.batch import Preparer, prepare_eval
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.sample_record import MAX_RECORD_BYTES, image_names, load_json, usable_record
from megatron_evomoe.data.shards import ShardDataset

from .helpers import TOKENS_PER_IMAGE, chat, jpeg, write_tar

TEXT, SHOWN = chat("Is it even?"), chat("<image>\nWhich digit?")
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]


def user(*parts, answer="Seven"):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]}


def said(question, answer="Seven"):
    return [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]


def text(value):
    return {"type": "text", "text": value}


PICTURE = {"type": "image_url", "image_url": {"url": "digits/7.jpg"}}


@pytest.mark.parametrize(
    ("record", "images", "turns"),
    [
        ({"conversations": TEXT, "messages": None}, 0, TEXT),
        ({"messages": DIALOGUE}, 0, [{"from": "system", "value": "Be brief."}, *said("Hi", "Hello")]),
        ({"conversations": DIALOGUE[1:]}, 0, said("Hi", "Hello")),
        (user(PICTURE, text("Which digit?")), 1, said("<image>Which digit?")),
        (
            user({"type": "image"}, text("or"), {"type": "image", "image": "b.png"}, text("?")),
            2,
            said("<image>or<image>?"),
        ),
        (user(text("Hi"), answer=[text("Hel"), text("lo")]), 0, said("Hi", "Hello")),
        (
            {**user({"type": "image_url", "image_url": {"url": "https://host/7.jpg"}}), "images": ["7.jpg"]},
            1,
            said("<image>"),
        ),
        (
            {"messages": [{"role": "user", "content": "<image>\nWhich?"}, DIALOGUE[2]], "images": ["7.jpg"]},
            1,
            said("<image>\nWhich?", "Hello"),
        ),
        (
            {"caption": "a seven", "url": "https://host/7.tiff", "width": 3, "sha256": "0"},
            1,
            chat("<image>", "a seven"),
        ),
    ],
)
def test_forms_of_a_conversation(record, images, turns):
    assert usable_record(record, images)["conversations"] == turns


@pytest.mark.parametrize(
    ("fields", "images", "reason"),
    [
        ({"video": "a"}, 0, "unread-media"),
        ({"Video": "a"}, 1, "unread-media"),
        ({"videoPath": ["a"]}, 0, "unread-media"),
        ({"video_url": {"url": "a"}}, 1, "unread-media"),
        ({"audios": [1]}, 0, "unread-media"),
        ({"clip": "x/y.mp4"}, 0, "unread-media"),
        ({"meta": {"deep": [{"source": "a.WAV"}]}}, 1, "unread-media"),
        ({"features": "a.npy"}, 0, "unread-media"),
        ({"frames": ["a.jpg"]}, 1, "unread-media"),
        ({"path": "https://h/a.webm?x=1"}, 0, "unread-media"),
        ({"image": "a.jpg"}, 0, "missing-image"),
        ({"images": ["a"]}, 0, "missing-image"),
        ({"image_path": "a"}, 0, "missing-image"),
        ({"picture": {"bytes": "x"}}, 0, "missing-image"),
        ({"source": "a.heic"}, 0, "missing-image"),
        ({"images": ["a", "b"]}, 1, "image-count"),
        ({"image": ["a", "b"]}, 1, "image-count"),
        ({"image_paths": []}, 1, None),
        ({"tools": [{"name": "f"}]}, 0, "tool-turn"),
        ({"messages": DIALOGUE}, 0, "two-conversations"),
        ({"video": None, "audio": "", "images": [], "has_video": False, "tools": []}, 0, None),
        ({"url": "https://h/a.jpg", "width": 640, "clip_score": 0.3, "image_id": 7, "id": "x"}, 1, None),
        (
            {"url": "https://h/page.html", "source": "forum", "model": "m", "score": 1.5, "kind": "count"},
            0,
            None,
        ),
    ],
)
def test_what_a_record_names(fields, images, reason):
    record = {"conversations": SHOWN if images else TEXT, **fields}
    if reason is None:
        assert usable_record(record, images)["conversations"] == record["conversations"]
    else:
        with pytest.raises(SampleError) as error:
            usable_record(record, images)
        assert error.value.reason == reason


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"from": "human", "value": "hi", "video": "a"}, "unread-media"),
        ({"from": "human", "value": "hi", "image": "a"}, "missing-image"),
        ({"role": "tool", "content": "3"}, "tool-turn"),
        ({"from": "observation", "value": "3"}, "tool-turn"),
        ({"from": "function_call", "value": "f()"}, "tool-turn"),
        ({"role": "assistant", "content": None, "tool_calls": [1]}, "tool-turn"),
        ({"role": "user", "content": [{"type": "tool_result", "content": "3"}]}, "tool-turn"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "unread-media"),
        ({"role": "user", "content": [{"type": "video_url", "video_url": {}}]}, "unread-media"),
        ({"role": "user", "content": [{"type": "text", "text": "hi", "video": "a"}]}, "unread-media"),
        (
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}],
            },
            "image-url",
        ),
        ({"role": "user", "content": [{"type": "image"}]}, "image-count"),
        ({"role": "assistant", "content": [{"type": "image"}]}, "bad-turn"),
        ({"role": "user", "content": [7]}, "bad-turn"),
        ({"role": "user", "content": None}, "bad-turn"),
        ({"role": "user", "from": "human", "content": "hi"}, "bad-turn"),
        *(({"from": name, "value": "hi"}, "bad-turn") for name in (["human"], {}, 3, None, "bot", "")),
        *(({"from": "human", "value": value}, "bad-text") for value in ("a\ud800", "a\0b")),
        *(
            ({"from": "human", "value": f"what is {place} here"}, "media-placeholder")
            for place in (
                "<video>",
                "<audio>",
                "<Image>",
                "<image_1>",
                "<|image_1|>",
                "<|vision_start|>",
                "<IMG_CONTEXT>",
                "<ImageHere>",
                "[IMG]",
                "<img>",
            )
        ),
        ({"from": "system", "value": "look at <image>"}, "media-placeholder"),
    ],
)
def test_turns_that_are_not_read(tmp_path, sp, processor, turn, reason):
    answer = {"from": "gpt", "value": "<video> and <image> may be said"}
    first = [] if turn.get("from") == "system" else [turn]
    turns = (
        [turn, *chat("hi")]
        if not first
        else [turn, answer]
        if turn.get("role") != "assistant"
        else [chat("hi")[0], turn]
    )
    path = write_tar(tmp_path / "a.tar", [("x.json", json.dumps({"conversations": turns}).encode())])
    row = Preparer(ShardDataset(path), sp, processor, "v1", TOKENS_PER_IMAGE, 512, "skip", 10**6).row(0)
    assert row.problem is not None and row.problem[0] == reason
    assert row.problem[1].isprintable() and len(row.problem[1]) < 300


def test_img2datasets_layout(tmp_path, sp, processor):
    meta = {
        "uid": "0",
        "url": "https://host/a.jpg",
        "caption": "a cat",
        "width": 24,
        "height": 16,
        "sha256": "ab",
        "status": "success",
        "error_message": None,
        "exif": "{}",
        "similarity": float("nan"),
    }
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("0.jpg", jpeg(0)),
            ("0.txt", b"\xef\xbb\xbfa cat"),
            ("0.json", json.dumps({**meta, "caption": None}).encode()),
            ("1.jpg", jpeg(1)),
            ("1.json", json.dumps(meta).encode()),
            ("2.txt", b"a cat"),
            ("2.json", json.dumps(meta).encode()),
            ("3.jpg", jpeg(3)),
            ("3.txt", b"not this"),
            ("3.json", json.dumps({"conversations": SHOWN}).encode()),
            ("4.jpg", jpeg(3)),
            ("4.txt", b"\xff\xfe"),
            ("4.json", b"{}"),
        ],
    )
    dataset = ShardDataset(path)
    assert [dataset.read(i).record["conversations"] for i in (0, 1, 3)] == [chat("<image>", "a cat")] * 2 + [
        SHOWN
    ]
    assert dataset.read(0).record["sha256"] == "ab"
    preparer = Preparer(dataset, sp, processor, "plain", TOKENS_PER_IMAGE, 512, "skip", 10**6)
    rows = [preparer.row(i) for i in range(5)]
    assert [row.problem and row.problem[0] for row in rows] == [None, None, "missing-image", None, "bad-text"]
    assert rows[0].sample.token_types.count(TokenType.VISION) == TOKENS_PER_IMAGE


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'{"conversations": [], "id": 1, "id": 2}', "id.* twice"),
        (b"[" * 10**6, "deep"),
        (b"\xff\xfe{", "decode"),
        (b"{\x80}", "decode"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": 1}}', "Extra"),
        (b"", "Expecting"),
        (b"\0", "."),
    ],
)
def test_json_that_is_refused(data, what):
    with pytest.raises(SampleError, match=f"bad-json.*{what}"):
        load_json(data)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_encodings_of_json(encoding):
    assert load_json('{"a": "ä😀", "b": NaN}'.encode(encoding))["a"] == "ä😀"


def test_size_is_looked_at_first(tmp_path, sp, processor, monkeypatch):
    long = [
        {"conversations": chat("x" * 10**6)},
        {"conversations": chat("a b " * 10**5)},
        {"conversations": [turn for _ in range(600) for turn in chat("a", "b")]},
    ]
    path = write_tar(
        tmp_path / "a.tar",
        [
            *((f"{i}.json", json.dumps(record).encode()) for i, record in enumerate(long)),
            ("3.json", b'{"conversations": "' + b"x" * MAX_RECORD_BYTES + b'"}'),
            ("4.txt", b"x" * (MAX_RECORD_BYTES + 1)),
        ],
    )
    monkeypatch.setattr(type(sp), "encode", None)
    for policy in ("skip", "truncate"):
        preparer = Preparer(ShardDataset(path), sp, processor, "v1", TOKENS_PER_IMAGE, 512, policy, 10**6)
        assert [preparer.row(i).problem[0] for i in range(5)] == ["too-long"] * 3 + ["record-too-large"] * 2


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        ("count", True),
        (3, True),
        (2.5, True),
        (["a"], False),
        ({}, False),
        ("a\nb", False),
        ("\ud800", False),
        ("x" * 81, False),
    ],
)
def test_kinds_of_questions(tmp_path, sp, processor, kind, good):
    path = write_tar(
        tmp_path / "a.tar", [("x.json", json.dumps({"conversations": TEXT, "kind": kind}).encode())]
    )
    raw = ShardDataset(path).read(0)
    if good:
        assert prepare_eval(raw, sp, processor, "v1", TOKENS_PER_IMAGE)[0].metadata["kind"] == kind
    else:
        with pytest.raises(SampleError, match="bad-kind"):
            prepare_eval(raw, sp, processor, "v1", TOKENS_PER_IMAGE)


def test_held_out_prompts_are_bounded(tmp_path, sp, processor):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("x.json", json.dumps({"conversations": chat("Is it even? " * 50)}).encode()),
            ("y.json", json.dumps({"conversations": chat("hi" * 10**6)}).encode()),
        ],
    )
    dataset = ShardDataset(path)
    assert len(prepare_eval(dataset.read(0), sp, processor, "v1", TOKENS_PER_IMAGE, max_length=2000)) == 1
    for i, length in ((0, 300), (1, 300)):
        with pytest.raises(SampleError, match="too-long"):
            prepare_eval(dataset.read(i), sp, processor, "v1", TOKENS_PER_IMAGE, max_length=length)


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({"image": "a"}, ["a"]),
        ({"image": ["a", "b"]}, ["a", "b"]),
        ({"images": ["a"]}, ["a"]),
        ({}, []),
        ({"images": "a", "image": "a"}, ["a"]),
        (
            user(PICTURE, text("or"), {"type": "image", "path": "b"}, {"type": "image"}),
            ["digits/7.jpg", "b", None],
        ),
        ({**user(PICTURE), "images": ["c"]}, ["c"]),
    ],
)
def test_image_names(record, names):
    assert image_names(record) == names


def test_image_names_that_differ():
    with pytest.raises(SampleError, match="image-count"):
        image_names({"image": "a", "images": ["b"]})
