"""``plan``: rank the parallel layouts of a run that fit a cluster."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path

from megatron_evomoe.config import RunConfig, add_flags, flags_from, load_config
from megatron_evomoe.config.arguments import number, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--config",
        help="YAML file; flags take precedence, and a degree given as a flag is kept in all layouts",
    )
    parser.add_argument("--preset", dest="cfg_preset", help="named model shape")
    parser.add_argument("--stage", action="append", help="plan only this stage (may be given several times)")
    parser.add_argument("--nnodes", type=whole(1, 65536), required=True, help="nodes")
    parser.add_argument("--gpus-per-node", type=whole(1, 1024), default=8, help="GPUs per node (default 8)")
    parser.add_argument(
        "--gpu-memory", type=number(0, 1e6, above=True), default=80, help="GiB per GPU (default 80)"
    )
    parser.add_argument(
        "--headroom",
        type=number(0, 0.99),
        default=0.1,
        help="share of the memory to leave free (default 0.1)",
    )
    parser.add_argument(
        "--tflops", type=number(0, above=True), default=400, help="sustained TFLOP/s of one GPU (default 400)"
    )
    parser.add_argument(
        "--intra-bandwidth",
        type=number(0, above=True),
        default=400,
        help="GB/s a GPU sends inside its node (default 400)",
    )
    parser.add_argument(
        "--inter-bandwidth",
        type=number(0, above=True),
        default=40,
        help="GB/s a GPU sends to other nodes (default 40)",
    )
    parser.add_argument(
        "--mean-tokens",
        type=whole(1, 2**24),
        help="tokens per sample for the estimates of time and traffic (default: "
        "seq_length, which memory estimates always use)",
    )
    parser.add_argument(
        "--lengths",
        metavar="FILE",
        help="file of the samples' lengths, .evomoe-lengths-… beside the first shard, for the same "
        "estimates; takes the place of --mean-tokens, and knows the padding and the slowest replica",
    )
    parser.add_argument("--top", type=whole(0), default=5, help="layouts printed per stage (default 5)")
    parser.add_argument("--json", help="file for the whole result as JSON")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns 1 if a stage fits under no layout.

    Raises:
        ConfigError: the configuration is inconsistent, or neither a vocabulary size nor a tokenizer is given.
        DataError: the file of lengths is missing or damaged.
    """
    from megatron_evomoe.parallel import backend

    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    backend.prepare()  # before megatron-core is imported, whose own checks are part of the plan
    from megatron_evomoe.data.lengths_file import read_lengths
    from megatron_evomoe.plan import report, search
    from megatron_evomoe.plan.layout import LAYOUT_FLAGS
    from megatron_evomoe.plan.step_time import Machine
    from megatron_evomoe.plan.work import SampleLengths

    flags = flags_from(args)
    config = _with_vocabulary(load_config(args.config, flags))
    machine = Machine(
        nnodes=args.nnodes,
        gpus_per_node=args.gpus_per_node,
        gpu_memory=args.gpu_memory,
        headroom=args.headroom,
        tflops=args.tflops,
        intra_bandwidth=args.intra_bandwidth,
        inter_bandwidth=args.inter_bandwidth,
    )
    held = {LAYOUT_FLAGS[name]: value for name, value in flags.items() if name in LAYOUT_FLAGS}
    if "recompute" in held:
        held["recompute"] = held["recompute"] or "none"
    known = None if args.lengths is None else read_lengths(Path(args.lengths))
    lengths = SampleLengths(mean=args.mean_tokens, known=known)
    plans = [
        search.plan_stage(config, stage, machine, held, lengths)
        for stage in search.stages_of(config, args.stage)
    ]
    for line in report.lines(plans, machine, args.top):
        print(line)
    if args.json:
        Path(args.json).write_text(json.dumps(report.as_data(plans, machine)))
    return int(not all(plan.fits for plan in plans))


def _with_vocabulary(config: RunConfig) -> RunConfig:
    """Take the vocabulary size from the tokenizer if the configuration does not give it, as training does."""
    if config.language.vocab_size is not None or not config.data.tokenizer:
        return config
    from megatron_evomoe.data.tokenizer import build_tokenizer

    size = build_tokenizer(config.data.tokenizer).vocab_size
    return replace(config, language=replace(config.language, vocab_size=size))
