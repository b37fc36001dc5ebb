"""Build visual question answering data from the handwritten digits that ship with scikit-learn.

    python examples/digits/build_data.py --output DIR

The 1797 scans of 8 x 8 grey levels (UCI, Alpaydin and Kaynak) become pictures of one digit or of a 2 x 2
grid, with questions of several kinds; text-only arithmetic is mixed in. The scans are split before pictures
are composed of them, so no scan in a held-out picture was seen in training. The script writes:

    DIR/captions DIR/instruct  training shards for `align` and for the other stages
    DIR/heldout                held-out shards; a sample's `kind` is for the report, the model never sees it
    DIR/tower.npz              labelled training pictures for the stand-in vision tower (pretrain_tower.py)
    DIR/tokenizer.model        sentencepiece, trained on the training texts
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from megatron_evomoe.data.shards import write_shards
from megatron_evomoe.data.tokenizer import train_sentencepiece

SIDE, CELL = 32, 16
PLACES = ("top left", "top right", "bottom left", "bottom right")
TEST_SHARE = 0.2


@dataclass
class Picture:
    """A composed image and the digits that it shows."""

    pixels: np.ndarray
    """Grey levels, uint8 [32, 32]."""
    digits: list[int]
    """One digit, or four in the order of `PLACES`."""


class Composer:
    """Source of random pictures from one split of the scans."""

    def __init__(self, scans: np.ndarray, labels: np.ndarray, seed: int) -> None:
        self.scans, self.labels, self.rng = scans, labels, np.random.default_rng(seed)
        self.by_digit = [np.flatnonzero(labels == d) for d in range(10)]

    def scan_of(self, digit: int) -> np.ndarray:
        """Random scan of `digit`, enlarged to one cell, uint8 [16, 16]."""
        scan = self.scans[self.rng.choice(self.by_digit[digit])]
        return np.asarray(Image.fromarray(scan).resize((CELL, CELL), Image.Resampling.BILINEAR))

    def single(self) -> Picture:
        """Picture of one digit, in the middle or in a corner."""
        digit = int(self.rng.integers(10))
        canvas = np.zeros((SIDE, SIDE), np.uint8)
        y, x = self.rng.choice([0, 8, 16], size=2)
        canvas[y : y + CELL, x : x + CELL] = self.scan_of(digit)
        return Picture(canvas, [digit])

    def grid(self, digits: list[int]) -> Picture:
        """Picture of four digits."""
        cells = [self.scan_of(d) for d in digits]
        return Picture(np.block([[cells[0], cells[1]], [cells[2], cells[3]]]), digits)

    def grid_with_pair(self) -> tuple[Picture, tuple[int, int]]:
        """Picture of four digits of which exactly two are equal, and the places of those two."""
        values = self.rng.choice(10, size=3, replace=False).tolist()
        first, second = sorted(self.rng.choice(4, size=2, replace=False).tolist())
        others = iter(values[1:])
        return self.grid([values[0] if i in (first, second) else next(others) for i in range(4)]), (
            first,
            second,
        )


Turn = tuple[str, str, str]
"""Kind, question and answer."""


def single_turns(picture: Picture) -> list[Turn]:
    """Questions about a picture of one digit."""
    digit = picture.digits[0]
    return [
        ("single: which", "Which digit is this?", str(digit)),
        ("single: even", "Is the digit even?", "yes" if digit % 2 == 0 else "no"),
    ]


def grid_turns(picture: Picture, pair: tuple[int, int], rng: np.random.Generator) -> list[Turn]:
    """One question of each kind about a grid; counts 0, 1 and 2 are asked for equally often."""
    place = int(rng.integers(4))
    wanted = int(rng.integers(3))
    counts = [picture.digits.count(d) for d in range(10)]
    asked = int(rng.choice([d for d in range(10) if counts[d] == wanted]))
    return [
        ("grid: where", f"Which digit is {PLACES[place]}?", str(picture.digits[place])),
        ("grid: count", f"How many times is {asked} there?", str(counts[asked])),
        ("grid: equal", "Which two are equal?", f"{PLACES[pair[0]]} and {PLACES[pair[1]]}"),
    ]


def arithmetic(rng: np.random.Generator) -> Turn:
    """Question about a sum or difference, without a picture."""
    a, b = (int(n) for n in rng.integers(0, 10, size=2))
    if rng.integers(2):
        return "text: arithmetic", f"What is {a} plus {b}?", str(a + b)
    return "text: arithmetic", f"What is {max(a, b)} minus {min(a, b)}?", str(abs(a - b))


def caption(picture: Picture) -> str:
    """Caption of a picture, for `align`."""
    if len(picture.digits) == 1:
        return f"the digit {picture.digits[0]}"
    return ", ".join(f"{place} {digit}" for place, digit in zip(PLACES, picture.digits, strict=True))


def png(picture: Picture) -> bytes:
    """Lossless RGB file of a picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture.pixels).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def conversation(turns: list[Turn], *, with_image: bool) -> list[dict[str, str]]:
    """Conversation in LLaVA's format.

    Its empty system turn keeps the tiny model's sequences short.
    """
    out = [{"from": "system", "value": ""}]
    for i, (_, question, answer) in enumerate(turns):
        text = f"<image>\n{question}" if with_image and i == 0 else question
        out += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return out


Sample = tuple[dict[str, Any], list[bytes]]


def instruct(composer: Composer, count: int) -> Iterator[Sample]:
    """Training samples: 3/8 single digits, 1/2 grids, 1/8 text only.

    A grid has all its questions in one conversation, in random order.
    """
    for i in range(count):
        turns, picture = _draw(composer, i % 8)
        order = composer.rng.permutation(len(turns))
        shuffled = [turns[j] for j in order]
        yield (
            {"conversations": conversation(shuffled, with_image=picture is not None)},
            [png(picture)] if picture else [],
        )


def heldout(composer: Composer, count: int) -> Iterator[Sample]:
    """Held-out samples with one question each, so that no answer can depend on another question's."""
    for i in range(count):
        turns, picture = _draw(composer, i % 8)
        turn = turns[int(composer.rng.integers(len(turns)))]
        record = {"conversations": conversation([turn], with_image=picture is not None), "kind": turn[0]}
        yield record, [png(picture)] if picture else []


def _draw(composer: Composer, sort: int) -> tuple[list[Turn], Picture | None]:
    if sort < 3:
        picture = composer.single()
        return single_turns(picture), picture
    if sort < 7:
        picture, pair = composer.grid_with_pair()
        return grid_turns(picture, pair, composer.rng), picture
    return [arithmetic(composer.rng) for _ in range(3)], None


def captions(composer: Composer, count: int) -> Iterator[Sample]:
    """Samples of a picture and its caption, for `align`."""
    for i in range(count):
        picture = composer.single() if i % 2 else composer.grid_with_pair()[0]
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption(picture)}]
        yield {"conversations": turns}, [png(picture)]


def labelled_grids(composer: Composer, count: int) -> dict[str, np.ndarray]:
    """Grids and the digit in each of their cells, on which the tower is pretrained.

    The arrays are uint8 [count, 32, 32] and int64 [count, 4].
    """
    drawn = [composer.grid(composer.rng.integers(10, size=4).tolist()) for _ in range(count)]
    return {"pixels": np.stack([p.pixels for p in drawn]), "labels": np.array([p.digits for p in drawn])}


def build(
    output: Path,
    seed: int,
    instruct_samples: int,
    caption_samples: int,
    heldout_samples: int,
    tower_pictures: int,
) -> None:
    """Write all shards, the tower's pictures and the tokenizer under `output`."""
    scans, labels = load_digits(return_X_y=True)
    scans = np.round(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(scans))
    cut = round(len(scans) * TEST_SHARE)
    test, train = (
        Composer(scans[part], labels[part], seed + i)
        for i, part in enumerate((order[:cut], order[cut:]), start=1)
    )
    output.mkdir(parents=True, exist_ok=True)
    training = list(instruct(train, instruct_samples))
    described = list(captions(train, caption_samples))
    lines = [turn["value"] for record, _ in described for turn in record["conversations"]]
    # Texts are laid out as in the v1 template, so that the template's words become pieces of their own.
    for record, _ in training[:2000]:
        turns = [turn["value"] for turn in record["conversations"][1:]]
        lines += [f"USER: {q} ASSISTANT: {a}" for q, a in zip(turns[::2], turns[1::2], strict=True)]
    # BPE makes pieces of whole words.
    train_sentencepiece(
        (line.replace("<image>\n", "") for line in lines),
        output / "tokenizer.model",
        vocab_size=400,
        model_type="bpe",
    )
    write_shards(training, output / "instruct", samples_per_shard=2000)
    write_shards(described, output / "captions", samples_per_shard=2000)
    write_shards(heldout(test, heldout_samples), output / "heldout", samples_per_shard=2000)
    np.savez_compressed(output / "tower.npz", **labelled_grids(train, tower_pictures))
    print(
        f"{len(order) - cut} training scans, {cut} held-out scans; {instruct_samples} conversations, "
        f"{caption_samples} captions, "
        f"{heldout_samples} held-out questions in {output}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--instruct-samples", type=int, default=12000)
    parser.add_argument("--caption-samples", type=int, default=3000)
    parser.add_argument("--heldout-samples", type=int, default=2400)
    parser.add_argument("--tower-pictures", type=int, default=6000)
    args = parser.parse_args()
    build(
        args.output,
        args.seed,
        args.instruct_samples,
        args.caption_samples,
        args.heldout_samples,
        args.tower_pictures,
    )


if __name__ == "__main__":
    main()
