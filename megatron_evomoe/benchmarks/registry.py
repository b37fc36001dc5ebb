"""Benchmarks by name. A new one is a file with its reader and its metric, and a line here."""

from __future__ import annotations

from megatron_evomoe.benchmarks.gqa import GQA
from megatron_evomoe.benchmarks.item import Benchmark
from megatron_evomoe.benchmarks.mmbench import MMBENCH
from megatron_evomoe.benchmarks.mme import MME
from megatron_evomoe.benchmarks.pope import POPE
from megatron_evomoe.benchmarks.scienceqa import SCIENCEQA
from megatron_evomoe.benchmarks.textvqa import TEXTVQA
from megatron_evomoe.benchmarks.vqav2 import VQAV2

BENCHMARKS: dict[str, Benchmark] = {b.name: b for b in (POPE, MME, TEXTVQA, GQA, VQAV2, SCIENCEQA, MMBENCH)}
