"""Pretrain the small vision tower that replaces CLIP in the quickstart, and save it as a checkpoint.

    python examples/digits/pretrain_tower.py --config examples/digits/quickstart.yaml --data DIR/tower.npz
    --output DIR

The tower (megatron-core's ViT, which the model uses too) learns to classify the digit in each quarter of a
grid of *training* scans, once from that quarter's patches and once from the average of all patches. The
feature of a patch then represents both content and position, as CLIP's do. The classification heads are
discarded. Held-out scans and questions are not used.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from megatron_evomoe.config import load_config
from megatron_evomoe.parallel import backend

CELLS = 2  # cells per side of a grid


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()
    config = load_config(args.config)
    backend.prepare()
    backend.init_process_group(timeout_minutes=5)
    from megatron_evomoe.checkpoint import store
    from megatron_evomoe.checkpoint.record import Record
    from megatron_evomoe.config import ParallelConfig
    from megatron_evomoe.data.image import processor_for
    from megatron_evomoe.model.vision import build_vision_model
    from megatron_evomoe.parallel import rng, topology

    config.parallel = ParallelConfig()
    config.train.micro_batch_size = config.train.global_batch_size = 1
    topology.initialize(config)
    topology.seed_everything(config.train.seed)
    tower = build_vision_model(config)
    head = Heads(config.vision.hidden_size)
    data = np.load(args.data)
    pixels = processor_for(config).normalize(
        torch.from_numpy(data["pixels"]).unsqueeze(1).expand(-1, 3, -1, -1)
    )
    accuracy = pretrain(tower, head, pixels, torch.from_numpy(data["labels"]), args)
    record = Record(
        stage="tower",
        kind="pretrained",
        step=args.steps,
        position=0,
        finished=True,
        layout=rng.layout(),
        vocab_size=0,
        tokenizer_fingerprint="",
        parts=["vision_model"],
    )
    path = store.Saver(config.checkpoint).save_weights(
        args.output, {"vision_model": tower}, record, config.to_yaml()
    )
    print(f"tower: {100 * accuracy:.1f} % of the digits of its last 50 batches named; saved to {path}")
    torch.distributed.destroy_process_group()


class Heads(torch.nn.Module):
    """Classification heads: digit logits from patch features [n, p, C].

    One head uses the average of each quarter and returns [n, 4, 10]; so does the other, from the average of
    the whole picture.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.local, self.whole = torch.nn.Linear(width, 10), torch.nn.Linear(width, CELLS**2 * 10)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.local(by_cell(features)), self.whole(features.mean(1)).unflatten(1, (CELLS**2, 10))


def pretrain(
    tower: torch.nn.Module,
    head: torch.nn.Module,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    args: argparse.Namespace,
) -> float:
    """Train tower and head, and return the training accuracy over the last batches."""
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    generator, started, right = torch.Generator().manual_seed(0), time.perf_counter(), []
    for step in range(1, args.steps + 1):
        chosen = torch.randint(len(pixels), (args.batch,), generator=generator)
        wanted = labels[chosen]
        local, whole = head(tower(pixels[chosen]))
        loss = sum(F.cross_entropy(logits.flatten(0, 1), wanted.flatten()) for logits in (local, whole))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right.append((whole.argmax(-1) == wanted).float().mean().item())
        if step % 200 == 0:
            print(
                f"[tower {step}/{args.steps}] loss {loss.item():.3f} | digits named "
                f"{100 * np.mean(right[-50:]):.1f} % | "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return float(np.mean(right[-50:]))


def by_cell(features: torch.Tensor) -> torch.Tensor:
    """Patch features [n, p, C] averaged over each quarter of the picture: [n, 4, C]."""
    side = int(features.shape[1] ** 0.5)
    grid = features.unflatten(1, (CELLS, side // CELLS, CELLS, side // CELLS))
    return grid.mean((2, 4)).flatten(1, 2)


if __name__ == "__main__":
    main()
