"""Converts a stored record of any known form to one with `conversations` in LLaVA's form.

The known forms are LLaVA's records, OpenAI's `messages` (role and content, with the content as text or in
parts), and captions: a KEY.txt, alone or beside a KEY.json of metadata (img2dataset), or the field `caption`
of a record with images.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.media import IMAGE_TOKEN, check_named_media, short

MAX_RECORD_BYTES = 8 << 20
"""A larger record is refused before it is read. The longest records of LLaVA have about 100 KB."""
_MAX_KIND = 80
_PARTS_TEXT, _PARTS_IMAGE = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id", "tools", "functions")
_IMAGE_NAMES = ("image_url", "image", "url", "path")
_PART_FIELDS = {False: ("type", "text"), True: ("type", *_IMAGE_NAMES)}
_UNREAD_PARTS = ("video", "audio", "file", "document", "sound", "speech")


def load_json(data: bytes) -> Any:
    """The data of a JSON text in UTF-8, UTF-16 or UTF-32.

    Raises:
        SampleError: bad-json; the text is not JSON, names a field twice, or is nested too deeply.
    """
    try:
        return json.loads(data, object_pairs_hook=_once)
    except RecursionError:
        raise SampleError("bad-json", "it is nested too deeply") from None
    except ValueError as error:  # also a number of too many digits
        raise SampleError("bad-json", str(error)) from None


def load_text(data: bytes) -> str:
    """The text of a caption in UTF-8. Raises `SampleError` bad-text."""
    try:
        return data.decode("utf-8-sig")
    except ValueError as error:
        raise SampleError("bad-text", str(error)) from None


def has_turns(record: Any) -> bool:
    """Whether a record has a conversation of its own, so that no caption is needed."""
    return isinstance(record, dict) and (
        record.get("conversations") is not None or record.get("messages") is not None
    )


def usable_record(record: Any, num_images: int, caption: str | None = None) -> dict[str, Any]:
    """A record with `conversations`, checked to name no media except the images of its sample.

    Args:
        record: the data of KEY.json.
        num_images: the images of the sample.
        caption: the text of KEY.txt, if there is one.

    Raises:
        SampleError: no-conversation, two-conversations, bad-turn, tool-turn, image-url, unread-media,
            missing-image, image-count.
    """
    if not isinstance(record, dict):
        raise SampleError(
            "no-conversation",
            f"the JSON is a {type(record).__name__}; a record with conversations is expected",
        )
    check_named_media(record, num_images)
    _refuse_tools(record)
    turns, messages = record.get("conversations"), record.get("messages")
    if turns is not None and messages is not None:
        raise SampleError("two-conversations", "the record has conversations and messages; keep one of them")
    if turns is None and messages is None:
        turns = _captioned(record, num_images, caption)
    else:
        turns = messages if turns is None else turns
        if isinstance(turns, list):
            turns = [_llava_turn(turn) for turn in turns]
    return {**{name: value for name, value in record.items() if name != "messages"}, "conversations": turns}


def caption_record(caption: str, num_images: int) -> dict[str, Any]:
    """The record of a caption: a human turn with the images, and a gpt turn with the caption."""
    return {"conversations": _caption_turns(caption, num_images)}


def check_kind(record: dict[str, Any]) -> None:
    """Refuse a `kind` that cannot name a group of samples in a log. Raises `SampleError` bad-kind."""
    kind = record.get("kind", "")
    if (
        not isinstance(kind, (str, int, float, type(None)))
        or len(str(kind)) > _MAX_KIND
        or not str(kind).isprintable()
    ):
        raise SampleError(
            "bad-kind", f"kind {short(kind)} must be a word or a number of at most {_MAX_KIND} characters"
        )


def image_names(record: dict[str, Any]) -> list[Any]:
    """The names of the images of a record in order: its `image` or `images`, or the image parts of its turns.

    Raises:
        SampleError: image-count; the record has both fields, and they differ.
    """
    image, images = (_as_list(record.get(name)) for name in ("image", "images"))
    if image and images and image != images:
        raise SampleError(
            "image-count", f"image {short(image)} and images {short(images)} differ; keep one of them"
        )
    if image or images:
        return image or images
    turns = record.get("messages") if record.get("conversations") is None else record.get("conversations")
    parts = (
        [part for turn in turns if isinstance(turn, dict) for part in _as_list(turn.get("content"))]
        if isinstance(turns, list)
        else []
    )
    return [_part_name(part) for part in parts if isinstance(part, dict) and part.get("type") in _PARTS_IMAGE]


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _part_name(part: dict[str, Any]) -> Any:
    named = next((part[name] for name in _IMAGE_NAMES if part.get(name) is not None), None)
    return named.get("url", named.get("path")) if isinstance(named, dict) else named


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the field {short(name)} appears twice")
    return found


def _refuse_tools(fields: dict[str, Any]) -> None:
    for name in _TOOL_FIELDS:
        if fields.get(name):
            raise SampleError(
                "tool-turn", f"{name} is {short(fields[name])}; conversations with tools are not read"
            )


def _captioned(record: dict[str, Any], num_images: int, caption: str | None) -> list[dict[str, str]]:
    if caption is None and num_images:
        caption = record.get("caption")
    if not isinstance(caption, str):
        raise SampleError(
            "no-conversation", "no conversations, no messages, no KEY.txt, no caption of an image"
        )
    if not num_images and record.get("url"):
        raise SampleError(
            "missing-image", f"a caption of {short(record['url'])}, and the sample has no image"
        )
    return _caption_turns(caption, num_images)


def _caption_turns(caption: str, num_images: int) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": "\n".join([IMAGE_TOKEN] * num_images)},
        {"from": "gpt", "value": caption},
    ]


def _llava_turn(turn: Any) -> Any:
    """A turn with role and content as one with from and value; `conversation.parse_turns` checks it."""
    if not isinstance(turn, dict):
        return turn
    _refuse_tools(turn)
    if "role" not in turn and "content" not in turn:
        return turn
    if "from" in turn or "value" in turn:
        raise SampleError(
            "bad-turn", f"{short(turn)} has both role and from, or both content and value; keep one of each"
        )
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(_part_text(part, turn.get("role")) for part in content)
    return {"from": turn.get("role"), "value": content}


def _part_text(part: Any, role: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    is_text, is_image = (isinstance(kind, str) and kind in kinds for kinds in (_PARTS_TEXT, _PARTS_IMAGE))
    if is_text or is_image:
        check_named_media(
            {name: value for name, value in part.items() if name not in _PART_FIELDS[is_image]}, int(is_image)
        )
    if is_text and isinstance(part.get("text"), str):
        return part["text"]
    if is_image:
        if role != "user":
            raise SampleError(
                "bad-turn", f"an image in a turn of {short(role)}; only a user's images are shown"
            )
        name = _part_name(part)
        if isinstance(name, str) and name[:5].lower() == "data:":
            raise SampleError(
                "image-url", "an image lies inside the JSON (data: URL); store it as KEY.jpg beside it"
            )
        return IMAGE_TOKEN
    if isinstance(kind, str) and any(word in kind.lower() for word in _UNREAD_PARTS):
        raise SampleError("unread-media", f"a part of type {short(kind)} would not be shown to the model")
    if isinstance(kind, str) and ("tool" in kind.lower() or "function" in kind.lower()):
        raise SampleError("tool-turn", f"a part of type {short(kind)}; conversations with tools are not read")
    raise SampleError(
        "bad-turn", f"{short(part)} is not a part of a message that is read: text, image or image_url"
    )
