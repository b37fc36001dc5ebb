"""Which members of a shard make up a sample: KEY.json or KEY.txt, and the KEY.jpg … beside it.

A sample that has a member which is neither read nor known to be text about the sample is not used at all,
because the rest of it may mean something else, such as a question about a video without the video.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_evomoe.data.tar import Member, Read, TarError, members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
PICKLE_EXTENSIONS = ("pkl", "pickle", "pyd", "pth", "pt")
DEFECTS = ("", "unread-member", "pickle-member", "not-a-file", "sparse-member")
"""Why the members of a sample make it unusable; an index holds positions of this tuple."""
MAX_KEY = 512
"""The longest name of a member, in bytes."""
# text about a sample, as img2dataset, the examples of webdataset and others store it; it is ignored
_ABOUT = frozenset(
    [
        "json",
        "jsonl",
        "txt",
        "text",
        "caption",
        "cls",
        "cls2",
        "label",
        "labels",
        "tag",
        "tags",
        "id",
        "idx",
        "index",
        "key",
        "name",
        "title",
        "url",
        "source",
        "origin",
        "author",
        "license",
        "lang",
        "language",
        "date",
        "time",
        "width",
        "height",
        "size",
        "score",
        "similarity",
        "md5",
        "sha1",
        "sha256",
        "hash",
        "meta",
        "metadata",
        "info",
        "log",
        "csv",
        "tsv",
        "xml",
        "html",
        "md",
        "yaml",
        "yml",
    ]
)
_NUMBERED = re.compile(r"(?:([0-9]{1,9})\.)?([a-z]+)")


@dataclass
class Found:
    """One sample of a shard.

    Attributes:
        members: its members by extension.
        defect: why it is unusable, as a position in `DEFECTS`; 0 if it is usable.
    """

    key: bytes
    members: dict[str, Member] = field(default_factory=dict)
    defect: int = 0

    @property
    def text(self) -> Member:
        """The KEY.json, or the KEY.txt of a sample without KEY.json."""
        return self.members["json"] if "json" in self.members else self.members["txt"]

    @property
    def images(self) -> list[Member]:
        """The images, in numeric order."""
        return [self.members[e] for e in sorted(filter(is_image, self.members), key=image_order)]

    @property
    def caption(self) -> Member | None:
        """The KEY.txt beside a KEY.json; None if there is none."""
        return self.members.get("txt") if "json" in self.members else None

    def used(self) -> list[Member]:
        """The members that are read."""
        return [self.text, *self.images, *([self.caption] if self.caption else [])]


def split_name(name: bytes) -> tuple[bytes, str]:
    """The key, up to the first dot of the base name as in webdataset, and the extension in lower case."""
    folder, _, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    return (folder + b"/" + stem if folder else stem), extension.decode("ascii", "backslashreplace").lower()


def is_image(extension: str) -> bool:
    """Whether an extension is that of an image: ``jpg``, or ``3.jpg``; ``seg.png`` is not."""
    found = _NUMBERED.fullmatch(extension)
    return found is not None and found[2] in IMAGE_EXTENSIONS


def find_samples(read: Read, size: int) -> tuple[list[Found], dict[str, list[str]]]:
    """The samples of an archive of `size` bytes, and what was left out or is odd (slug to members or keys).

    The members of a sample have its key, and need not be adjacent. A key that appears again with an extension
    that its sample already has starts a new sample.
    """
    samples: list[Found] = []
    problems: dict[str, list[str]] = {}
    current: dict[bytes, int] = {}  # key -> its newest sample
    times: Counter[bytes] = Counter()
    cut: set[int] = set()
    for member in _members(read, size, problems):
        key, extension = split_name(member.name)
        defect = _defect(member, extension, problems)
        if defect is None:
            continue
        if key not in current or extension in samples[current[key]].members:
            times[key] += 1
            if times[key] > 1:
                _note(problems, "duplicate-key", key)
            current[key] = len(samples)
            samples.append(Found(key if times[key] == 1 else b"%s~%d" % (key, times[key])))
        sample = samples[current[key]]
        sample.members[extension] = member
        sample.defect = sample.defect or defect
        if member.offset + member.size > size:
            cut.add(current[key])
    for i in sorted(cut):
        _note(problems, "truncated", samples[i].key)
    return list(_with_text((s for i, s in enumerate(samples) if i not in cut), problems)), problems


def _members(read: Read, size: int, problems: dict[str, list[str]]) -> Iterator[Member]:
    try:
        for found in members(read, size):
            if isinstance(found, Member):
                yield found
            else:
                slug, _, what = found.partition(": ")
                problems.setdefault(slug, []).append(what)
    except TarError as error:
        problems.setdefault("bad-header", []).append(f"{error}; nothing after it was read")


def _defect(member: Member, extension: str, problems: dict[str, list[str]]) -> int | None:
    """What is wrong with a member, as a position in `DEFECTS`; None if it is not part of a sample."""
    base = member.name.rpartition(b"/")[2]
    if member.kind == "directory":
        return None
    if len(member.name) > MAX_KEY or b"\0" in member.name:
        _note(problems, "bad-name", member.name)
        return None
    if not extension or base.startswith(b"."):  # macOS puts ._KEY.jpg beside KEY.jpg
        _note(problems, "ignored-member", member.name)
        return None
    last = extension.rpartition(".")[2]
    if last in PICKLE_EXTENSIONS:
        slug = "pickle-member"
    elif member.kind != "file":
        slug = "sparse-member" if member.kind == "sparse" else "not-a-file"
    elif extension in ("json", "txt") or is_image(extension):
        return 0
    else:
        _note(problems, "ignored-member", member.name)
        return None if last in _ABOUT else DEFECTS.index("unread-member")
    _note(problems, slug, member.name)
    return DEFECTS.index(slug)


def _with_text(samples: Iterator[Found], problems: dict[str, list[str]]) -> Iterator[Found]:
    for sample in samples:
        if "json" in sample.members or "txt" in sample.members:
            yield sample
        else:
            _note(problems, "no-json", sample.key)


def image_order(extension: str) -> tuple[int, str]:
    """The sort key of the images of a sample."""
    number, _, _ = extension.rpartition(".")
    return (int(number) if number else -1), extension


def _note(problems: dict[str, list[str]], slug: str, name: bytes) -> None:
    problems.setdefault(slug, []).append(name[: 2 * MAX_KEY].decode(errors="backslashreplace"))
