"""What one replica computes: positions, pairs of positions in attention, and images.

Arithmetic and traffic are linear in these three, so the figures of a microbatch, of a step, and of steps
whose microbatches differ are computed in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_evomoe.config import ParallelConfig, RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.data.packing import plan_step, rounded_up
from megatron_evomoe.model import inventory
from megatron_evomoe.model.precision import sequence_multiple
from megatron_evomoe.parallel import degrees

_STEPS = 8
"""Steps that are drawn from known lengths."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of one replica; whole numbers, means of several steps are rounded."""

    microbatches: int
    positions: int
    """Positions, padding included."""
    squares: int
    """Sum of the squared lengths of all sequences within which attention is computed."""
    images: int


def full_microbatch(config: RunConfig) -> Work:
    """One microbatch whose rows all have `seq_length` positions and one image."""
    b, s = config.train.micro_batch_size, config.data.seq_length
    return Work(microbatches=1, positions=b * s, squares=b * s * s, images=b)


@dataclass(frozen=True)
class SampleLengths:
    """What is known of the lengths of samples, in tokens."""

    mean: int | None = None
    """Their mean; None means that all have `seq_length`."""
    known: np.ndarray | None = None
    """int [n], the lengths themselves before cutting; 0 or less for unusable samples."""

    def usable(self, seq_length: int, long_samples: str) -> np.ndarray:
        """The known lengths as training takes them, 0 for samples that are left out."""
        assert self.known is not None
        lengths = np.maximum(self.known, 0)
        if long_samples == "truncate":
            return np.minimum(lengths, seq_length)
        return np.where(lengths > seq_length, 0, lengths)


def attention_cost(config: RunConfig, kind: StageKind) -> float:
    """FLOP of a pair of positions in attention ÷ FLOP of one position in all else, without the tower.

    Each weight that a position meets costs 2 FLOP; a pair costs 2 per head and channel, its causal half. The
    number is the same in every layout, as the plan of a step must be.
    """
    language, experts, topk = config.language, config.moe.num_experts, config.moe.moe_router_topk
    one_rank = replace(config, parallel=ParallelConfig())  # TP pads the vocabulary
    weights = inventory.padded_vocab_size(one_rank) * language.hidden_size
    weights += sum(
        t.numel * topk // experts if t.expert is not None else t.numel
        for t in inventory.language_model(config, kind, first=False, last=False)
    )
    return language.num_layers * language.num_attention_heads * language.head_size / weights


def step_work(
    config: RunConfig, kind: StageKind, world_size: int, lengths: SampleLengths | None = None
) -> Work:
    """Work of a step on one replica, for the configured `packing`.

    With known lengths it is that of the replica that computes most, a mean over some drawn steps. A mean
    alone says nothing of how lengths differ: rows then have the mean length, or with `pack` are full.
    """
    lengths = lengths or SampleLengths()
    replicas = degrees.data_parallel_size(config, world_size)
    if lengths.known is not None:
        known = lengths.usable(config.data.seq_length, config.data.long_samples)
        return _of_known(config, kind, replicas, known)
    samples = -(-config.train.global_batch_size // replicas)
    b, longest = config.train.micro_batch_size, config.data.seq_length
    mean = min(lengths.mean or longest, longest)
    if config.data.packing == "pack":
        group = _group(config, replicas)
        bins = -(-config.train.global_batch_size * mean // (b * longest))
        count = max(1, -(-bins // group)) * group // replicas
        tokens = min(samples * mean, count * b * longest)
        padding = count * b * longest - tokens if config.data.pad_to_seq_length else 0
        squares = tokens * mean + padding**2 // count  # the padding of a row is a sequence of its own
        return Work(microbatches=count, positions=tokens + padding, squares=squares, images=samples)
    row = longest if config.data.pad_to_seq_length else mean
    return Work(microbatches=samples // b, positions=samples * row, squares=samples * row**2, images=samples)


def _group(config: RunConfig, replicas: int) -> int:
    """The number of which the microbatches of a packed step are a multiple, over all replicas."""
    return (config.data.packing_replicas or replicas) * packing_rounds(config)


def packing_rounds(config: RunConfig) -> int:
    """The number of which the microbatches of a replica must be a multiple: PP if stages are interleaved."""
    return config.parallel.pipeline_model_parallel_size if degrees.virtual_stages(config) else 1


def _of_known(config: RunConfig, kind: StageKind, replicas: int, known: np.ndarray) -> Work:
    draws = np.random.default_rng(config.train.seed)
    cost = attention_cost(config, kind)
    steps = []
    for _ in range(_STEPS):
        lengths = known[draws.integers(0, len(known), config.train.global_batch_size)]
        steps.append(_slowest(config, replicas, lengths, cost))
    m, positions, squares, images = np.mean(steps, axis=0).round().astype(int).tolist()
    return Work(microbatches=m, positions=positions, squares=squares, images=images)


def _slowest(config: RunConfig, replicas: int, lengths: np.ndarray, cost: float) -> tuple[int, int, int, int]:
    """(microbatches, positions, squares, images) of the replica that computes most in one step."""
    data, b, multiple = config.data, config.train.micro_batch_size, sequence_multiple(config)
    plan = plan_step(
        lengths,
        packing=data.packing,
        micro_batch_size=b,
        seq_length=data.seq_length,
        replicas=replicas,
        packing_replicas=data.packing_replicas,
        rounds=packing_rounds(config),
        multiple=multiple,
        attention_cost=cost,
    )
    work = []
    for replica in range(replicas):
        mine = [lengths[held] for held in plan[replica::replicas]]
        sequences = np.concatenate(
            sequences_of(
                mine,
                packing=data.packing,
                micro_batch_size=b,
                seq_length=data.seq_length,
                static=data.pad_to_seq_length,
                multiple=multiple,
            )
        )
        images = int(sum(np.count_nonzero(held) for held in mine))
        work.append((len(mine), int(sequences.sum()), int((sequences**2).sum()), images))
    return max(work, key=lambda w: w[1] + cost * w[2])


def sequences_of(
    microbatches: list[np.ndarray],
    *,
    packing: str,
    micro_batch_size: int,
    seq_length: int,
    static: bool = False,
    multiple: int = 1,
) -> list[np.ndarray]:
    """The lengths of the sequences of each microbatch of a replica's step, padding included, int64.

    Args:
        microbatches: the lengths of the samples in each of them.
        static: whether rows have a fixed length (`pad_to_seq_length`).
        multiple: rows are padded to a multiple of this number of positions.
    """
    if packing == "pack":
        tokens = np.array([held.sum() for held in microbatches])
        width = (
            np.full_like(tokens, micro_batch_size * seq_length) if static else rounded_up(tokens, multiple)
        )
        return [np.append(held, w - t) for held, w, t in zip(microbatches, width, tokens, strict=True)]
    longest = np.array([held.max() for held in microbatches])
    if static:
        longest[:] = seq_length
    elif packing == "none":  # all microbatches of a step have one length
        longest[:] = longest.max()
    return [np.full(micro_batch_size, row) for row in rounded_up(longest, multiple)]
