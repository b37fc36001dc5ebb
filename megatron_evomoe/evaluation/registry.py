"""The benchmarks by name. A new one is a file with its reader and its metric, and a line here."""

from __future__ import annotations

from megatron_evomoe.evaluation.gqa import GQA
from megatron_evomoe.evaluation.item import Benchmark
from megatron_evomoe.evaluation.mmbench import MMBENCH
from megatron_evomoe.evaluation.mme import MME
from megatron_evomoe.evaluation.pope import POPE
from megatron_evomoe.evaluation.scienceqa import SCIENCEQA
from megatron_evomoe.evaluation.textvqa import TEXTVQA
from megatron_evomoe.evaluation.vqav2 import VQAV2

BENCHMARKS: dict[str, Benchmark] = {b.name: b for b in (POPE, MME, TEXTVQA, GQA, VQAV2, SCIENCEQA, MMBENCH)}
