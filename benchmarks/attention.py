"""Attention of the local layers, ours against megatron-core's, which keeps all scores.

    python benchmarks/attention.py                          # CPU: fp32, one thread
    python benchmarks/attention.py --positions 512 2048 --heads 32 --groups 8 --threads 2
    python benchmarks/attention.py --tiny  # shows that the script works

The attention between the two projections is timed, forward and backward, causal, of one row. *In segments*
is the same row as samples of `--segment` positions; megatron-core's local layers cannot attend in segments.
All subjects take turns, and times are medians. Kept memory is what the graph holds between forward and
backward, without queries, keys and values, and peak memory is counted above these.
"""

from __future__ import annotations

import argparse
import functools
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
from torch import Tensor  # noqa: E402

from megatron_evomoe.parallel import backend  # noqa: E402

CORE, OURS, SEGMENTS = "megatron-core's", "ours", "ours, in segments"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, help="heads of keys and values; all by default")
    parser.add_argument("--size", type=int, default=64, help="of a head")
    parser.add_argument("--segment", type=int, default=512, help="positions of a sample in a packed row")
    parser.add_argument(
        "--precision", choices=list(measure.DTYPES), default="bf16" if backend.on_gpu() else "fp32"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--tiny", action="store_true", help="64 positions, one round: plumbing only")
    args = parser.parse_args()
    args.groups = args.groups or args.heads
    if args.tiny:
        args.positions, args.rounds, args.segment = [64], 1, 16
    return args


def subjects(args: argparse.Namespace, inputs: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The forward of each implementation on query, key and value."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_evomoe.model.attention import PackedSegments, SdpaAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.heads * args.size,
        num_attention_heads=args.heads,
        num_query_groups=args.groups,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bf16=args.precision == "bf16",
        params_dtype=measure.DTYPES[args.precision],
    )
    core, ours = (
        cls(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
        for cls in (DotProductAttention, SdpaAttention)
    )
    positions = len(inputs[0])
    lengths = [args.segment] * (positions // args.segment) + [positions % args.segment]
    packed = PackedSegments.of([n for n in lengths if n], inputs[0].device, thd=False)
    return {
        CORE: lambda: core(*inputs, None),
        OURS: lambda: ours(*inputs, None),
        SEGMENTS: lambda: ours(*inputs, None, packed_seq_params=packed),
    }


def measure_positions(args: argparse.Namespace, positions: int) -> list[list[str]]:
    """Table rows for rows of so many positions."""
    options: dict[str, Any] = dict(device=backend.device(), dtype=measure.DTYPES[args.precision])
    inputs = [
        torch.randn(positions, 1, heads, args.size, **options).requires_grad_()
        for heads in (args.heads, args.groups, args.groups)
    ]
    forwards = subjects(args, inputs)
    gradient = torch.randn(positions, 1, args.heads * args.size, **options)
    runs = {name: functools.partial(_run, forward, gradient) for name, forward in forwards.items()}
    forget = functools.partial(measure.forget_gradients, inputs)
    for run in runs.values():
        run()
    seconds = {
        name: statistics.median(s) for name, s in measure.alternate(runs, args.rounds, prepare=forget).items()
    }
    rows = []
    for name, run in runs.items():
        forget()
        rows.append(
            [
                str(positions),
                name,
                measure.shown(seconds[name], ".4g", 1e3),
                measure.shown(seconds[CORE] / seconds[name], ".2f"),
                measure.shown(measure.kept_bytes(forwards[name], inputs), ".1f", 2**-20),
                measure.shown(measure.peak_bytes(run, on_cpu=True), ".1f", 2**-20),
            ]
        )
    return rows


def _run(forward: Callable[[], Tensor], gradient: Tensor) -> None:
    forward().backward(gradient)


def main() -> None:
    args = parse_args()
    backend.prepare()
    backend.init_process_group(timeout_minutes=5)
    torch.set_num_threads(args.threads)
    from megatron_evomoe.config import from_mapping
    from megatron_evomoe.parallel import topology

    topology.initialize(from_mapping({}))
    topology.seed_everything(0)
    rows = [row for positions in args.positions for row in measure_positions(args, positions)]
    c = measure.circumstances()
    print(f"`{c['command']}`, {c['device']}, torch {c['versions']['torch']}, {args.precision}\n")
    print(measure.table(["positions", "attention", "ms", "faster by", "kept MiB", "peak MiB"], rows))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
