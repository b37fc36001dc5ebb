"""`AutoProcessor` gives training's pixels for an opened file, in both export formats.

The files have every mode of Pillow and every EXIF orientation.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_evomoe.config import from_mapping
from megatron_evomoe.data.image import decode_image, processor_for
from megatron_evomoe.data.picture import as_rgb
from megatron_evomoe.data.tokenizer import train_sentencepiece
from megatron_evomoe.hf import register
from megatron_evomoe.hf.to_hf.exporting import Request, export_model
from tests.parity.export_models import VISION_SIZES, saved_model

transformers = pytest.importorskip(
    "transformers", minversion="4.56", reason="transformers 4.56 or later is not installed"
)
pytestmark = pytest.mark.usefixtures("one_rank")
SIDE = VISION_SIZES["image_size"]
WHITE_ITSELF = int(transformers.__version__.split(".")[0]) >= 5
GREY16 = np.random.default_rng(1).integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
RGBA = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8))


def _indexed(transparency: bytes | int) -> bytes:
    """A PNG with a palette; `transparency` is one byte per palette entry, or the index of one entry."""
    return _file(RGBA.convert("RGB").quantize(16), "PNG", transparency=transparency)


def _file(image: Image.Image, kind: str, **save: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **save)
    return out.getvalue()


FILES = {
    "1": lambda: _file(RGBA.convert("1"), "PNG"),
    "L": lambda: _file(RGBA.convert("L"), "PNG"),
    "L-bmp": lambda: _file(RGBA.convert("L"), "BMP"),
    "1-tRNS": lambda: _file(RGBA.convert("1"), "PNG", transparency=0),
    "L-tRNS": lambda: _file(RGBA.convert("L"), "PNG", transparency=int(np.asarray(RGBA.convert("L"))[3, 4])),
    "LA": lambda: _file(RGBA.convert("LA"), "PNG"),
    "RGB": lambda: _file(RGBA.convert("RGB"), "PNG"),
    "RGB-tRNS": lambda: _file(
        RGBA.convert("RGB"), "PNG", transparency=tuple(np.asarray(RGBA)[5, 6, :3].tolist())
    ),
    "RGBA": lambda: _file(RGBA, "PNG"),
    "RGBA-webp": lambda: _file(RGBA, "WEBP", lossless=True, exact=True),
    "RGBA-bmp": lambda: _file(RGBA, "BMP"),
    "P": lambda: _file(RGBA.convert("RGB").quantize(16), "PNG"),
    "P-bytes": lambda: _indexed(bytes(range(0, 256, 16))),
    "P-index": lambda: _indexed(3),
    "P-gif": lambda: _file(RGBA.convert("RGB").quantize(16), "GIF", transparency=3),
    "RGBA-gif": lambda: _file(RGBA, "GIF"),
    "CMYK": lambda: _file(RGBA.convert("RGB").convert("CMYK"), "JPEG", quality=95),
    "L-jpeg": lambda: _file(RGBA.convert("L"), "JPEG"),
    "RGB-jpeg": lambda: _file(RGBA.convert("RGB"), "JPEG"),
    "I;16": lambda: _file(Image.fromarray(GREY16), "PNG"),
    "I;16-tRNS": lambda: _file(Image.fromarray(GREY16), "PNG", transparency=int(GREY16[0, 0])),
}
TRANSPARENT = {
    "1-tRNS",
    "L-tRNS",
    "LA",
    "RGB-tRNS",
    "RGBA",
    "RGBA-webp",
    "P-bytes",
    "P-index",
    "P-gif",
    "RGBA-gif",
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A function from format and ratio to an export's processor and folder and training's processor."""
    found, folder = {}, tmp_path_factory.mktemp("pictures")
    tokenizer = train_sentencepiece(
        ["USER: <image>\nWhich digit is this? ASSISTANT: It is seven."] * 20, folder / "t.model", 300
    )

    def build(form: str, ratio: str):
        if (form, ratio) not in found:
            saved = saved_model(
                folder / f"run-{form}-{ratio}",
                tokenizer,
                "route" if form == "evomoe" else "warmup",
                data={"image_aspect_ratio": ratio},
            )
            out = export_model(
                Request(checkpoint=str(saved.folder), output=str(folder / f"{form}-{ratio}"))
            ).output
            register()
            config = from_mapping({"vision": VISION_SIZES, "data": {"image_aspect_ratio": ratio}})
            found[form, ratio] = (transformers.AutoProcessor.from_pretrained(out), out, processor_for(config))
        return found[form, ratio]

    return build


def pixels(processor, picture) -> torch.Tensor:
    """The pixels that the model would get, [3, S, S]."""
    return processor(text="<image>\nWhich?", images=picture, return_tensors="pt")["pixel_values"][0]


def trained_on(processor, data: bytes) -> torch.Tensor:
    return processor.normalize(processor(decode_image(data))[None])[0]


@pytest.mark.parametrize("ratio", ["pad", "square"])
@pytest.mark.parametrize("name", FILES)
def test_opened_files_give_trainings_pixels(exports, name, ratio, tmp_path):
    data = FILES[name]()
    for form in ("evomoe", "llava"):
        processor, _, ours = exports(form, ratio)
        opened = Image.open(io.BytesIO(data))
        assert opened.mode == name.split("-")[0] or name == "RGBA-gif" or name == "RGBA-bmp"
        if form == "llava" and (opened.mode == "I;16" or (name in TRANSPARENT and not WHITE_ITSELF)):
            opened = as_rgb(opened)  # the model card tells users to do this
        # the picture has the model's own size, so nothing is resized
        assert (pixels(processor, opened) - trained_on(ours, data)).abs().max() < 1e-5, form
    path = tmp_path / "picture"
    path.write_bytes(data)
    processor, _, ours = exports("evomoe", ratio)
    assert torch.equal(pixels(processor, str(path)), pixels(processor, Image.open(path)))


@pytest.mark.parametrize("name", sorted(TRANSPARENT | {"I;16-tRNS"}))
def test_transparency_is_white(name):
    opened = Image.open(io.BytesIO(FILES[name]()))
    clear = (
        GREY16[0, 0] == GREY16 if opened.mode == "I;16" else np.asarray(opened.convert("RGBA"))[..., 3] == 0
    )
    got = decode_image(FILES[name]())
    assert clear.any() and (got[clear] == 255).all()
    # in "1-tRNS" the other pixels may all be white: black is the transparent colour
    assert name == "1-tRNS" or not (got[~clear] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_by_the_processor(exports, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _file(RGBA.convert("RGB").crop((0, 0, SIDE, SIDE // 2)), kind, exif=exif)
    for form in ("evomoe", "llava"):
        processor, _, ours = exports(form, "pad")
        opened = Image.open(io.BytesIO(data))
        opened = as_rgb(opened) if form == "llava" else opened
        difference = (
            (pixels(processor, opened) - trained_on(ours, data)).abs()
            * torch.tensor(ours.std).view(3, 1, 1)
            * 255
        )
        assert difference.mean() < 0.1 and difference.max() <= 3, form


@pytest.mark.parametrize("mode", sorted(Image.MODES))
def test_every_mode_in_memory(exports, mode):
    """Every mode is converted, even modes that no file opened by training has.

    `as_rgb` handles those that LLaVA's own processor does not.
    """
    if mode.startswith("I;16"):
        picture = Image.frombytes(
            mode, (SIDE, SIDE), GREY16.astype(">u2" if mode.endswith("B") else "<u2").tobytes()
        )
    elif mode in ("I", "F"):
        picture = Image.fromarray(GREY16.astype(np.int32 if mode == "I" else np.float32))
    else:
        start = RGBA if mode in ("RGBA", "RGBa", "LA", "La", "PA") else RGBA.convert("RGB")
        picture = (RGBA.convert("LA") if mode == "La" else start).convert(mode)
    ours = exports("evomoe", "pad")[2]
    wanted = ours.normalize(ours(np.asarray(as_rgb(picture)))[None])[0]
    assert (pixels(exports("evomoe", "pad")[0], picture) - wanted).abs().max() < 1e-5
    if WHITE_ITSELF and mode not in ("I", "I;16", "I;16B", "I;16L", "I;16N", "La", "RGBa"):
        assert (pixels(exports("llava", "pad")[0], picture) - wanted).abs().max() < 1e-5
    if mode in ("La", "RGBa"):
        straight = RGBA.convert("LA" if mode == "La" else "RGBA")
        assert (
            np.abs(np.asarray(as_rgb(picture)).astype(int) - np.asarray(as_rgb(straight)).astype(int)).max()
            <= 1
        )
    if mode.startswith("I"):
        assert np.array_equal(np.asarray(as_rgb(picture))[..., 0], GREY16 >> 8)


def test_the_cards_function_is_the_rule(exports):
    for form in ("llava", "evomoe"):
        card = (exports(form, "pad")[1] / "README.md").read_text()
        blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        functions = [block for block in blocks if "def as_rgb" in block]
        assert len(functions) == (form == "llava")
        assert all(
            ("as_rgb(Image.open(" in block) == (form == "llava")
            for block in blocks
            if "from_pretrained" in block
        )
        for block in functions:
            scope: dict = {}
            exec(block, scope)
            for make in FILES.values():
                assert np.array_equal(
                    np.asarray(scope["as_rgb"](Image.open(io.BytesIO(make())))), decode_image(make())
                )


def test_addresses_are_refused(exports):
    with pytest.raises(ValueError, match="is a URL; download the picture"):
        exports("evomoe", "pad")[0].image_processor("https://example.org/picture.png")
    with pytest.raises(ValueError, match="neither a file nor a picture"):
        exports("evomoe", "pad")[0].image_processor("no/such/file.png")


def test_an_export_carries_the_rule(exports):
    out: Path = exports("evomoe", "pad")[1]
    assert "def as_rgb" in (out / "picture_evomoe.py").read_text()
    assert not list(exports("llava", "pad")[1].glob("*.py"))
