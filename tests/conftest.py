"""Shared by all tests: megatron-core made importable, and one-process groups for tests of single modules."""

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
    """Shows the rows that tests measured when the run ends; pytest-xdist's workers hand them over."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":  # the last report of a test has the properties of all
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
        return  # pytest-xdist's workers run the tests, and this process only shows what becomes of them
    if not backend.on_gpu():
        # Triton reads this when it is first imported, which megatron-core does below
        os.environ["TRITON_INTERPRET"] = "1"
    backend.prepare()
    torch.set_num_threads(1)


@pytest.fixture
def row(request):
    """A function that takes a row of a table in `docs/`, to be shown when the run ends."""
    return lambda line: request.node.user_properties.append(("row", line))


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The quickstart's data at a small size, with its tokenizer."""
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    import build_data

    folder = tmp_path_factory.mktemp("digits")
    build_data.build(
        folder, 0, instruct_samples=200, caption_samples=40, heldout_samples=24, tower_pictures=16
    )
    return folder


@pytest.fixture(scope="session")
def tiny_yaml(digits):
    """A function that writes the configuration of `runs.four_stages` into a folder and returns its path."""

    def write(folder: Path, **changes: Any) -> Path:
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(four_stages(digits, folder, **changes)))
        return path

    return write


@pytest.fixture(scope="session")
def one_rank():
    """A world of one with megatron-core's groups (TP = PP = EP = 1) and its RNG tracker seeded."""
    from megatron.core import parallel_state, tensor_parallel

    backend.init_process_group(timeout_minutes=1)
    parallel_state.initialize_model_parallel(1, 1)
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def clean_core():
    """Forget what megatron-core keeps per process of its auxiliary losses: a test that trained would leave
    its scale behind.
    """
    from megatron.core.transformer.moe import moe_utils

    from megatron_evomoe.train.routing_metrics import forget_auxiliary_losses

    forget_auxiliary_losses()
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
