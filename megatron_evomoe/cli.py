"""``python -m megatron_evomoe COMMAND``. Each command imports what it needs, so that the light ones start at
once.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from megatron_evomoe.config import RunConfig

_JOIN_MINUTES = 1
COMMANDS = ("train", "make-shards", "inspect-data", "plan", "doctor", "plot", "evaluate", "generate")


class _UsageError(Exception):
    """Arguments that cannot be parsed."""


class _Parser(argparse.ArgumentParser):
    """An error is one line: the usage of a command with a flag for every field fills a screen."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}; {self.prog} --help lists the arguments")

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Arguments that nothing takes."""
        close = difflib.get_close_matches(
            unknown[0].split("=")[0], self._option_string_actions, n=1, cutoff=0.6
        )
        self.error(
            f"unrecognized arguments: {' '.join(unknown)}{f' (did you mean {close[0]}?)' if close else ''}"
        )


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn errors meant for users into one line and exit status 2."""
    parser = _Parser(prog="python -m megatron_evomoe", description="EvoMoE on megatron-core.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}", parser_class=_Parser
    )
    argv = sys.argv[1:] if argv is None else argv
    asked = argv[0] if argv else ""
    for name in COMMANDS:
        sub = commands.add_parser(
            name, help=_HELP[name], allow_abbrev=False
        )  # an abbreviation may mean another flag tomorrow
        if name == asked:
            sub.set_defaults(handler=_ADD[name](sub), parser=sub)
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            args.parser.refuse(unknown)
    except _UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return args.handler(args)
    except (*_user_errors(), OSError) as error:  # an OSError names the file and what is wrong with it
        print(f"error: {error}", file=sys.stderr)
        return 2


def _user_errors() -> tuple[type[Exception], ...]:
    from megatron_evomoe.checkpoint.record import CheckpointError
    from megatron_evomoe.config import ConfigError
    from megatron_evomoe.data.errors import DataError
    from megatron_evomoe.evaluation.item import BenchmarkError
    from megatron_evomoe.generate.loading import ModelError

    return ConfigError, CheckpointError, DataError, BenchmarkError, ModelError


def _add_train(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    from megatron_evomoe.config import add_flags

    parser.add_argument("--config", help="YAML file; flags win over it")
    parser.add_argument("--stage", action="append", help="run only this stage (may be given several times)")
    parser.add_argument("--preset", dest="cfg_preset", help="named model shape")
    add_flags(parser)
    return _train


def _train(args: argparse.Namespace) -> int:
    from megatron_evomoe.config import flags_from, load_config
    from megatron_evomoe.parallel import backend

    warnings.filterwarnings("ignore", module=r"megatron\.core.*|torch\.distributed.*|wandb.*")
    try:
        config = load_config(args.config, flags_from(args))
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            _tell_others(error)
        raise
    backend.prepare()
    import torch.distributed as dist

    backend.init_process_group(config.parallel.distributed_timeout_minutes)
    try:
        status = _train_all_or_none(config, args.stage)
        if status and dist.get_world_size() > 1:
            sys.stdout.flush()
            os._exit(status)  # leaving in order would wait for the ranks that are gone
        return status
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _tell_others(error: Exception) -> None:
    """A configuration that one node cannot read: the ranks of the others wait for this one to join, so join
    and say it.
    """
    from megatron_evomoe.parallel import backend

    backend.prepare()
    from megatron_evomoe.train import alarm

    try:
        backend.init_process_group(_JOIN_MINUTES)
        with alarm.Alarm(None):
            raise error
    except alarm.RankFailedError as told:
        sys.stdout.flush()
        os._exit(told.status)
    except Exception:
        return  # they did not come either, each with the same error


def _train_all_or_none(config: RunConfig, stages: list[str] | None) -> int:
    """The exit status, the same on every rank; what any rank failed of has been printed by all."""
    from megatron_evomoe.train import alarm
    from megatron_evomoe.train.loop import train
    from megatron_evomoe.train.session import run_folder

    try:
        train(config, stages)
        return 0
    except alarm.RankFailedError as error:
        return error.status
    except (Exception, KeyboardInterrupt) as error:  # alone in the world
        return alarm.tell(alarm.failure_of(error, run_folder(config)), error).status


def _add_make_shards(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    from megatron_evomoe.data import make_shards

    make_shards.add_arguments(parser)
    return make_shards.run


def _add_inspect_data(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    from megatron_evomoe.data import inspect

    inspect.add_arguments(parser)
    return inspect.run


def _add_plan(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    from megatron_evomoe.commands import plan

    plan.add_arguments(parser)
    return plan.run


def _add_plot(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    from megatron_evomoe.diagnose import plots

    plots.add_arguments(parser)
    return plots.run


def _add_doctor(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    from megatron_evomoe.commands import doctor

    doctor.add_arguments(parser)
    return doctor.run


def _add_evaluate(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    from megatron_evomoe.evaluation import benchmark_run

    benchmark_run.add_arguments(parser)
    return benchmark_run.run


def _add_generate(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    from megatron_evomoe.commands import generate

    generate.add_arguments(parser)
    return generate.run


_HELP = {
    "train": "run the stages of a configuration, under torchrun or alone",
    "make-shards": "LLaVA JSON and an image folder to webdataset shards",
    "inspect-data": "show decoded samples with the supervised span marked",
    "plan": "which layouts of a run fit a cluster: memory, communication, step time",
    "doctor": "versions, devices, and what is missing with its remedy",
    "plot": "draw a run's figures from its JSONL files",
    "evaluate": "a published benchmark's official metric of an exported model, under torchrun or alone",
    "generate": "an exported model's answer to a prompt and images, or a chat",
}
_ADD = {
    "train": _add_train,
    "make-shards": _add_make_shards,
    "inspect-data": _add_inspect_data,
    "plan": _add_plan,
    "doctor": _add_doctor,
    "plot": _add_plot,
    "evaluate": _add_evaluate,
    "generate": _add_generate,
}
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
