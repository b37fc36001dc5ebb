"""Intact and damaged pictures of every format and mode are decoded correctly, or their sample is counted."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps

from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.image import decode_image

MODES = {
    "PNG": ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA", "L"),
    "GIF": ("L", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
}
MAX_PIXELS = 20_000
REASONS = {"corrupt-image", "image-too-large", "image-shape"}


def picture(draw: random.Random) -> bytes:
    """A file of any format, mode, size and orientation, perhaps with transparency but no alpha channel."""
    kind = draw.choice(sorted(MODES))
    mode = draw.choice(MODES[kind])
    shape = (draw.randrange(1, 60), draw.randrange(1, 60), 4)
    noise = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(
        noise
        if draw.random() < 0.5
        else (noise[:1, :1] // 2 + np.arange(shape[1])[None, :, None] % 99)
        .astype(np.uint8)
        .repeat(shape[0], 0)
    )
    save: dict = {}
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    elif mode == "P":
        image = image.convert("RGB").quantize(draw.randrange(2, 257))
    elif mode != "RGBA":
        image = (image if mode == "LA" else image.convert("RGB")).convert(mode)
    if kind in ("PNG", "GIF") and draw.random() < 0.4:
        save["transparency"] = {
            "P": draw.choice([0, 1, bytes(range(100))] if kind == "PNG" else [0, 1]),
            "L": draw.randrange(256),
            "RGB": image.getpixel((0, 0)) if kind == "PNG" else None,
            "I;16": draw.randrange(65536),
        }.get(mode)
    if kind in ("PNG", "JPEG", "WEBP") and draw.random() < 0.4:
        save["exif"] = Image.Exif()
        save["exif"][0x0112] = draw.randrange(1, 9)
    if kind == "JPEG":
        save |= {"quality": draw.randrange(30, 100), "progressive": draw.random() < 0.5}
    out = io.BytesIO()
    image.save(out, kind, **{key: value for key, value in save.items() if value is not None})
    return out.getvalue()


def meaning(data: bytes) -> np.ndarray | None:
    """The pixels according to Pillow and explicit arithmetic; None where Pillow cannot read the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            transparency = image.info.get("transparency")
            if image.mode.startswith("I"):
                wide = np.asarray(image).astype(int)
                grey = (
                    np.where(wide == transparency, 255, wide // 256)
                    if transparency is not None
                    else wide // 256
                )
                return np.stack([grey] * 3, -1)
            if "A" not in image.getbands() and transparency is None:
                return np.asarray(image.convert("RGB")).astype(int)
            rgba = np.asarray(image.convert("RGBA")).astype(float)
        except Exception:
            return None
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Cut a file, flip bits, overwrite bytes, or state another size in its header, with a valid checksum."""
    out, kind = bytearray(data), draw.choice(["cut", "bit", "bits", "bytes", "head", "size", "tail", "chunk"])
    if kind == "cut":
        del out[draw.randrange(len(out)) :]
    elif kind in ("bit", "bits"):
        for _ in range(1 if kind == "bit" else draw.randrange(2, 30)):
            out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    elif kind == "bytes":
        at = draw.randrange(len(out))
        out[at : at + 16] = draw.randbytes(len(out[at : at + 16]))
    elif kind == "head":
        at = draw.randrange(min(len(out), 64))
        out[at : at + 4] = draw.choice([bytes(4), b"\xff" * 4, draw.randbytes(4)])
    elif kind == "tail":
        out += draw.randbytes(draw.randrange(1, 100))
    elif data[:4] == b"\x89PNG":
        _change_png(out, draw, size=kind == "size")
    elif kind == "size":
        at = {b"GI": 6, b"BM": 18, b"\xff\xd8": data.find(b"\xff\xc0") + 5, b"RI": 24}[data[:2]]
        out[at : at + 4] = struct.pack("<HH", *(draw.choice([0, 1, 2, 500, 65535]) for _ in range(2)))
    return bytes(out)


def _change_png(out: bytearray, draw: random.Random, *, size: bool) -> None:
    """Change the size in the header, or any byte of any chunk.

    The chunk's checksum is updated so that the chunk is read.
    """
    at, places = 8, []
    while at + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, at)
        places.append((at, length))
        at += 12 + length
    at, length = places[0] if size else draw.choice([place for place in places if place[1]] or places)
    if size:
        struct.pack_into(
            ">II", out, at + 8, *(draw.choice([0, 1, 3, 300, 30_000, 2**31 - 1]) for _ in range(2))
        )
    elif length:
        out[at + 8 + draw.randrange(length)] = draw.randrange(256)
    struct.pack_into(">I", out, at + 8 + length, zlib.crc32(out[at + 4 : at + 8 + length]))


def outcome(data: bytes) -> str:
    """How decoding ends; decoded pixels are compared with `meaning`."""
    try:
        pixels = decode_image(data, MAX_PIXELS)
    except SampleError as error:
        assert error.reason in REASONS and "\n" not in error.message
        return "counted"
    assert (
        pixels.dtype == np.uint8
        and pixels.ndim == 3
        and pixels.shape[2] == 3
        and pixels.size <= 3 * MAX_PIXELS
    )
    wanted = meaning(data)
    assert wanted is not None and wanted.shape == pixels.shape
    # JPEG differs a little between builds of libjpeg-turbo
    assert np.abs(pixels - wanted).max() <= (8 if data[:2] == b"\xff\xd8" else 1)
    return "right"


def test_images(tally):
    for draw in tally.draws(800):
        data = picture(draw)
        if draw.random() < 0.3:
            assert outcome(data) == "right"
            tally.add("right")
        else:
            tally.add(outcome(damaged(data, draw)))
