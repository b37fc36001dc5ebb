"""Counting the lengths of samples, in one process and in several.

    python benchmarks/count_lengths.py                      # both kinds of tokenizer, 1 and 2 processes
    python benchmarks/count_lengths.py --samples 200000 --processes 1 8 --tokenizer path/to/tokenizer
    python benchmarks/count_lengths.py --tiny               # shows that the script works

The samples are made: conversations of random words of this project's pages, whose lengths are distributed as
in LLaVA-665k (text in several turns, and one picture of 576 tokens). The tokenizers are trained on the same
pages. Times are of `open_lengths`, with the writing of the file and without the shards' index; medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_evomoe.config import DataConfig  # noqa: E402
from megatron_evomoe.data.lengths import open_lengths  # noqa: E402
from megatron_evomoe.data.shards import ShardDataset, write_shards  # noqa: E402
from megatron_evomoe.data.tokenizer import Tokenizer, build_tokenizer, train_sentencepiece  # noqa: E402

TOKENS_PER_IMAGE = 576
VOCABULARY = 4000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokenizer", type=Path, help="one to use instead of the two that are trained")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="100 samples, one round: plumbing only")
    args = parser.parse_args()
    if args.tiny:
        args.samples, args.rounds = 100, 1
    return args


def pages() -> list[str]:
    """The lines of this project's pages, without what would be taken for a picture."""
    lines = [
        line.strip() for path in sorted(ROOT.glob("docs/*.md")) for line in path.read_text().splitlines()
    ]
    return [line for line in lines if line and "<" not in line and "[" not in line]


def write_samples(folder: Path, count: int, words: list[str]) -> ShardDataset:
    rng = random.Random(0)

    def sample(i: int) -> tuple[dict, list[bytes]]:
        size = max(30, int(rng.lognormvariate(4.9, 0.7)))  # words of questions and answers together
        turns: list[dict] = []
        for turn in range(max(1, size // 60)):
            question, answer = (" ".join(rng.choices(words, k=k)) for k in (12, 48))
            turns.append({"from": "human", "value": question if turn else f"<image>\n{question}"})
            turns.append({"from": "gpt", "value": answer})
        return {"id": i, "image": f"{i}.jpg", "conversations": turns}, [b"pictures are not read"]

    write_shards((sample(i) for i in range(count)), folder)
    return ShardDataset(folder)


def tokenizers(folder: Path, lines: list[str]) -> dict[str, Tokenizer]:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    backend.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end).save_pretrained(folder / "hf")
    return {
        "sentencepiece": build_tokenizer(train_sentencepiece(lines, folder / "sp.model", VOCABULARY)),
        "Hugging Face": build_tokenizer(folder / "hf"),
    }


def main() -> None:
    args, lines = parse_args(), pages()
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_samples(Path(folder) / "shards", args.samples, " ".join(lines).split())
        found = (
            {str(args.tokenizer): build_tokenizer(args.tokenizer)}
            if args.tokenizer
            else tokenizers(Path(folder), lines)
        )
        times: dict[tuple[str, int], list[float]] = {}
        for _ in range(args.rounds):
            for name, tokenizer in found.items():
                for processes in args.processes:
                    start = time.perf_counter()
                    lengths = open_lengths(
                        dataset, tokenizer, DataConfig(), TOKENS_PER_IMAGE, workers=processes
                    )
                    times.setdefault((name, processes), []).append(time.perf_counter() - start)
                    mean = float(lengths[range(len(dataset))].mean())
                    lengths.path.unlink()
        print(f"{len(dataset)} samples of {mean:.0f} tokens on average, {args.rounds} rounds\n")
        print("| tokenizer | processes | µs a sample | LLaVA-665k takes |\n|---|---|---|---|")
        for (name, processes), seconds in times.items():
            each = statistics.median(seconds) / len(dataset)
            print(f"| {name} | {processes} | {1e6 * each:.0f} | {665_000 * each / 60:.1f} minutes |")


if __name__ == "__main__":
    main()
