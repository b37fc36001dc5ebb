"""Shared by all tests: megatron-core made importable, and one-process groups for tests of single modules."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_evomoe.parallel import backend

if not backend.on_gpu():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # Triton reads it when it is first imported, which megatron-core does below
    )
backend.prepare()
torch.set_num_threads(1)


ROWS = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def row(pytestconfig):
    """Call it with a line of a table that the run shows at its end, whatever it does with the tests'
    output.
    """
    return pytestconfig.stash.setdefault(ROWS, []).append


def pytest_terminal_summary(terminalreporter, config):
    """Measured rows, ready for `docs/`."""
    if config.stash.get(ROWS, None):
        terminalreporter.section("measured")
        for line in config.stash[ROWS]:
            terminalreporter.write_line(line)


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

    from megatron_evomoe.train.report import forget_auxiliary_losses

    forget_auxiliary_losses()
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
