"""What the benchmarks of whole training steps share: circumstances, alternating rounds, memory, ceilings, tables."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()

DATA_SHEET_TFLOPS: dict[str, dict[str, float]] = {
    "GH200": {"bf16": 989, "fp8": 1979},
    "H200": {"bf16": 989, "fp8": 1979},
    "H100 NVL": {"bf16": 835, "fp8": 1671},
    "H100 PCIe": {"bf16": 756, "fp8": 1513},
    "H100": {"bf16": 989, "fp8": 1979},
    "A100": {"bf16": 312},
}
"""NVIDIA's data sheets, without sparsity; the first key that a device's name contains counts."""


def synchronize() -> None:
    """Wait for the device."""
    if ON_GPU:
        torch.cuda.synchronize()


def device_name() -> str:
    """The GPU's, or the CPU's cores and kind."""
    return torch.cuda.get_device_name() if ON_GPU else f"{os.cpu_count()}-core CPU, {platform.machine()}"


def data_sheet_tflops(precision: str) -> float | None:
    """The device's peak by its name; none for a device or precision that is not in the list."""
    name = device_name()
    return next((peaks.get(precision) for key, peaks in DATA_SHEET_TFLOPS.items() if ON_GPU and key in name), None)


def circumstances(**more: Any) -> dict[str, Any]:
    """Device, versions, commit and command of this run."""
    script = Path(sys.argv[0])
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    packages = ("torch", "megatron-core", "transformer-engine", "transformers", "triton")
    return {
        "command": " ".join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        "device": device_name(),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if ON_GPU else None,
        "cuda": torch.version.cuda if ON_GPU else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        **more,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def alternate(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action in each of `rounds` rounds; within a round all run once, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            synchronize()
            started = time.perf_counter()
            action()
            synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def allocated() -> int:
    """Bytes of live tensors on the GPU; 0 on a CPU, which does not count them."""
    return torch.cuda.memory_allocated() if ON_GPU else 0


def peak_bytes(action: Callable[[], Any]) -> int | None:
    """The most that `action` allocates above what is there when it starts; none on a CPU."""
    if not ON_GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = allocated()
    action()
    return torch.cuda.max_memory_allocated() - before


def gemm_tflops(precision: str, size: int | None = None, rounds: int = 20) -> float | None:
    """What one square matrix product reaches here, in TFLOP/s: the ceiling of a model made of them.

    Random numbers, since zeros switch fewer transistors and run faster; three sets in turn. None for FP8 where torch or the device
    has no product of it.
    """
    size = size or (8192 if ON_GPU else 256)
    try:
        products = [_product(precision, size) for _ in range(3)]
        for product in products:
            product()
    except (RuntimeError, AttributeError, ValueError):
        return None
    found = alternate({str(i): product for i, product in enumerate(products)}, rounds)
    return 2 * size**3 / statistics.median(itertools.chain(*found.values())) / 1e12


def _product(precision: str, size: int) -> Callable[[], Any]:
    device = "cuda" if ON_GPU else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    if precision == "bf16":
        return lambda: a @ b
    if not ON_GPU:
        raise ValueError("FP8 is measured on GPUs only")
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
    return lambda: torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def ceilings(precisions: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Per precision the measured matrix product and the data sheet, in TFLOP/s."""
    return {p: {"gemm_tflops": gemm_tflops(p), "data_sheet_tflops": data_sheet_tflops(p)} for p in precisions}


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b where both are known."""
    return a / b if a is not None and b else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value: float | None, form: str = ".1f", scale: float = 1.0) -> str:
    """A number as text; a dash for one that was not measured."""
    return "–" if value is None else format(value * scale, form)
