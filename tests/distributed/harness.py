"""Runs the same training under many layouts, in gloo processes, and returns the metrics of each run.

A `Job` is a few optimizer steps of one stage under one layout, from a checkpoint and to a checkpoint. Jobs of
one world size run one after the other in the same processes (`worker.py`), because starting Python four times
costs more than training.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.batch import MicroBatch
from megatron_evomoe.data.conversation import IGNORE_INDEX
from tests import programs
from tests.tiny import IMAGE_TOKENS, VOCAB

ROWS = 8
LENGTH = 24
MULTIPLE = 4  # of a microbatch's positions, for every tensor-parallel size
# images per row: with DP 2 and two rows per microbatch, the second replica has a microbatch without images
IMAGES = (1, 0, 0, 0, 2, 1, 0, 0)
# token counts of rows that are mostly padding, so that some sequence-parallel shards hold padding alone
SHORT = {3: 10, 6: 9, 7: 11}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel degrees and the number of ranks; data parallelism takes the ranks that the degrees leave."""

    world: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    layers_per_chunk: int | None = None
    overlap: bool = False
    """communicate gradients and weights during the backward and forward passes, in many small buckets"""

    @property
    def replicas(self) -> int:
        """The data-parallel size."""
        return self.world // (self.tp * self.pp)

    def takes(self, options: dict[str, Any]) -> bool:
        """Whether this layout can run with `options`.

        A step's eight rows must divide evenly into microbatches, and communication can only overlap with the
        distributed optimizer.
        """
        rows = options.get("train", {}).get("micro_batch_size", 2)
        microbatches, rest = divmod(ROWS, rows * self.replicas)
        shards = options.get("parallel", {}).get("use_distributed_optimizer", True)
        return (
            not rest
            and (self.layers_per_chunk is None or microbatches % self.pp == 0)
            and (shards or not self.overlap)
        )

    @property
    def flags(self) -> dict[str, Any]:
        """The configuration's `parallel` section."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "num_layers_per_virtual_pipeline_stage": self.layers_per_chunk,
            "overlap_grad_reduce": self.overlap,
            "overlap_param_gather": self.overlap,
        }


LAYOUTS = {
    "one rank": Layout(world=1),
    "TP 2": Layout(world=2, tp=2),
    "PP 2": Layout(world=2, pp=2),
    "EP 2": Layout(world=2, ep=2),
    "DP 2": Layout(world=2),
    "DP 2, overlapped": Layout(world=2, overlap=True),
    "PP 2, 2 chunks": Layout(world=2, pp=2, layers_per_chunk=1),
    "TP 2 x ETP 2": Layout(world=2, tp=2, etp=2),
    "EP 4": Layout(world=4, ep=4),
    "TP 2 x EP 2": Layout(world=4, tp=2, ep=2),
    "PP 2 x EP 2": Layout(world=4, pp=2, ep=2),
    "TP 2 x PP 2": Layout(world=4, tp=2, pp=2),
}
"""Every stage and every option is tested under each of these layouts."""

COMBINED = {
    "PP 4": Layout(world=4, pp=4),
    "TP 4": Layout(world=4, tp=4),
    "ETP 2": Layout(world=2, etp=2),
    "DP 2 x EP 2, overlapped": Layout(world=4, ep=2, overlap=True),
    "PP 2, 2 chunks x EP 2": Layout(world=4, pp=2, layers_per_chunk=1, ep=2),
    "PP 2, 2 chunks x DP 2, overlapped": Layout(world=4, pp=2, layers_per_chunk=1, overlap=True),
    "TP 2 x EP 2 x ETP 2": Layout(world=4, tp=2, ep=2, etp=2),
    "TP 2 x PP 2 x EP 2": Layout(world=8, tp=2, pp=2, ep=2),
}
"""Layouts tested with some stages and options only; tests/distributed/test_layouts.py says which."""


@dataclass(kw_only=True)
class Job:
    """Training steps `first` to `last` of a stage of kind `kind` under `layout`."""

    name: str
    layout: Layout
    kind: str
    sections: dict[str, Any] = field(default_factory=dict)
    """configuration sections merged over those of `configuration`"""
    start: str | None = None
    """checkpoint whose weights a new stage starts from"""
    resume: str | None = None
    """checkpoint to resume from, with optimizer and schedule"""
    first: int = 1
    last: int = 3
    save: str | None = None
    """folder for a checkpoint after step `last`"""
    collapse: bool = False
    """send every token to expert 0"""


def configuration(job: Job) -> dict[str, Any]:
    """The configuration of a job: four layers; the second and the fourth are mixtures of experts.

    The auxiliary loss coefficient α is large enough for its gradient to matter.
    """
    raw: dict[str, Any] = {
        "language": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": VOCAB,
            "init_method_std": 0.1,
        },
        "vision": {
            "image_size": 16,
            "patch_size": 8,
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "ffn_hidden_size": 32,
            "init_method_std": 0.1,
        },
        "moe": {"dtr_hidden_size": 4, "dtr_rank": 4, "moe_aux_loss_coeff": 0.02},
        "data": {"seq_length": 64},
        "optimizer": {"lr": 1e-2, "lr_decay_style": "cosine", "lr_warmup_fraction": 0.0},
        "train": {"micro_batch_size": 2, "global_batch_size": ROWS, "train_iters": 6, "seed": 3},
        "parallel": job.layout.flags,
        "stages": [{"name": job.kind}],
    }
    for name, values in job.sections.items():
        raw[name] = {**raw[name], **values}
    return raw


def global_batch(step: int) -> dict[str, Any]:
    """A step's eight rows, whatever the layout: tokens, labels, types [8, s] and each row's pixels."""
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(4, VOCAB, (ROWS, LENGTH), generator=g)
    types = torch.full((ROWS, LENGTH), TokenType.TEXT)
    labels = torch.full((ROWS, LENGTH), IGNORE_INDEX)
    pixels = []
    for i, images in enumerate(IMAGES):
        end = SHORT.get(i, LENGTH - 2 - i % 3)
        types[i, 1 : 1 + images * IMAGE_TOKENS] = TokenType.VISION
        types[i, end:] = TokenType.PADDING
        supervised = 1 + i % 4  # rows differ, so that a mean of means would not equal the mean over tokens
        labels[i, end - supervised : end] = torch.randint(4, VOCAB, (supervised,), generator=g)
        pixels.append(torch.randint(0, 256, (images, 3, 16, 16), generator=g, dtype=torch.uint8))
    return {"tokens": tokens, "labels": labels, "types": types, "pixels": pixels}


def microbatches(step: int, config: RunConfig) -> list[MicroBatch]:
    """The step's microbatches, which hold the same samples whatever `data.packing` is.

    With `none` all rows are padded to one length, with `sort` to the longest row of the microbatch, and with
    `pack` a microbatch is one row of several segments. Microbatches without samples fill up a multiple of
    `packing_replicas`.
    """
    batch, size, packing = global_batch(step), config.train.micro_batch_size, config.data.packing
    real = (batch["types"] != TokenType.PADDING).sum(dim=1).tolist()
    found = []
    for first in range(0, ROWS, size):
        rows = range(first, first + size)
        lengths = [LENGTH if packing == "none" else real[i] for i in rows]
        length = _rounded(sum(lengths) if packing == "pack" else max(lengths))
        shape = (1, length) if packing == "pack" else (size, length)
        micro = _empty(shape, torch.cat(batch["pixels"][first : first + size]))
        micro.keys = [f"{step}-{i}" for i in rows]
        start = 0
        for row, (i, n) in enumerate(zip(rows, lengths, strict=True)):
            to = (0, slice(start, start + n)) if packing == "pack" else (row, slice(n))
            micro.tokens[to] = batch["tokens"][i, :n]
            micro.labels[to] = batch["labels"][i, :n]
            micro.token_types[to] = batch["types"][i, :n]
            start += n
        if packing == "pack":
            micro.segments = tuple(lengths) if start == length else (*lengths, length - start)
        found.append(micro)
    while packing == "pack" and len(found) % (config.data.packing_replicas or 1):
        found.append(_empty((1, MULTIPLE), torch.empty(0, 3, 16, 16, dtype=torch.uint8)))
        found[-1].segments = (MULTIPLE,)
    return found


def _rounded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def _empty(shape: tuple[int, int], images: torch.Tensor) -> MicroBatch:
    return MicroBatch(
        tokens=torch.zeros(shape, dtype=torch.int32),
        labels=torch.full(shape, IGNORE_INDEX, dtype=torch.int32),
        token_types=torch.full(shape, TokenType.PADDING, dtype=torch.int32),
        images=images,
    )


def run(
    world: int, jobs: list[Job], folder: Path, *, timeout: float = 1200
) -> dict[str, list[dict[str, float]]]:
    """Run `jobs` on `world` processes; returns each job's steps by name. Fails with the workers' output."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, answered = folder / f"jobs{world}.json", folder / f"results{world}.json"
    asked.write_text(json.dumps([asdict(job) for job in jobs]))
    answered.unlink(missing_ok=True)
    programs.run("-m", "tests.distributed.worker", str(asked), str(answered), ranks=world, timeout=timeout)
    return json.loads(answered.read_text())
