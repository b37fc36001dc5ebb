"""The environment variables that make a GPU's libraries deterministic. No GPU is needed."""

from __future__ import annotations

import argparse
import os

import pytest

from megatron_evomoe.commands import train
from megatron_evomoe.config import ConfigError
from megatron_evomoe.parallel import backend

VARIABLES = ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


@pytest.fixture
def environment(monkeypatch):
    """The environment, without these variables and as if there were a GPU."""
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    monkeypatch.setattr(os, "environ", environment)
    return environment


def test_variables_are_set(environment):
    backend.choose_deterministic_kernels()
    assert [environment[name] for name in VARIABLES] == ["0", ":4096:8", "^NVLS"]
    backend.choose_deterministic_kernels()  # accepts its own


def test_what_is_deterministic_already_is_kept(environment):
    environment.update(CUBLAS_WORKSPACE_CONFIG=":16:8", NCCL_ALGO="Ring")
    backend.choose_deterministic_kernels()
    assert [environment[name] for name in VARIABLES] == ["0", ":16:8", "Ring"]


@pytest.mark.parametrize("name", VARIABLES)
def test_what_is_not_deterministic_is_refused(environment, name):
    environment[name] = "1"
    with pytest.raises(ConfigError, match=f"deterministic_mode, but the environment has {name}=1; unset it"):
        backend.choose_deterministic_kernels()


def test_nothing_is_set_without_a_gpu(environment, monkeypatch):
    monkeypatch.setattr(backend, "on_gpu", lambda: False)
    environment["NCCL_ALGO"] = "NVLS"
    backend.choose_deterministic_kernels()
    assert [name for name in VARIABLES if name in environment] == ["NCCL_ALGO"]


@pytest.mark.parametrize(
    ("train_section", "route", "asked"),
    [("false", "false", False), ("false", "true", True), ("true", "true", True)],
)
def test_training_sets_them_first_if_any_stage_asks(
    environment, monkeypatch, tmp_path, train_section, route, asked
):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    monkeypatch.setattr(backend, "prepare", stop)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"preset: tiny\ntrain: {{deterministic_mode: {train_section}}}\n"
        f"stages: [{{name: align}}, {{name: route, deterministic_mode: {route}}}]\n"
    )
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    with pytest.raises(Stop):
        train.run(parser.parse_args(["--config", str(config)]))
    assert ("NCCL_ALGO" in environment) == asked
