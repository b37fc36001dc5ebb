"""Reads the names, kinds and places of the members of an uncompressed tar.

The standard library's `tarfile` is not enough here: it stops at the first end-of-archive marker (so `cat
a.tar b.tar` loses b), takes a damaged header for the end, reads headers of any size into memory, and can loop
endlessly on a negative size. This reader also tells where the headers of each member begin, so that a single
member can be checked before its bytes are used. It reads v7, ustar, GNU and pax archives; the tests compare
it with `tarfile`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

BLOCK = 512
MAX_LEAD = 255
"""The most blocks of headers before the bytes of a member; long names and pax records need more than one."""
_ZEROS = bytes(BLOCK)
# blocks: the two of the end marker, and twice the 20 to a multiple of which tar, tarfile and webdataset pad
_MOST_PADDING = 42
_EXTENDED, _LONG_NAME, _LONG_LINK, _GLOBAL, _GNU_SPARSE = (b"x", b"X"), b"L", b"K", b"g", b"S"
_KINDS: dict[bytes, Literal["file", "directory", "sparse", "other"]] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"5": "directory",
    _GNU_SPARSE: "sparse",
}
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_OCTAL, _RECORD = re.compile(rb"[0-7]*"), re.compile(rb"([0-9]{1,9}) ([^=\n]+)=")


class TarError(ValueError):
    """A damaged header, after which no member can be found; the message says where and why."""


class Member(NamedTuple):
    """One member of an archive.

    Attributes:
        start: the byte at which its first header begins.
        offset: the byte at which its stored bytes begin.
        size: the number of its stored bytes.
    """

    name: bytes
    kind: Literal["file", "directory", "sparse", "other"]
    """`sparse` files are stored without their holes; `other` are links, devices and other non-files."""
    start: int
    offset: int
    size: int


class _Gap(NamedTuple):
    """A block of zeros."""

    start: int


Read = Callable[[int, int], bytes]
"""(offset, size) to the bytes there; fewer at the end of the file."""


def members(read: Read, size: int) -> Iterator[Member | str]:
    """All members of an archive of `size` bytes, or of several that were joined with ``cat``.

    A string in place of a member tells what is odd: ``concatenated`` if an archive continues after blocks of
        zeros,
    ``truncated`` if it ends without such blocks or inside a header. The last member may end beyond `size`.

    Raises:
        TarError: a header is damaged; nothing after it can be read.
    """
    at, zeros, count = 0, 0, 0
    while at < size:
        found = next_member(read, at)
        if found is None:
            yield f"truncated: the file ends within a header or its padding, after {count} members"
            return
        if isinstance(found, _Gap):
            at, zeros = at + BLOCK, zeros + 1
            continue
        if zeros:
            yield f"concatenated: continues at byte {found.start}, after blocks of zeros"
        yield found
        at, zeros, count = found.offset + _padded(found.size), 0, count + 1
    if not zeros:
        yield f"truncated: no end-of-archive marker after {count} members"
    elif zeros > _MOST_PADDING:
        yield (
            f"truncated: the last {zeros * BLOCK} bytes are zeros, more than an archive is padded with, "
            f"after {count} members"
        )


def next_member(read: Read, start: int) -> Member | _Gap | None:
    """The member whose headers begin at byte `start`, or a gap (a block of zeros); None at the end.

    Raises:
        TarError: a header is damaged.
    """
    at, name, stored, is_sparse, seen = start, None, None, False, set()
    while True:
        block = read(at, BLOCK)
        if len(block) < BLOCK:
            return None
        if block == _ZEROS:
            if at > start:
                raise TarError(f"the header at byte {start} describes no member")
            return _Gap(start)
        kind, size = _header(block, at)
        at += BLOCK
        if kind not in (*_EXTENDED, _LONG_NAME, _LONG_LINK, _GLOBAL):
            break
        if kind in seen:
            raise TarError(f"the header at byte {start} appears twice for one member")
        seen.add(kind)
        if at - start + _padded(size) > MAX_LEAD * BLOCK:
            raise TarError(f"the header at byte {start} is longer than {MAX_LEAD * BLOCK} bytes")
        # a long name ends at a NUL, whatever its size says
        body = read(at, _padded(size) if kind == _LONG_NAME else size)
        if len(body) < size:
            return None
        if kind == _LONG_NAME:
            name = _until_nul(body) if name is None else name
        elif kind != _LONG_LINK:
            named, sized, sparse = _pax(body, start, is_global=kind == _GLOBAL)
            name, stored, is_sparse = (
                named if name is None else name,
                sized if stored is None else stored,
                is_sparse or sparse,
            )
        at += _padded(size)
    if kind == _GNU_SPARSE and (at := _behind_sparse_map(read, block, start, at)) < 0:
        return None
    return _member(block, kind, name, start, at, size if stored is None else stored, is_sparse)


def _member(
    block: bytes, kind: bytes, name: bytes | None, start: int, at: int, size: int, is_sparse: bool
) -> Member:
    name = _name(block) if name is None else name
    what = "sparse" if is_sparse else _KINDS.get(kind, "other")
    if kind == b"\0" and name.endswith(b"/"):  # v7 marks a directory only by its name
        what = "directory"
    return Member(name, what, start, at, 0 if kind in _WITHOUT_DATA or what == "directory" else size)


def _header(block: bytes, at: int) -> tuple[bytes, int]:
    """The type and the size of a header block. Raises `TarError` if its checksum is wrong."""
    stored, rest = _number(block[148:156], at), block[:148] + b" " * 8 + block[156:]
    if stored != sum(rest) and stored != _sum_of_signed(rest):
        raise TarError(f"the header at byte {at} is damaged: its checksum is wrong")
    size = _number(block[124:136], at)
    if size < 0:
        raise TarError(f"the header at byte {at} gives a size of {size} bytes")
    return block[156:157], size


def _sum_of_signed(block: bytes) -> int:
    """The sum of bytes as numbers from −128 to 127, which some old archives hold."""
    return sum(block) - 256 * sum(byte > 127 for byte in block)


def _number(field: bytes, at: int) -> int:
    """The number in a field: octal digits, or GNU's base 256."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = _until_nul(field).strip()
    if not _OCTAL.fullmatch(digits):
        raise TarError(f"the header at byte {at} holds {field!r} where a number is expected")
    return int(digits or b"0", 8)


def _name(block: bytes) -> bytes:
    name, prefix = _until_nul(block[:100]), _until_nul(block[345:500])
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _pax(body: bytes, at: int, *, is_global: bool) -> tuple[bytes | None, int | None, bool]:
    """The name, the stored size and the sparseness that ``LENGTH KEY=VALUE`` records give."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(body) and body[position]:
        found = _RECORD.match(body, position)
        end = position + int(found[1]) if found else 0
        if found is None or end > len(body) or end <= found.end() or body[end - 1 : end] != b"\n":
            raise TarError(f"the pax header at byte {at} is damaged")
        records[found[2]] = body[found.end() : end - 1]
        position = end
    is_sparse = any(key.startswith(b"GNU.sparse.") for key in records)
    if is_global and (is_sparse or b"path" in records or b"size" in records):
        raise TarError(f"the pax header at byte {at} gives all members one name or size")
    size = records.get(b"size")
    if size is not None and not re.fullmatch(rb"[0-9]{1,20}", size):
        raise TarError(f"the pax header at byte {at} gives a size of {size[:40]!r}")
    name = records.get(b"GNU.sparse.name", records.get(b"path"))
    return name, None if size is None else int(size), is_sparse


def _behind_sparse_map(read: Read, block: bytes, start: int, at: int) -> int:
    """The byte at which a member of GNU's old sparse kind begins; -1 if the file ends before."""
    more = block[482]
    while more:
        if at - start >= MAX_LEAD * BLOCK:
            raise TarError(f"the header at byte {start} is longer than {MAX_LEAD * BLOCK} bytes")
        block = read(at, BLOCK)
        if len(block) < BLOCK:
            return -1
        more, at = block[504], at + BLOCK
    return at


def _until_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
