"""Marks that skip a GPU test, with the reason, where its requirements are missing."""

from __future__ import annotations

import importlib.util

import pytest

from megatron_evomoe.parallel import backend

FIRST_WITH_FP8 = (8, 9)

cuda = pytest.mark.skipif(not backend.on_gpu(), reason="there is no GPU")
transformer_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
fp8 = pytest.mark.skipif((backend.capability() or (0, 0)) < FIRST_WITH_FP8, reason="there is no GPU with FP8")
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
