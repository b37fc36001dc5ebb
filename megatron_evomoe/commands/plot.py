"""``plot``: draw a run's figures from its JSONL files. Neither the model nor the data is needed."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_evomoe.config import ConfigError
from megatron_evomoe.diagnose.plots import plot_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory: where metrics.jsonl lies")
    parser.add_argument("--output", metavar="DIR", help="where the PNG files go (default: DIR/figures)")


def run(args: argparse.Namespace) -> int:
    """Draw the figures and print their paths; returns 1 if there is nothing to draw."""
    try:
        paths = plot_all(args.run, args.output or Path(args.run) / "figures")
    except (ValueError, RuntimeError) as error:  # a damaged line, or matplotlib is missing
        raise ConfigError(str(error)) from error
    for path in paths:
        print(path)
    return 0 if paths else 1
