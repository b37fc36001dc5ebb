"""Fixtures of all tests: data at a small size, configurations, and megatron-core's groups in one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_evomoe.parallel import backend
from tests.programs import ROOT
from tests.runs import four_stages


class MeasuredRows:
    """Collects the table rows that tests measured, in all pytest-xdist workers, and prints them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":  # only the report of a test's last phase carries all its properties
            self.lines += [value for name, value in report.user_properties if name == "row"]

    def pytest_terminal_summary(self, terminalreporter):
        if self.lines:
            terminalreporter.section("measured")
            for line in self.lines:
                terminalreporter.write_line(line)


def pytest_configure(config):
    config.pluginmanager.register(MeasuredRows())
    is_worker = hasattr(config, "workerinput")
    if config.getoption("numprocesses", None) and not is_worker:
        return  # under pytest-xdist the workers run the tests; this process only reports their results
    if not backend.on_gpu():
        # megatron-core, imported below, imports Triton, which reads this variable on its first import
        os.environ["TRITON_INTERPRET"] = "1"
    backend.prepare()
    torch.set_num_threads(1)


@pytest.fixture
def row(request):
    """Return a function that records a row of a table in `docs/`; all rows are printed at the end."""
    return lambda line: request.node.user_properties.append(("row", line))


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The folder of the quickstart's data at a small size, with its tokenizer."""
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    import build_data

    folder = tmp_path_factory.mktemp("digits")
    build_data.build(
        folder, 0, instruct_samples=200, caption_samples=40, heldout_samples=24, tower_pictures=16
    )
    return folder


@pytest.fixture(scope="session")
def tiny_yaml(digits):
    """A function that writes the configuration of `runs.four_stages` to a folder and returns its path."""

    def write(folder: Path, **changes: Any) -> Path:
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(four_stages(digits, folder, **changes)))
        return path

    return write


@pytest.fixture(scope="session")
def one_rank():
    """Initialise megatron-core for a single process (TP = PP = EP = 1) and seed its RNG tracker."""
    from megatron.core import parallel_state, tensor_parallel

    backend.init_process_group(timeout_minutes=1)
    parallel_state.initialize_model_parallel(1, 1)
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def clean_core():
    """Reset the auxiliary-loss state that megatron-core keeps per process.

    A test that trained would otherwise leave its loss scale behind for the next test.
    """
    from megatron.core.transformer.moe import moe_utils

    from megatron_evomoe.train.routing_metrics import forget_auxiliary_losses

    forget_auxiliary_losses()
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
