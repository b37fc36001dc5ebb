"""Finds the media that a record names. A sample that names media that the model would not see is not used.

A record consists of turns and metadata of any form. A field names a medium by its own name (`video`,
`audioPath`) or by a value that ends like the name of such a file. An empty value names nothing.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from typing import Any

from megatron_evomoe.data.errors import SampleError

IMAGE_TOKEN = "<image>"
"""The place of an image in a human turn."""
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")
_OTHER_FIELD = re.compile(
    r"(?:^|_)(?:videos?|audios?|speech|sounds?|waveforms?|frames|films?|movies?|point_?clouds?|meshes)(?:$|_)"
)
_OTHER_FILE = re.compile(
    r"\.(?:mp4|m4v|avi|mov|mkv|webm|flv|wmv|mpe?g|3gp|ogv|gifv|mp3|wav|flac|ogg|oga|opus|m4a|aac|wma|aiff?|midi?|npy|npz|pth?|safetensors|"
    r"h5|hdf5|mat|ply|pcd|obj|stl|glb|gltf|dcm|nii(?:\.gz)?|exr)(?:[?#]\S*)?$",
    re.IGNORECASE,
)
_IMAGE_FIELD = re.compile(
    r"(?:^|_)(?:images?|imgs?|pictures?|photos?|pixels?|screenshots?|thumbnails?)(?:$|_)"
)
_IMAGE_FILE = re.compile(
    r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|heif|avif|jxl|jp2|svg|ico|psd)(?:[?#]\S*)?$", re.IGNORECASE
)
_IMAGE_LIST = re.compile(r"(?:images?|imgs?|pictures?|photos?)(?:_?(?:paths?|files?|urls?|names?))?")
_TAIL = 200  # characters at the end of a value that are searched for the end of a file name
# placeholders of other projects, and ours in another spelling; a person would not write them as text
_PLACEHOLDER = re.compile(
    r"</?\|?\s*(?:start_of_|end_of_)?(?:image|img|video|audio|vision|speech|sound|frame)s?"
    r"(?:[ _-]?(?:[0-9]{1,4}|pad|start|bos|begin|end|eos|placeholder|here|token|soft_token|context))?\s*\|?>"
    r"|\[IMG(?:_BREAK|_END)?\]",
    re.IGNORECASE,
)
_TURN_TEXT = frozenset(("from", "value", "role", "content"))


def check_named_media(record: dict[str, Any], num_images: int) -> None:
    """Refuse a record that names media other than the `num_images` images of its sample.

    Raises:
        SampleError: unread-media (videos, sounds, arrays …), missing-image (it names an image and the sample
            has none), image-count (it has a list of another number of images).
    """
    for name, value in _fields(record):
        field = _CAMEL.sub("_", name).lower().strip("_")
        if value is None or value in ("", False, 0) or value == [] or value == {}:
            continue
        if _OTHER_FIELD.search(field) or _ends_like(_OTHER_FILE, value):
            raise SampleError(
                "unread-media", f"{short(name)} is {short(value)}, which would not be shown to the model"
            )
        if num_images == 0 and (_IMAGE_FIELD.search(field) or _ends_like(_IMAGE_FILE, value)):
            raise SampleError(
                "missing-image", f"{short(name)} is {short(value)}, and the sample has no image"
            )
        if (
            isinstance(value, list)
            and _IMAGE_LIST.fullmatch(field)
            and sum(one is not None for one in value) != num_images
        ):
            raise SampleError(
                "image-count", f"{short(name)} lists {len(value)} images, the sample has {num_images}"
            )


def check_placeholders(text: str, role: str) -> None:
    """Refuse a turn with a placeholder for something that the model would not see.

    Only ``<image>`` in a human turn is shown. Answers may contain anything, because the model is to write
    them.

    Raises:
        SampleError: media-placeholder.
    """
    if role == "gpt" or ("<" not in text and "[" not in text):
        return
    for found in _PLACEHOLDER.finditer(text):
        if found[0] != IMAGE_TOKEN or role != "human":
            raise SampleError(
                "media-placeholder",
                f"a {role} turn holds {found[0]!r}; only {IMAGE_TOKEN} in a human turn is shown",
            )


def _fields(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name and value of the fields at any depth, except the texts of turns; items of a list have no name."""
    pending: list[tuple[str, Any]] = []
    for name, value in record.items():
        if name in ("conversations", "messages") and isinstance(value, list):
            turns = [turn for turn in value if isinstance(turn, dict)]
            pending += [item for turn in turns for item in turn.items() if item[0] not in _TURN_TEXT]
        else:
            pending.append((name, value))
    while pending:
        name, value = pending.pop()
        yield name, value
        if isinstance(value, dict):
            pending.extend(value.items())
        elif isinstance(value, list):
            pending.extend(("", one) for one in value)


def _ends_like(pattern: re.Pattern, value: Any) -> bool:
    return isinstance(value, str) and pattern.search(value[-_TAIL:]) is not None


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlevel = 3


def short(value: Any) -> str:
    """A value for a message, in at most 80 characters."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
