"""What the three values of `data.packing` compute: padding, balance over replicas, and speed in training.

    python benchmarks/packing.py [--global-batch 256 1024 4096] [--steps 20] [--json FILE]
    python benchmarks/packing.py --train [--rounds 9] [--kind warmup] [--json FILE]

The first form deals samples whose lengths are like LLaVA-665k's (`lengths.py`) into microbatches, exactly as
training does, and prints

* the share of computed positions that are padding, for rows of their own length and for rows of a fixed
  length (`pad_to_seq_length`);
* the work of the slowest replica over the mean, over a whole step, and if replicas wait for each other in
  every round of microbatches, as those of an expert-parallel group do;
* the CPU time of planning, per sample.

`none` and `sort` have microbatches of 4 rows of up to 2048 positions, `pack` has rows of 2048, 4096 and 8192
positions. Rows are padded to a multiple of 16. Work is that of a model with the attention of OpenChat-7B.

The second form trains a tiny model on lengths scaled down by 9, with the batches of `none`, `sort` and `pack`
in turn, which take the same samples in each round. The three start from the same weights, so their losses
agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).parent.parent))

import lengths as mixture  # noqa: E402
import measure  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_evomoe.parallel import backend  # noqa: E402

MULTIPLE = 16
ROWS = 4
REPLICAS = (8, 32)
WAYS: dict[str, tuple[str, int, int]] = {
    "none": ("none", ROWS, mixture.LONGEST),
    "sort": ("sort", ROWS, mixture.LONGEST),
    "pack 2048": ("pack", 1, 2048),
    "pack 4096": ("pack", 1, 4096),
    "pack 8192": ("pack", 1, 8192),
}
"""`packing`, micro_batch_size and seq_length of each row of the table."""

SCALE = 9
"""Divides lengths for training: an image takes 64 positions instead of 576."""
TRAINED = 32
"""Samples of a step in training: those of one replica of eight, if the global batch has 256."""


def main() -> None:
    """Measure, print Markdown and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--global-batch", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--steps", type=int, default=20, help="steps that are dealt for each figure")
    parser.add_argument("--train", action="store_true", help="train instead of counting")
    parser.add_argument("--kind", default="warmup", help="stage kind that is trained")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each kind of batch")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    backend.prepare()
    report = {"circumstances": measure.circumstances()}
    report |= {"training": train(args)} if args.train else {"dealing": deal(args)}
    print(trained_markdown(report["training"]) if args.train else dealt_markdown(report["dealing"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


def deal(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of figures for each global batch, way of packing and number of replicas."""
    from megatron_evomoe.config import from_mapping
    from megatron_evomoe.plan.work import attention_cost

    cost = attention_cost(from_mapping({"preset": "openchat-7b"}), "warmup")
    return [
        dealt(name, size, replicas, args.steps, cost)
        for size in args.global_batch
        for name in WAYS
        for replicas in REPLICAS
    ]


def dealt(name: str, global_batch: int, replicas: int, steps: int, cost: float) -> dict[str, Any]:
    """Figures of one way of packing, means over steps."""
    from megatron_evomoe.data.packing import plan_step
    from megatron_evomoe.plan.work import sequences_of

    packing, rows, seq_length = WAYS[name]
    options = dict(packing=packing, micro_batch_size=rows, seq_length=seq_length, multiple=MULTIPLE)
    draws = np.random.default_rng(1)
    found: dict[str, list[float]] = {}
    for _ in range(steps):
        lengths = mixture.lengths(global_batch, draws)
        started = time.process_time()
        plan = plan_step(lengths, replicas=replicas, attention_cost=cost, **options)
        seconds = time.process_time() - started
        work, computed = [], {False: 0, True: 0}
        for replica in range(replicas):
            mine = [lengths[held] for held in plan[replica::replicas]]
            for static in (False, True):
                sequences = sequences_of(mine, static=static, **options)
                computed[static] += int(sum(rows.sum() for rows in sequences))
                if not static:
                    work.append([rows.sum() + cost * (rows.astype(float) ** 2).sum() for rows in sequences])
        in_rounds, of_replica = np.array(work).max(0).sum(), np.array(work).sum(1)
        for key, value in (
            ("microbatches", len(plan)),
            ("padding", 1 - lengths.sum() / computed[False]),
            ("static_padding", 1 - lengths.sum() / computed[True]),
            ("slowest", of_replica.max() / of_replica.mean()),
            ("slowest_in_rounds", in_rounds / of_replica.mean()),
            ("us_per_sample", seconds / global_batch * 1e6),
        ):
            found.setdefault(key, []).append(float(value))
    means = {key: statistics.mean(values) for key, values in found.items()}
    return {"way": name, "global_batch": global_batch, "replicas": replicas, **means}


def dealt_markdown(rows: list[dict[str, Any]]) -> str:
    """Markdown table of `deal`."""
    header = [
        "global batch",
        "DP",
        "packing",
        "microbatches",
        "padding %",
        "padding %, fixed rows",
        "slowest ÷ mean",
        "with rounds",
        "µs a sample",
    ]
    return measure.table(
        header,
        [
            [
                f"{r['global_batch']}",
                f"{r['replicas']}",
                r["way"],
                f"{r['microbatches']:.0f}",
                f"{100 * r['padding']:.1f}",
                f"{100 * r['static_padding']:.1f}",
                f"{r['slowest']:.3f}",
                f"{r['slowest_in_rounds']:.3f}",
                f"{r['us_per_sample']:.0f}",
            ]
            for r in rows
        ],
    )


def train(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of figures for each value of `packing`, from interleaved rounds."""
    from megatron_evomoe.parallel import topology
    from megatron_evomoe.train.built import build_stage
    from megatron_evomoe.train.step import take_step

    configs = {packing: tiny(packing, args.kind) for packing in ("none", "sort", "pack")}
    backend.init_process_group(timeout_minutes=10)
    topology.initialize(configs["none"])
    built = {}
    for packing, config in configs.items():
        topology.seed_everything(config.train.seed)
        built[packing] = build_stage(config, config.stages[0])
    draws = np.random.default_rng(2)
    rows: dict[str, list[tuple[float, Any]]] = {packing: [] for packing in configs}
    for number in range(1, args.rounds + 3):
        text, has_image = mixture.texts(TRAINED, draws)
        for packing, config in configs.items():
            step = step_of(config, text, has_image, seed=number)
            started = time.perf_counter()
            result = take_step(built[packing], step, number)
            if number > 2:  # the first steps allocate
                rows[packing].append((time.perf_counter() - started, result))
    today = [seconds for seconds, _ in rows["none"]]
    return [
        {
            "packing": packing,
            "useful_tokens_per_s": statistics.median(r.tokens / seconds for seconds, r in measured),
            "times_none": statistics.median(
                none / seconds for none, (seconds, _) in zip(today, measured, strict=True)
            ),
            "padding": statistics.mean(1 - r.tokens / r.positions for _, r in measured),
            "microbatches": statistics.mean(r.microbatches for _, r in measured),
            "losses": [r.loss for _, r in measured],
        }
        for packing, measured in rows.items()
    ]


def tiny(packing: str, kind: str) -> Any:
    """A model of four layers and a small tower, with `packing`."""
    from megatron_evomoe.config import from_mapping

    return from_mapping(
        {
            "preset": "tiny",
            "language": {"vocab_size": 256},
            "vision": {"image_size": 64, "patch_size": 8, "model_type": "siglip"},
            "data": {"seq_length": -(-mixture.LONGEST // SCALE), "packing": packing},
            "optimizer": {"lr": 1e-3, "lr_decay_style": "constant", "lr_warmup_fraction": 0.0},
            "train": {"micro_batch_size": ROWS, "global_batch_size": TRAINED, "train_iters": 1000},
            "stages": [{"name": kind}],
        }
    ).for_stage(kind)


def step_of(config: Any, text: np.ndarray, has_image: np.ndarray, seed: int) -> Any:
    """A step of random samples with these lengths, an image before the text where they have one."""
    from megatron_evomoe.config.token_types import TokenType
    from megatron_evomoe.data.batch import MicroBatch
    from megatron_evomoe.data.conversation import IGNORE_INDEX
    from megatron_evomoe.data.packing import plan_step
    from megatron_evomoe.parallel.broadcast import Step

    generator = torch.Generator().manual_seed(seed)
    side, image = config.vision.image_size, config.vision.tokens_per_image
    longest = config.data.seq_length
    samples = []
    for words, shown in zip(text.tolist(), has_image.tolist(), strict=True):
        n = min(max(2, words // SCALE) + image * shown, longest)
        types = torch.full((n,), int(TokenType.TEXT))
        types[: image * shown] = TokenType.VISION
        tokens, labels = torch.randint(0, config.language.vocab_size, (2, n), generator=generator)
        labels[: (n + image * shown) // 2] = IGNORE_INDEX
        pixels = torch.randint(0, 256, (int(shown), 3, side, side), dtype=torch.uint8, generator=generator)
        samples.append((tokens, labels, types, pixels))
    plan = plan_step(
        np.array([len(tokens) for tokens, _, _, _ in samples]),
        packing=config.data.packing,
        micro_batch_size=config.train.micro_batch_size,
        seq_length=longest,
        replicas=1,
    )
    step_longest = max(len(tokens) for tokens, _, _, _ in samples)
    fillers = (0, IGNORE_INDEX, int(TokenType.PADDING))
    microbatches = []
    for held in plan:
        parts = list(zip(*(samples[i] for i in held), strict=True))
        segments = tuple(len(tokens) for tokens in parts[0])
        width = step_longest if config.data.packing == "none" else max(segments)
        if config.data.packing == "pack":
            tensors = [torch.cat(part)[None] for part in parts[:3]]
        else:
            tensors = [padded(part, width, filler) for part, filler in zip(parts, fillers, strict=False)]
        microbatches.append(
            MicroBatch(
                tokens=tensors[0],
                labels=tensors[1],
                token_types=tensors[2],
                images=torch.cat(parts[3]),
                segments=segments if config.data.packing == "pack" else None,
            )
        )
    return Step(microbatches=microbatches)


def padded(rows: tuple[torch.Tensor, ...], width: int, filler: int) -> torch.Tensor:
    """Rows in one tensor, int64 [b, width]."""
    out = torch.full((len(rows), width), filler)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def trained_markdown(rows: list[dict[str, Any]]) -> str:
    """Markdown table of `train`, and how far the losses differ."""
    none = rows[0]["losses"]
    header = [
        "packing",
        "useful tokens/s",
        "times none",
        "padding %",
        "microbatches",
        "loss, largest difference",
    ]
    return measure.table(
        header,
        [
            [
                r["packing"],
                f"{r['useful_tokens_per_s']:,.0f}",
                f"{r['times_none']:.2f}",
                f"{100 * r['padding']:.1f}",
                f"{r['microbatches']:.1f}",
                f"{max(abs(a - b) for a, b in zip(r['losses'], none, strict=True)):.1e}",
            ]
            for r in rows
        ],
    )


if __name__ == "__main__":
    main()
