"""Tars of every dialect, concatenated, sparse or damaged.

They are read as `tarfile` reads them, or reported for what they are.
"""

from __future__ import annotations

import io
import json
import random
import tarfile

from megatron_evomoe.config import ConfigError
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.data.shards import ShardDataset
from megatron_evomoe.data.tar import BLOCK, Member, TarError, members

from .samples import picture, rows, tokenizer

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
TYPES = (
    tarfile.REGTYPE,
    tarfile.REGTYPE,
    tarfile.REGTYPE,
    tarfile.AREGTYPE,
    tarfile.CONTTYPE,
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
)


def info(name: str, size: int, rng: random.Random, form: int) -> tarfile.TarInfo:
    """A header with numbers as large as the dialect allows."""
    found = tarfile.TarInfo(name)
    found.size = size
    found.mtime = rng.choice([0, 1, 2**33 - 1])
    if form != tarfile.USTAR_FORMAT:
        found.uid, found.mtime = (
            rng.choice([0, 2**40]),
            rng.choice([0, -5, 2**40, 1.5 if form == tarfile.PAX_FORMAT else 7]),
        )
    if form == tarfile.PAX_FORMAT and rng.random() < 0.3:
        found.pax_headers = rng.choice(
            [{"comment": "x" * rng.randrange(3000)}, {"size": str(size)}, {"SCHILY.xattr.user.a": "ä"}]
        )
    return found


def sealed(header: bytes) -> bytes:
    """A header block with its checksum updated."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def sparse(name: str, data: bytes, rng: random.Random) -> bytes:
    """A member stored without its holes, in GNU's old format with up to 40 pieces or in a pax format."""
    stored = data + bytes(-len(data) % BLOCK)
    if rng.random() < 0.5:
        fields = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": name,
            "GNU.sparse.realsize": "5000",
        }
        head = tarfile.TarInfo("GNUSparseFile.0/x")
        head.pax_headers, body = fields, b"1\n0\n%d\n" % len(data)
        body += bytes(-len(body) % BLOCK) + stored
        head.size = len(body)
        return head.tobuf(tarfile.PAX_FORMAT) + body
    pieces = rng.choice([1, 4, 5, 26, 40])
    entries = [b"%011o\0%011o\0" % (4096 * i, len(data) if i == 0 else 0) for i in range(pieces)]
    head = tarfile.TarInfo(name)
    head.size, head.type = len(stored), tarfile.GNUTYPE_SPARSE
    block = bytearray(head.tobuf(tarfile.GNU_FORMAT))
    block[386 : 386 + 24 * len(entries[:4])] = b"".join(entries[:4])
    block[482], block[483:495] = pieces > 4, b"%011o\0" % (4096 * pieces)
    more, rest = [], entries[4:]
    while rest:
        more.append(b"".join(rest[:21]).ljust(504, b"\0") + bytes([len(rest) > 21]).ljust(8, b"\0"))
        rest = rest[21:]
    return sealed(bytes(block)) + b"".join(more) + stored


def any_archive(rng: random.Random) -> bytes:
    """An archive in one dialect, with members of all types and names."""
    form, out = rng.choice(FORMATS), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for i in range(rng.randrange(1, 6)):
            longest = (
                5
                if i == 0
                else rng.choice([5, 90, 99, 100, 101, 200 if form == tarfile.USTAR_FORMAT else 400])
            )
            name = "/".join([f"{i}" + "d" * 48] * (longest // 50)) + f"/{rng.choice('aä')}{i}.json"
            kind = rng.choice(TYPES)
            # tarfile takes such a member for a folder when its name is cut at a slash
            if kind == tarfile.AREGTYPE and longest > 90:
                kind = tarfile.REGTYPE
            data = (
                rng.randbytes(rng.choice([0, 1, 511, 512, 513, 2000]))
                if kind in tarfile.REGULAR_TYPES
                else b""
            )
            member = info(name, len(data), rng, form)
            member.type = kind
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                member.linkname = "x" * rng.choice([1, 99, 99 if form == tarfile.USTAR_FORMAT else 120])
            try:
                archive.addfile(member, io.BytesIO(data))
            except ValueError:  # the name is too long for ustar
                continue
            if rng.random() < 0.1:
                out.write(sparse(f"s{i}.jpg", b"x" * 700, rng))
                archive.offset = out.tell()
    return out.getvalue()


def theirs(data: bytes) -> tuple[list[tuple], bool]:
    """The members that tarfile finds, and whether it stops with an error before the end."""
    found: list[tuple] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as archive:
            while (member := archive.next()) is not None and len(found) < 100:
                kind = (
                    "sparse"
                    if member.issparse()
                    else "file"
                    if member.isreg()
                    else "directory"
                    if member.isdir()
                    else "other"
                )
                place = (
                    None if kind == "sparse" else (member.offset_data, member.size if kind == "file" else 0)
                )
                found.append((member.name.rstrip("/").encode(errors="surrogateescape"), kind, place))
    except (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError, EOFError, OSError):
        return found, True
    return found, False


def ours(data: bytes) -> tuple[list[tuple], bool]:
    """The members that the package finds, and whether it finds a problem other than concatenated archives."""
    found, odd = [], False
    try:
        for one in members(lambda at, size: data[at : at + size], len(data)):
            if isinstance(one, Member):
                place = None if one.kind == "sparse" else (one.offset, one.size if one.kind == "file" else 0)
                found.append((one.name.rstrip(b"/"), one.kind, place))
            else:
                odd = odd or not one.startswith("concatenated")
    except TarError:
        odd = True
    return found, odd


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change one field of one header, with a checksum that mostly matches, or cut the end off."""
    starts = [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(starts)
    block = bytearray(data[at : at + BLOCK])
    field = rng.choice(
        [
            (0, 100),
            (124, 136),
            (124, 136),
            (156, 157),
            (157, 257),
            # GNU's format uses the bytes of the name's prefix for other fields
            (345, 500) if block[257:263] == b"ustar\0" else (0, 100),
        ]
    )
    length = field[1] - field[0]
    content = rng.choice(
        [
            rng.randbytes(length),
            b"\xff" * length,
            b"\x80" + b"\xff" * (length - 1),
            b"\x80" + bytes(length - 1),
            b"-1",
            b"7" * length,
            b"0000000",
            b" 12 \0",
            bytes([rng.choice(b"xgLK15V7")]) * length,
        ]
    )
    block[field[0] : field[1]] = content[:length].ljust(length, b"\0")
    # what tarfile makes of an invalid sparse map depends on its version
    if block[156:157] == b"S":
        block[156:157] = b"V"
    changed = bytes(block) if rng.random() < 0.2 else sealed(bytes(block))
    out = data[:at] + changed + data[at + BLOCK :]
    return out[: rng.randrange(len(out))] if rng.random() < 0.2 else out


def test_tars_against_tarfile(tally):
    for rng in tally.draws(250):
        data = b"".join(any_archive(rng) for _ in range(rng.choice([1, 1, 2, 3])))
        assert ours(data) == theirs(data)
        tally.add("right")


def test_damaged_headers_against_tarfile(tally):
    for rng in tally.draws(500):
        data = mutated(any_archive(rng), rng)
        (found, odd), (expected, given_up) = ours(data), theirs(data)
        if odd or given_up:
            shared = min(len(found), len(expected))
            assert found[:shared] == expected[:shared]
        else:
            assert found == expected
        tally.add("named" if odd else "right")


def sample_archive(rng: random.Random, first: int, form: int) -> bytes:
    """Three samples with various names, orders and neighbouring members.

    Some samples have a member that makes them unusable.
    """
    out, parts = io.BytesIO(), []
    for i in range(first, first + 3):
        key = rng.choice([f"{i}", f"folder/{i}", "d" * 120 + f"/{i}"])
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"it is {i}"}]
        parts += [(f"{key}.json", json.dumps({"conversations": turns}).encode()), (f"{key}.jpg", picture(i))]
        if rng.random() < 0.3:
            parts.append(
                (f"{key}.{rng.choice(['cls', 'cls', 'meta.json', 'mp4', '2.npy', 'pt', 'seg.png'])}", b"x")
            )
    rng.shuffle(parts)
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in parts:
            if rng.random() < 0.1:
                archive.addfile(tarfile.TarInfo(f"{rng.randrange(9)}.dir/"))
            if name.endswith(".jpg") and rng.random() < 0.04:
                out.write(sparse(name, data, rng))
                archive.offset = out.tell()
            else:
                archive.addfile(info(name, len(data), rng, form), io.BytesIO(data))
    return out.getvalue()


def with_fault(data: bytes, rng: random.Random) -> bytes:
    """Return the data unchanged, cut, with a flipped bit in a header, or with a whole member set to zeros."""
    kind = rng.randrange(4)
    if kind == 1:
        # a cut exactly between two archives cannot be detected
        return data[: rng.randrange(BLOCK, len(data)) // BLOCK * BLOCK + 1]
    with tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as archive:
        files = [member for member in archive if member.isreg() and not member.issparse()]
    chosen = rng.choice(files)
    start, body, end = (
        chosen.offset,
        chosen.offset_data,
        chosen.offset_data + -(-chosen.size // BLOCK) * BLOCK,
    )
    if kind == 2:
        at = rng.randrange(body - BLOCK, body)
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    return data[:start] + bytes(end - start) + data[end:] if kind == 3 else data


def judge(tally, dataset: ShardDataset, expected: int) -> None:
    """Assert that each sample is the one of its key, or is counted.

    A missing sample must be covered by the problems that the shard reports.
    """
    found = rows(dataset)
    for row in found:
        if row.problem is None:
            labels = [label for label in row.sample.labels if label != IGNORE_INDEX]
            number = int(row.key.rpartition("/")[2])
            assert tokenizer().decode(labels).strip() == f"it is {number}"
            assert abs(float(row.images[0].float().mean()) - number) < 2
    if len(found) < expected:
        assert {"truncated", "bad-header", "concatenated", "no-json"} & set(dataset.problems)
    tally.add("right" if len(found) == expected and not any(row.problem for row in found) else "counted")


def test_shards(tally, tmp_path):
    path = tmp_path / "a.tar"
    for rng in tally.draws(150):
        archives = rng.choice([1, 2, 3])
        data = b"".join(sample_archive(rng, 3 * n, rng.choice(FORMATS)) for n in range(archives))
        path.write_bytes(with_fault(data, rng))
        try:
            dataset = ShardDataset(path)
        except ConfigError as error:
            assert str(path) in str(error)
            tally.add("named")
            continue
        judge(tally, dataset, 3 * archives)
