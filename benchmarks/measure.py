"""Parts that the benchmarks share: circumstances, rounds, memory, ceilings and tables."""

from __future__ import annotations

import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Clock = Callable[[], float]

DATA_SHEET_TFLOPS: dict[str, dict[str, float]] = {
    "GH200": {"bf16": 989, "fp8": 1979},
    "H200": {"bf16": 989, "fp8": 1979},
    "H100 NVL": {"bf16": 835, "fp8": 1671},
    "H100 PCIe": {"bf16": 756, "fp8": 1513},
    "H100": {"bf16": 989, "fp8": 1979},
    "A100": {"bf16": 312},
}
"""Peak TFLOP/s from NVIDIA's data sheets, without sparsity.

The first key that the device's name contains is used.
"""


def synchronize() -> None:
    """Wait until the GPU has finished, if there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def device_name() -> str:
    """Name of the GPU, or the CPU's number of cores and architecture."""
    return torch.cuda.get_device_name() if ON_GPU else f"{os.cpu_count()}-core CPU, {platform.machine()}"


def data_sheet_tflops(precision: str) -> float | None:
    """The device's peak TFLOP/s; None if the device or the precision is not in the list."""
    name = device_name()
    return next(
        (peaks.get(precision) for key, peaks in DATA_SHEET_TFLOPS.items() if ON_GPU and key in name), None
    )


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


def alternate(
    actions: dict[str, Callable[[], Any]],
    rounds: int,
    *,
    prepare: Callable[[], Any] = lambda: None,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each action in each of `rounds` rounds.

    Every action runs once per round, so that other load on the machine slows all of them alike. `prepare`
    runs before every action and is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            prepare()
            synchronize()
            started = clock()
            action()
            synchronize()
            seconds[name].append(clock() - started)
    return seconds


def working(actions: dict[str, Callable[[], Any]], skipped: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """The actions that run without an error.

    Each action runs twice here, because the first runs compile and should not be measured. Actions that fail
    are added to `skipped` with their error.
    """
    found = {}
    for name, action in actions.items():
        try:
            action()
            action()
            synchronize()
        except Exception as error:  # compilers raise many types, and the other actions are still measured
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            found[name] = action
    return found


def forget_gradients(leaves: Iterable[Tensor]) -> None:
    """Remove gradients, as at the start of a step."""
    for leaf in leaves:
        leaf.grad = None


def allocated() -> int:
    """Bytes of live tensors on the GPU; 0 on a CPU, where torch does not count them."""
    return torch.cuda.memory_allocated() if ON_GPU else 0


def peak_bytes(action: Callable[[], Any], *, on_cpu: bool = False) -> int | None:
    """Largest number of bytes that `action` allocates above what is allocated when it starts.

    On a CPU it is None, or the profiler's count with `on_cpu`.
    """
    if not ON_GPU:
        return _profiled_peak_bytes(action) if on_cpu else None
    torch.cuda.reset_peak_memory_stats()
    before = allocated()
    action()
    return torch.cuda.max_memory_allocated() - before


def _profiled_peak_bytes(action: Callable[[], Any]) -> int:
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        action()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    steps = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate(size for _, size in steps))


def kept_bytes(forward: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """Bytes that the graph holds between forward and backward, without `own` (inputs and weights).

    Every layer of a model adds these bytes.
    """
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    del output
    return sum(size for pointer, size in saved.items() if pointer not in known)


def gemm_tflops(
    precision: str, size: int | None = None, rounds: int = 20, clock: Clock = time.perf_counter
) -> float | None:
    """Measured TFLOP/s of one square matrix product, a ceiling for models made of them.

    fp32 is measured without TF32. The factors are random, because zeros switch fewer transistors and run
    faster, and three sets of them take turns. None for FP8 where torch or the device has no FP8 product.
    """
    size = size or (8192 if ON_GPU else 1024)
    try:
        products = [_product(precision, size) for _ in range(3)]
        for product in products:
            product()
    except (RuntimeError, AttributeError, ValueError):
        return None
    return 2 * size**3 / _median_in_turn(products, rounds, clock) / 1e12


def _product(precision: str, size: int) -> Callable[[], Any]:
    device = "cuda" if ON_GPU else "cpu"
    a, b = (
        torch.randn(size, size, device=device, dtype=DTYPES.get(precision, torch.bfloat16)) for _ in range(2)
    )
    if precision in DTYPES:
        return lambda: a @ b
    if not ON_GPU:
        raise ValueError("FP8 is measured on GPUs only")
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
    return lambda: torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def copy_gbytes(size: int | None = None, rounds: int = 20, clock: Clock = time.perf_counter) -> float:
    """GB/s, read and written together, of copying `size` bytes in the device's memory.

    Three pairs of tensors, larger than caches, take turns.
    """
    size, device = size or (2**30 if ON_GPU else 2**27), "cuda" if ON_GPU else "cpu"
    pairs = [(torch.empty(size // 4, device=device), torch.randn(size // 4, device=device)) for _ in range(3)]
    copies = [lambda to=to, source=source: to.copy_(source) for to, source in pairs]
    for copy in copies:
        copy()
    return 2 * size / _median_in_turn(copies, rounds, clock) / 1e9


def _median_in_turn(actions: Sequence[Callable[[], Any]], rounds: int, clock: Clock) -> float:
    found = alternate({str(i): action for i, action in enumerate(actions)}, rounds, clock=clock)
    return statistics.median(itertools.chain(*found.values()))


def ceilings(
    precisions: Sequence[str], clock: Clock = time.perf_counter
) -> dict[str, dict[str, float | None]]:
    """Measured matrix product and data sheet peak of each precision, in TFLOP/s."""
    return {
        p: {"gemm_tflops": gemm_tflops(p, clock=clock), "data_sheet_tflops": data_sheet_tflops(p)}
        for p in precisions
    }


def ratio(a: float | None, b: float | None) -> float | None:
    """The quotient a / b, or None if one is unknown or b is 0."""
    return a / b if a is not None and b else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value: float | None, form: str = ".1f", scale: float = 1.0) -> str:
    """A number as text, or a dash if it was not measured."""
    return "–" if value is None else format(value * scale, form)
