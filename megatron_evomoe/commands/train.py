"""``train``: train the stages of a configuration, under torchrun or as a single process.

torch is imported once the configuration is known to be good, so that ``--help`` and mistakes are answered at
once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from megatron_evomoe.config import RunConfig, add_flags, flags_from, load_config
from megatron_evomoe.train.hooks import StepHook

_JOIN_MINUTES = 1
"""How long a rank that cannot read its configuration waits for the others, to tell them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags, and one for every configuration field."""
    parser.add_argument("--config", help="YAML file; flags take precedence over it")
    parser.add_argument("--stage", action="append", help="run only this stage (may be given several times)")
    parser.add_argument("--preset", dest="cfg_preset", help="named model shape")
    add_flags(parser)


def run(args: argparse.Namespace, hooks: Sequence[StepHook] = ()) -> int:
    """Train, and return the exit status, which is the same on every rank.

    Args:
        hooks: code of the caller that runs at the moments of every stage (examples/train_with_hook.py).

    Raises:
        ConfigError: the configuration cannot be read or is inconsistent.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core.*|torch\.distributed.*|wandb.*")
    try:
        config = load_config(args.config, flags_from(args))
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            _tell_other_ranks(error)
        raise
    import torch.distributed as dist

    from megatron_evomoe.parallel import backend

    if any(config.for_stage(stage.name).train.deterministic_mode for stage in config.stages):
        backend.choose_deterministic_kernels()
    backend.prepare()
    backend.init_process_group(config.parallel.distributed_timeout_minutes)
    try:
        status = _train(config, args.stage, hooks)
        if status and dist.get_world_size() > 1:
            sys.stdout.flush()
            os._exit(status)  # an orderly exit would wait for ranks that have already gone
        return status
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _tell_other_ranks(error: Exception) -> None:
    """Join the other ranks and report `error` to them.

    Where one node alone cannot read its configuration, the ranks of the other nodes would otherwise wait for
    this one until their timeout.
    """
    from megatron_evomoe.parallel import backend

    backend.prepare()  # before megatron-core is imported
    from megatron_evomoe.train import alarm

    try:
        backend.init_process_group(_JOIN_MINUTES)
        with alarm.Alarm(None):
            raise error
    except alarm.RankFailedError as told:
        sys.stdout.flush()
        os._exit(told.status)
    except Exception:
        return  # the others did not join either: each of them has met the same error


def _train(config: RunConfig, stages: list[str] | None, hooks: Sequence[StepHook]) -> int:
    """Train and return the exit status. A failure of any rank has been printed when this returns."""
    from megatron_evomoe.train import alarm
    from megatron_evomoe.train.loop import train
    from megatron_evomoe.train.session import run_folder

    try:
        train(config, stages, hooks)
        return 0
    except alarm.RankFailedError as error:
        return error.status
    except (Exception, KeyboardInterrupt) as error:  # of a single process, which runs without an alarm
        return alarm.tell(alarm.failure_of(error, run_folder(config)), error).status
