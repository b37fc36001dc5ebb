"""What the processes that tests fork have imported already (tests/programs.py)."""

import pytest  # noqa: F401 - the module that pytest was started as is imported again in every process

from megatron_evomoe.parallel import backend

backend.prepare()

import megatron_evomoe.cli  # noqa: E402
import megatron_evomoe.train.loop  # noqa: E402, F401
