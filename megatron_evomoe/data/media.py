"""What a record names besides text: a sample that names more than the model would be shown is not used, nor
trained as text.

A record is metadata of any shape around some turns. A field counts as naming a medium by its own name
(`video`, `audioPath`) or by a value that ends like the name of such a file; empty values name nothing.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from typing import Any

from megatron_evomoe.data.errors import SampleError

IMAGE_TOKEN = "<image>"
"""Where an image goes in a human turn."""
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
_TAIL = 200  # characters of a value in which the end of a file's name is looked for
# other projects' placeholders, and ours in another spelling: no text that a person wrote to be read
_PLACEHOLDER = re.compile(
    r"</?\|?\s*(?:start_of_|end_of_)?(?:image|img|video|audio|vision|speech|sound|frame)s?"
    r"(?:[ _-]?(?:[0-9]{1,4}|pad|start|bos|begin|end|eos|placeholder|here|token|soft_token|context))?\s*\|?>"
    r"|\[IMG(?:_BREAK|_END)?\]",
    re.IGNORECASE,
)
_TURN_TEXT = frozenset(("from", "value", "role", "content"))


def check_named_media(record: dict[str, Any], num_images: int) -> None:
    """Refuse a record that names a medium which is not among its sample's `num_images` images.

    Raises:
        SampleError: unread-media (films, sounds, arrays …), missing-image (images, and the sample has none),
            image-count (a list of another length than the sample's).
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
    """Refuse a turn that holds a place for what is not shown: anything but ``<image>`` in a human turn.

    Answers are what the model shall say, whatever that is. Raises `SampleError` media-placeholder.
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
    """(name, value) of all fields at any depth but the turns' texts; what lies in a list has no name of its
    own.
    """
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
    """A value of any size and depth, for a message."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
