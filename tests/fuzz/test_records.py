"""A KEY.json of any content is trained on as it states, or counted under a documented reason."""

from __future__ import annotations

import io
import json
import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data import make_shards
from megatron_evomoe.data.batch import Row, prepare_eval
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.image import ImageProcessor
from megatron_evomoe.data.sample_record import load_json
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.tokenizer import Tokenizer

from .samples import TOKENS_PER_IMAGE, picture, reasons, rows, tar, tokenizer

SHOWN = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "It is seven."}]
SAID = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Which digit?"},
    {"from": "gpt", "value": "seven"},
    {"from": "human", "value": "is this?"},
    {"from": "gpt", "value": "It is."},
]
PARTS = [
    {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "text", "text": "Which?"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "seven"}]},
]
RECORDS = [
    {"id": 1, "image": "a.jpg", "conversations": SHOWN},
    {"id": "2", "kind": "count", "conversations": SAID},
    {"messages": PARTS, "images": ["a.jpg"]},
    {"url": "https://host/a.jpg", "caption": "seven", "width": 8, "sha256": "0"},
]
HOSTILE = [
    "\ud800",
    "a\0b",
    "<video>",
    "<image>",
    "x.mp4",
    "data:image/png;base64,AA",
    "<|im_end|>",
    "</s>",
    "tool",
    "system",
    "gpt",
    "user",
    "",
    " ",
    "é" * 50,
    "a" * 20000,
    "٣",
    "\u202e",
    "image",
    "video",
    "9" * 50,
]
NAMES = [
    "from",
    "value",
    "role",
    "content",
    "type",
    "text",
    "image",
    "images",
    "video",
    "audio",
    "conversations",
    "messages",
    "caption",
    "tools",
    "tool_calls",
    "kind",
    "url",
    "path",
    "frames",
    "clip",
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(HOSTILE),
)
FIELDS = st.one_of(st.sampled_from(NAMES), st.text(max_size=4))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(FIELDS, inner, max_size=3)),
    max_leaves=6,
)


def places(value, path=()):
    """The paths of all places in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def changed(record, path, value, added):
    """Return `record` with the value at `path` replaced.

    Where `added` is given and `path` leads to an object, the object gets one more field instead.
    """
    if not path:
        return {**record, added: value} if isinstance(record, dict) and added else value
    copy = dict(record) if isinstance(record, dict) else list(record)
    copy[path[0]] = changed(copy[path[0]], path[1:], value, added)
    return copy


@st.composite
def records(draw):
    record = draw(st.sampled_from(RECORDS))
    for _ in range(draw(st.integers(1, 2))):
        added = draw(st.sampled_from([None, None, *NAMES]))
        record = changed(record, draw(st.sampled_from(list(places(record)))), draw(VALUES), added)
    return record


def expected_answers(record):
    """The answers to be trained, read independently of the package; None where a record has no such form."""
    turns = record.get("conversations") or record.get("messages")
    if not turns:
        return [str(record.get("caption")).strip()]
    out = []
    for turn in turns:
        name, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        said = said if isinstance(said, str) else "".join(part.get("text", "") for part in said)
        if name in ("gpt", "assistant"):
            out.append(said.strip())
    begins = next(name for turn in turns if (name := turn.get("from", turn.get("role"))) != "system")
    return out[1:] if begins in ("gpt", "assistant") else out


def answers(row: Row, tokens: Tokenizer) -> list[str]:
    spans, last = [], False
    for label in row.sample.labels:
        if label != IGNORE_INDEX:
            spans = spans if last else [*spans, []]
            spans[-1].append(label)
        last = label != IGNORE_INDEX
    return [tokens.decode(span).strip() for span in spans]


def judge(tally, row: Row, data: bytes, images: int) -> None:
    if row.problem is not None:
        tally.add("counted")
        return
    assert (
        row.sample.token_types.count(TokenType.VISION) == images * TOKENS_PER_IMAGE
        and len(row.images) == images
    )
    assert answers(row, tokenizer()) == expected_answers(json.loads(data)), data
    tally.add("right")


def try_all(tally, folder, bodies: list[bytes], with_image: list[bool]) -> None:
    members = []
    for i, (body, shown) in enumerate(zip(bodies, with_image, strict=True)):
        members += [(f"{i}.jpg", picture())] if shown else []
        members.append((f"{i}.json", body))
    path = folder / "a.tar"
    path.write_bytes(tar(members))
    dataset = ShardDataset(path)
    for i, row in enumerate(rows(dataset)):
        judge(tally, row, bodies[i], int(with_image[i]))
        try:
            prepare_eval(dataset.read(i), tokenizer(), *_eval_arguments(), max_length=256)
        except SampleError as error:
            assert row.problem is not None or error.reason in ("bad-kind", "too-long", "no-conversation")


def _eval_arguments():
    return ImageProcessor(8), "v1", TOKENS_PER_IMAGE


def test_records(tally, tmp_path):
    @settings(
        derandomize=True,
        deadline=None,
        max_examples=tally.tries(40),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(records(), min_size=4, max_size=4))
    def run(drawn):
        bodies = [json.dumps(record).encode() for record in drawn]
        try_all(tally, tmp_path, bodies, [b".jpg" in body or b"<image>" in body for body in bodies])

    run()


def damaged(body: bytes, rng: random.Random) -> bytes:
    """A record's bytes with one fault of the kinds that occur in files."""
    at = rng.randrange(len(body))
    kind = rng.randrange(8)
    if kind == 0:
        return body[:at] + bytes([body[at] ^ 1 << rng.randrange(8)]) + body[at + 1 :]
    if kind == 1:
        return body[:at]
    if kind == 2:
        return body.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-16-be", "utf-7"]))
    if kind == 3:
        return body[:at] + rng.randbytes(rng.randrange(1, 9)) + body[at:]
    if kind == 4:
        return body[:-1] + b"," + body[1:]  # the record then has every field twice
    if kind == 5:
        return body.replace(
            b'"id": 1', b'"id": ' + rng.choice([b"9" * 5000, b"NaN", b"-Infinity", b"1e999", b"[" * 10**4])
        )
    if kind == 6:
        return body.replace(
            b"seven", rng.choice([b"\\ud800", b"\\u0000", b"\xed\xa0\x80", b"\xff", b"s" * 10**5])
        )
    return body + rng.choice([b"\0", b"\n", b"}", b"{}", bytes(600)])


def test_record_bytes(tally, tmp_path):
    bodies, shown = [], []
    for rng in tally.draws(150):
        record = rng.choice(RECORDS)
        bodies.append(damaged(json.dumps(record).encode(), rng))
        shown.append(record is not RECORDS[1])
    for start in range(0, len(bodies), 50):
        try_all(tally, tmp_path, bodies[start : start + 50], shown[start : start + 50])


def test_made_shards(tally, tmp_path):
    """Samples that make-shards writes are usable, and the others are in its report, which can be printed."""
    pictures, output = tmp_path / "images", tmp_path / "out"
    pictures.mkdir()
    (pictures / "a.jpg").write_bytes(picture())
    (output / make_shards._PROGRESS).mkdir(parents=True)
    job = make_shards.Job("x.json", "0", str(pictures), 100, 10**6)

    @settings(
        derandomize=True,
        deadline=None,
        max_examples=tally.tries(25),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(records(), min_size=4, max_size=4))
    def run(drawn):
        drawn = load_json(json.dumps(drawn).encode())
        path = output / "shard-000000.tar"
        path.unlink(missing_ok=True)
        _, skipped = make_shards.write_shard(drawn, 0, output, job)
        report = make_shards._report(output, job, len(drawn), 1)
        make_shards._print(report, output, Console(file=io.StringIO()))
        assert set(report["skipped_by_reason"]) <= reasons()
        found = rows(ShardDataset(path)) if path.exists() else []
        assert len(found) == len(drawn) - skipped
        for row in found:
            assert row.problem is None or row.problem[0] == "too-long"
            tally.add("right")
        for _ in range(skipped):
            tally.add("counted")

    run()
