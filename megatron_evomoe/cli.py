"""``python -m megatron_evomoe COMMAND``: the table of commands, the parser, and how errors are shown.

Each command is a module in `megatron_evomoe.commands`. Only the module of the command that was asked for is
imported, so that light commands start at once and `doctor` runs where a dependency is missing.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NoReturn

from megatron_evomoe import __version__
from megatron_evomoe.errors import UserError


@dataclass(frozen=True)
class Command:
    """One line of the table. `make-shards` lives in ``megatron_evomoe/commands/make_shards.py``."""

    name: str
    help: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's flags to `parser`."""
        self._module().add_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Run the command and return its exit status."""
        return self._module().run(args)

    def _module(self) -> ModuleType:
        return importlib.import_module(f"megatron_evomoe.commands.{self.name.replace('-', '_')}")


COMMANDS = (
    Command("train", "train the stages of a configuration, under torchrun or as a single process"),
    Command("make-shards", "convert a LLaVA JSON file and an image folder to webdataset shards"),
    Command("inspect-data", "show samples as the model sees them, with the supervised text marked"),
    Command("plan", "rank the parallel layouts that fit a cluster: memory, communication, step time"),
    Command("doctor", "list versions and devices, and what is missing with its remedy"),
    Command("plot", "draw a run's figures from its JSONL files"),
    Command("evaluate", "score an exported model on a published benchmark with its official metric"),
    Command("generate", "answer a prompt with an exported model, or start a chat"),
    Command("convert-from-hf", "convert a Hugging Face model to a checkpoint to train on"),
    Command("convert-to-hf", "convert a checkpoint to a Hugging Face directory"),
)


class UsageError(UserError):
    """The command line cannot be parsed."""


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, because the usage text of `train` fills a screen."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists the arguments")

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Report arguments that the command does not have."""
        close = difflib.get_close_matches(
            unknown[0].split("=")[0], self._option_string_actions, n=1, cutoff=0.6
        )
        self.error(
            f"unrecognized arguments: {' '.join(unknown)}{f' (did you mean {close[0]}?)' if close else ''}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command and its arguments; None takes those of the process.

    Returns:
        The exit status: the command's own, or 2 after an error meant for users, which is printed as one line.
    """
    # tokenizers otherwise warns whenever a data worker is forked
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        command, args = _parse(sys.argv[1:] if argv is None else argv)
        return command.run(args)
    except (UserError, OSError) as error:  # an OSError names the file and what is wrong with it
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command that `argv` names, and its parsed arguments.

    Raises:
        UsageError: the command or an argument is unknown, missing or malformed.
    """
    parser = _Parser(
        prog="python -m megatron_evomoe",
        description="EvoMoE on megatron-core.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=22),
    )
    parser.add_argument("--version", action="version", version=f"megatron_evomoe {__version__}")
    parsers = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands", parser_class=_Parser
    )
    for command in COMMANDS:
        # without abbreviations, which a new flag could make ambiguous or change in meaning
        sub = parsers.add_parser(
            command.name, help=command.help, description=command.help, allow_abbrev=False
        )
        sub.set_defaults(command=command, parser=sub)
        if argv and argv[0] == command.name:
            command.add_arguments(sub)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.refuse(unknown)
    return args.command, args
