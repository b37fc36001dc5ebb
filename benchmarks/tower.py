"""Training steps whose vision tower runs once a step, against steps whose tower runs in each microbatch.

    python benchmarks/tower.py          # CPU: fp32, one thread
    python benchmarks/tower.py --tiny   # shows that the script works

Both take the same samples from the same weights, in turns, and times are medians. In the second form, the
images of each microbatch are given to the model as pixels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure  # noqa: E402
import torch  # noqa: E402

from megatron_evomoe.config import from_mapping  # noqa: E402
from megatron_evomoe.config.token_types import TokenType  # noqa: E402
from megatron_evomoe.data.batch import MicroBatch  # noqa: E402
from megatron_evomoe.parallel import backend  # noqa: E402

POSITIONS = 128
TRAINED = {"frozen": ["projector", "language"], "trained": ["vision", "projector", "language"]}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4], help="in a microbatch")
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="two microbatches, one round: plumbing only")
    args = parser.parse_args()
    if args.tiny:
        args.images, args.microbatches, args.rounds = [1], 2, 1
    return args


def configuration(tower: str, microbatches: int) -> Any:
    """The preset `tiny` with a tower of 6 layers, width 256, and 16 positions of an image."""
    sizes = {"image_size": 56, "patch_size": 14, "hidden_size": 256, "num_layers": 6}
    return from_mapping(
        {
            "preset": "tiny",
            "language": {"vocab_size": 512},
            "vision": {**sizes, "num_attention_heads": 4, "ffn_hidden_size": 1024},
            "train": {"trainable": TRAINED[tower], "global_batch_size": microbatches},
            "stages": [{"name": "warmup"}],
        }
    ).for_stage("warmup")


def microbatch(config: Any, images: int) -> MicroBatch:
    """One sample of random tokens, with `images` images at its beginning."""
    side, high = config.vision.image_size, config.language.vocab_size
    types = torch.full((1, POSITIONS), TokenType.TEXT)
    types[0, 1 : 1 + images * config.vision.tokens_per_image] = TokenType.VISION
    return MicroBatch(
        tokens=torch.randint(0, high, (1, POSITIONS)),
        labels=torch.randint(0, high, (1, POSITIONS)),
        token_types=types,
        images=torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8),
    )


def forms(tower: str, images: int, microbatches: int) -> dict[str, Callable[[], float]]:
    """What takes a step with the tower once a step, and in each microbatch."""
    from megatron_evomoe.parallel import broadcast, topology
    from megatron_evomoe.train.built import build_stage
    from megatron_evomoe.train.step import take_step

    config = configuration(tower, microbatches)
    topology.seed_everything(config.train.seed)
    step = broadcast.Step(microbatches=[microbatch(config, images) for _ in range(microbatches)])
    step = broadcast.to_replica(step, topology.current(), config)
    once, each = (build_stage(config, config.stages[0]) for _ in range(2))
    each.tower.features = lambda given, counts: list(given)  # the model takes pixels too
    return {
        name: lambda built=built: take_step(built, step, 1).loss
        for name, built in {"each": each, "once": once}.items()
    }


def main() -> None:
    args = parse_args()
    backend.prepare()
    torch.set_num_threads(1)
    from megatron_evomoe.parallel import topology

    backend.init_process_group(timeout_minutes=2)
    topology.initialize(configuration("frozen", 1))
    print("| tower | images in a microbatch | in each microbatch, ms | once a step, ms | times faster |")
    print("|---|---|---|---|---|")
    for tower in TRAINED:
        for images in args.images:
            found = forms(tower, images, args.microbatches)
            for take in found.values():
                take()  # allocates the optimizer's state
            seconds = measure.alternate(found, args.rounds)
            each, once = (statistics.median(seconds[name]) for name in ("each", "once"))
            print(f"| {tower} | {images} | {each * 1e3:.0f} | {once * 1e3:.0f} | {each / once:.2f} |")


if __name__ == "__main__":
    main()
