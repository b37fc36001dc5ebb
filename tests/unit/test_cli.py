"""The table of commands, and how the command line ends."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_evomoe
from megatron_evomoe import cli, commands
from megatron_evomoe.errors import UserError

ROOT = Path(__file__).parents[2]


def module_of(command: cli.Command):
    return importlib.import_module(f"megatron_evomoe.commands.{command.name.replace('-', '_')}")


def test_the_table_names_every_command_module():
    modules = {module.name.replace("_", "-") for module in pkgutil.iter_modules(commands.__path__)}
    assert modules == {command.name for command in cli.COMMANDS}


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_one_form(command):
    module = module_of(command)
    assert str(inspect.signature(module.add_arguments)) == "(parser: 'argparse.ArgumentParser') -> 'None'"
    first, *others = inspect.signature(module.run).parameters.values()
    assert str(first) == "args: 'argparse.Namespace'"
    assert all(other.default is not other.empty for other in others)
    assert module.__doc__.startswith(f"``{command.name}``: ")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    # argparse raises here if a help text has a % that it cannot format.
    assert parser.format_help()


def test_help_shows_the_table(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert all(f"{command.name} {command.help}" in printed for command in cli.COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"megatron_evomoe {megatron_evomoe.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["plot"], "the following arguments are required: --run"),
        (["plot", "--run", "x", "--ouptut", "y"], "--ouptut y (did you mean --output?)"),
        (["plot", "--ru", "x"], "the following arguments are required: --run"),  # abbreviations are refused
        (["plan", "--nnodes", "0"], "argument --nnodes: must be at least 1, got 0"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(argv, message, capsys):
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize("error", [UserError("a = 1, at least 2"), FileNotFoundError("no file x")])
def test_errors_for_users_are_one_line_and_status_2(error, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr("megatron_evomoe.commands.doctor.run", fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail(args):
        raise ValueError("a mistake in the program")

    monkeypatch.setattr("megatron_evomoe.commands.doctor.run", fail)
    with pytest.raises(ValueError, match="a mistake in the program"):
        cli.main(["doctor"])


def test_errors_for_users_have_one_base():
    from megatron_evomoe.checkpoint.record import CheckpointError
    from megatron_evomoe.config import ConfigError
    from megatron_evomoe.data.errors import DataError
    from megatron_evomoe.evaluation.item import BenchmarkError
    from megatron_evomoe.generate.loading import ModelError

    for kind in (CheckpointError, ConfigError, DataError, BenchmarkError, ModelError, cli.UsageError):
        assert issubclass(kind, UserError)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        # `doctor` reports missing packages, so it must start without them.
        ("megatron_evomoe.cli, megatron_evomoe.commands.doctor", "pydantic yaml numpy torch transformers"),
        ("megatron_evomoe.commands.train, megatron_evomoe.commands.plan", "torch transformers"),
        ("megatron_evomoe.hf", "torch transformers"),
        ("megatron_evomoe.commands.convert_from_hf, megatron_evomoe.commands.convert_to_hf", "transformers"),
    ],
)
def test_light_imports(modules, absent):
    code = f"import sys, {modules}; print(*sys.modules.keys() & set({absent.split()!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", ["convert-from-hf", "convert-to-hf", "make-shards"])
def test_tools_are_the_same_commands(name, tmp_path):
    tool = ROOT / "tools" / f"{name.replace('-', '_')}.py"
    help_of = [
        subprocess.run([sys.executable, *start, "--help"], cwd=folder, capture_output=True, text=True)
        for start, folder in (([str(tool)], tmp_path), (["-m", "megatron_evomoe", name], ROOT))
    ]
    assert help_of[0].returncode == 0 and help_of[0].stdout == help_of[1].stdout
