"""The modules that are imported before tests/programs.py forks the tests' processes."""

# multiprocessing imports the main module, which is pytest, again in every process
import pytest  # noqa: F401

from megatron_evomoe.parallel import backend

backend.prepare()

import megatron_evomoe.cli  # noqa: E402
import megatron_evomoe.train.loop  # noqa: E402, F401
