"""Time and memory of one router layer, forward and backward, beside one frozen expert FFN of the same width.

    python benchmarks/router.py                                   # the main case: T=1024, C=2048, h=r=16
    python benchmarks/router.py --tokens 512 2048 --rank 8 16 32 --output router.json
    python benchmarks/router.py --device cuda --dtype bf16 --tokens 4096 16384

Every combination of --tokens, --width, --hidden and --rank is a row. In each round all subjects run once, in turn, so that a
busy machine slows all alike; figures are medians over rounds. Peak memory is that above inputs and weights, gradients included;
kept memory is what the graph holds between forward and backward.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_evomoe.moe import dtr

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SUBJECTS = {
    "linear": "one linear map, in fp32",
    "naive": "DTR as its equations read, Θ built for every token (naive_dtr_logits)",
    "naive-tuned": "the same with b2 folded into W2 and batched GEMMs: the fastest way found that still builds Θ",
    "autograd": "DTR factored, gather and projection left to autograd",
    "masked": "DTR factored, both hypernetworks on every token (dtr_logits(gather=False))",
    "factored": "DTR factored, as trained (dtr_logits)",
    "fused": "DTR on Triton kernels (dtr_triton.dtr_logits); with --device cuda only",
    "ffn": "one frozen SwiGLU expert, backward to its input only",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="type of tokens and weights; DTR computes in fp32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], metavar="T")
    parser.add_argument("--width", type=int, nargs="+", default=[2048], metavar="C")
    parser.add_argument("--hidden", type=int, nargs="+", default=[16], metavar="h")
    parser.add_argument("--rank", type=int, nargs="+", default=[16], metavar="r")
    parser.add_argument("--experts", type=int, default=4, metavar="N")
    parser.add_argument("--ffn", type=int, default=5504, help="inner width of the expert, for every C")
    parser.add_argument("--vision-share", type=float, default=0.5, help="share of image tokens, scattered at random")
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: this process's CPU time, for a busy machine; with --threads 1"
    )
    parser.add_argument("--output", type=Path, help="write figures and circumstances as JSON")
    return parser.parse_args()


def missing(subject: str, device: str) -> str | None:
    """Why a subject cannot be measured here."""
    if subject != "fused":
        return None
    if device != "cuda":
        return "its kernels need a GPU"
    return None if importlib.util.find_spec("triton") else "Triton does not import"


def fused_logits(z_TC: Tensor, is_vision_T: Tensor, weights: dtr.DtrWeights) -> Tensor:
    from megatron_evomoe.moe import dtr_triton  # imports Triton

    return dtr_triton.dtr_logits(z_TC, is_vision_T, weights)


def autograd_logits(z_TC: Tensor, is_vision_T: Tensor, weights: dtr.DtrWeights) -> Tensor:
    """`dtr.dtr_logits` without its hand-written backward: what that is worth."""
    halves, indices = [], [(~is_vision_T).nonzero()[:, 0], is_vision_T.nonzero()[:, 0]]
    for index, hyper in zip(indices, (weights.text, weights.vision), strict=True):
        hyper = dtr.HyperWeights(*(w.float() for w in hyper))
        z = z_TC[index].float()
        projected = F.linear(z, hyper.weight1_hC), F.linear(z, hyper.weight2_down_KJC.flatten(0, 1))
        halves.append(dtr._logits(*projected, hyper, weights.phi_NC.float(), "none"))
    logits = torch.cat(halves)
    return torch.empty_like(logits).index_copy(0, torch.cat(indices), logits)


def naive_tuned_logits(z_TC: Tensor, is_vision_T: Tensor, weights: dtr.DtrWeights) -> Tensor:
    """`dtr.naive_dtr_logits`, made as fast as it gets without giving up Θ."""
    halves, indices = [], [(~is_vision_T).nonzero()[:, 0], is_vision_T.nonzero()[:, 0]]
    for index, hyper in zip(indices, (weights.text, weights.vision), strict=True):
        hyper = dtr.HyperWeights(*(w.float() for w in hyper))
        K, J, C = hyper.weight2_down_KJC.shape
        z = z_TC[index].float()
        e_TK = F.pad(F.linear(z, hyper.weight1_hC, hyper.bias1_h), (0, 1), value=1.0)
        down_TJC = (e_TK @ hyper.weight2_down_KJC.view(K, -1)).view(-1, J, C)
        up_TrC = (e_TK @ hyper.weight2_up_KrC.view(K, -1)).view(-1, J // 2, C)
        s_Tr = dtr._swiglu(torch.bmm(down_TJC, z[:, :, None])[:, :, 0])
        halves.append(F.linear(torch.bmm(s_Tr[:, None], up_TrC)[:, 0], weights.phi_NC.float()))
    logits = torch.cat(halves)
    return torch.empty_like(logits).index_copy(0, torch.cat(indices), logits)


def make_subjects(args: argparse.Namespace, T: int, C: int, h: int, r: int) -> tuple[dict, list[Tensor], list[Tensor]]:
    """Name -> forward, all tensors that gather gradients, and those that do not."""
    torch.manual_seed(0)
    options = dict(device=args.device, dtype=DTYPES[args.dtype])

    def parameter(*shape: int) -> Tensor:
        return (torch.randn(*shape, **options) * C**-0.5).requires_grad_()

    def hyper() -> dtr.HyperWeights:
        return dtr.HyperWeights(parameter(h, C), parameter(h), parameter(h + 1, 2 * r, C), parameter(h + 1, r, C))

    weights = dtr.DtrWeights(hyper(), hyper(), parameter(args.experts, C))
    dtr.init_dtr(weights, phi_std=0.02)
    z, gate = torch.randn(T, C, **options).requires_grad_(), parameter(args.experts, C)
    is_vision = torch.rand(T, device=args.device) < args.vision_share
    fc1, fc2 = parameter(2 * args.ffn, C).detach(), parameter(C, args.ffn).detach()
    forwards = {
        "linear": lambda: F.linear(z.float(), gate.float()),
        "naive": lambda: dtr.naive_dtr_logits(z, is_vision, weights),
        "naive-tuned": lambda: naive_tuned_logits(z, is_vision, weights),
        "autograd": lambda: autograd_logits(z, is_vision, weights),
        "masked": lambda: dtr.dtr_logits(z, is_vision, weights, gather=False),
        "factored": lambda: dtr.dtr_logits(z, is_vision, weights),
        "fused": lambda: fused_logits(z, is_vision, weights),
        "ffn": lambda: F.linear(dtr._swiglu(F.linear(z, fc1)), fc2),
    }
    return {name: forwards[name] for name in args.subjects}, [z, gate, *weights.text, *weights.vision, weights.phi_NC], [fc1, fc2]


def run_once(forward: Callable[[], Tensor], leaves: list[Tensor], device: str, clock: Callable = time.perf_counter) -> float:
    """Seconds of one forward and backward, by `clock`."""
    for leaf in leaves:
        leaf.grad = None
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    output = forward()
    output.backward(torch.ones_like(output))
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(forward: Callable[[], Tensor], leaves: list[Tensor], device: str) -> int:
    """Largest sum of live allocations that one forward and backward makes."""
    for leaf in leaves:
        leaf.grad = None
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(forward, leaves, device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run_once(forward, leaves, device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    steps = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate(size for _, size in steps))


def kept_bytes(forward: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """What the graph holds between forward and backward, beside inputs and weights: the cost that every layer adds up."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    del output
    return sum(size for pointer, size in saved.items() if pointer not in own)


def measure(args: argparse.Namespace, T: int, C: int, h: int, r: int) -> dict:
    forwards, leaves, frozen = make_subjects(args, T, C, h, r)
    for forward in forwards.values():
        run_once(forward, leaves, args.device)
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(args.rounds):
        for name, forward in forwards.items():
            seconds[name].append(run_once(forward, leaves, args.device, CLOCKS[args.clock]))
    return {
        "T": T, "C": C, "h": h, "r": r,
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "milliseconds_range": {name: [1e3 * min(values), 1e3 * max(values)] for name, values in seconds.items()},
        "peak_mib": {name: peak_bytes(forward, leaves, args.device) / 2**20 for name, forward in forwards.items()},
        "kept_mib": {name: kept_bytes(forward, leaves + frozen) / 2**20 for name, forward in forwards.items()},
    }  # fmt: skip


def markdown(rows: list[dict], subjects: list[str]) -> str:
    """One table: milliseconds (peak MiB, kept MiB); two ratios at the end."""
    header = ["T", "C", "h", "r", *subjects, "naive-tuned ÷ factored", "factored ÷ ffn"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        time_of = row["milliseconds"]
        cells = [str(row[key]) for key in "TChr"]
        cells += [f"{time_of[name]:.1f} ({row['peak_mib'][name]:.0f}, {row['kept_mib'][name]:.0f})" for name in subjects]
        cells.append(f"{time_of['naive-tuned'] / time_of['factored']:.1f}" if {"naive-tuned", "factored"} <= set(subjects) else "")
        cells.append(f"{100 * time_of['factored'] / time_of['ffn']:.1f} %" if {"ffn", "factored"} <= set(subjects) else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def circumstances(args: argparse.Namespace) -> dict:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return {
        "command": " ".join(["python", "benchmarks/router.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()}-core CPU, {platform.machine()}",
        "threads": args.threads, "clock": args.clock, "dtype": args.dtype, "rounds": args.rounds,
        "experts": args.experts, "ffn": args.ffn, "vision_share": args.vision_share,
        "torch": torch.__version__, "python": platform.python_version(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
    }  # fmt: skip


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    skipped = {name: reason for name in args.subjects if (reason := missing(name, args.device))}
    args.subjects = [name for name in args.subjects if name not in skipped]
    for name, reason in skipped.items():
        print(f"{name} is skipped: {reason}\n")
    rows = [measure(args, *shape) for shape in itertools.product(args.tokens, args.width, args.hidden, args.rank)]
    subjects = {name: SUBJECTS[name] for name in args.subjects}
    report = {"circumstances": circumstances(args), "subjects": subjects, "skipped": skipped, "rows": rows}
    print("Milliseconds, forward and backward (peak MiB, MiB kept for the backward)\n")
    print(markdown(rows, args.subjects), "\n\n" + json.dumps(report["circumstances"], indent=1))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
