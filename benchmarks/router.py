"""Time, memory and work of one router layer, forward and backward, compared with one frozen expert FFN.

    python benchmarks/router.py                                   # the main case: T=1024, C=2048, h=r=16
    python benchmarks/router.py --tokens 512 2048 --rank 8 16 32 --output router.json
    python benchmarks/router.py --dtype bf16 --tokens 4096 16384

The FFN has the width of the router. The benchmark uses the GPU if there is one (CUDA_VISIBLE_DEVICES= hides
it). Every combination of --tokens, --width, --hidden and --rank is measured. All subjects run once per round,
so that other load on the machine slows all of them alike; times are medians over rounds. Peak memory is
counted above inputs and weights and includes gradients; kept memory is what the graph holds between forward
and backward. FLOP and bytes of each subject (router_work.py), divided by its time, are compared with a matrix
product and a copy that are measured first.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import measure
import router_work
from router_work import Shape

from megatron_evomoe.config import LanguageConfig, MoEConfig
from megatron_evomoe.moe.dtr import maths
from megatron_evomoe.moe.router import draw_router, router_tensors

DEVICE = "cuda" if measure.ON_GPU else "cpu"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SUBJECTS = {
    "linear": "one linear map, in fp32",
    "naive": "DTR as its equations read, Θ built for every token (naive_dtr_logits)",
    "naive-tuned": "the same with b2 folded into W2 and batched GEMMs: the fastest way found that still "
    "builds Θ",
    "autograd": "DTR factored, gather and projection left to autograd",
    "masked": "DTR factored, both hypernetworks on every token, as trained on a GPU "
    "(dtr_logits(gather=False))",
    "factored": "DTR factored, its own hypernetwork on every token, as trained on a CPU (dtr_logits)",
    "fused": "DTR on Triton kernels (dtr_triton.dtr_logits); on a GPU only",
    "ffn": "one frozen SwiGLU expert, backward to its input only",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtype",
        choices=list(measure.DTYPES),
        default="fp32",
        help="type of tokens and weights; all but `fused` and `ffn` compute in fp32",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], metavar="T")
    parser.add_argument("--width", type=int, nargs="+", default=[2048], metavar="C")
    parser.add_argument("--hidden", type=int, nargs="+", default=[16], metavar="h")
    parser.add_argument("--rank", type=int, nargs="+", default=[16], metavar="r")
    parser.add_argument("--experts", type=int, default=4, metavar="N")
    parser.add_argument("--ffn", type=int, default=5504, help="inner width of the expert, for every C")
    parser.add_argument(
        "--vision-share", type=float, default=0.5, help="share of image tokens, scattered at random"
    )
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: this process's CPU time, for a busy machine; with --threads 1",
    )
    parser.add_argument("--output", type=Path, help="write figures and circumstances as JSON")
    return parser.parse_args()


def missing(subject: str) -> str | None:
    """Reason why a subject cannot be measured here, if there is one."""
    if subject != "fused":
        return None
    if not measure.ON_GPU:
        return "its kernels need a GPU"
    return None if importlib.util.find_spec("triton") else "Triton does not import"


def fused_logits(z_TC: Tensor, is_vision_T: Tensor, weights: maths.DtrWeights) -> Tensor:
    from megatron_evomoe.moe.dtr import triton as dtr_triton  # imported here because it imports Triton

    return dtr_triton.dtr_logits(z_TC, is_vision_T, weights)


def autograd_logits(z_TC: Tensor, is_vision_T: Tensor, weights: maths.DtrWeights) -> Tensor:
    """`maths.dtr_logits` with autograd in place of its hand-written backward, to show what that gains."""
    halves, indices = [], [(~is_vision_T).nonzero()[:, 0], is_vision_T.nonzero()[:, 0]]
    for index, hyper in zip(indices, (weights.text, weights.vision), strict=True):
        hyper = maths.HyperWeights(*(w.float() for w in hyper))
        z = z_TC[index].float()
        projected = F.linear(z, hyper.weight1_hC), F.linear(z, hyper.weight2_down_KJC.flatten(0, 1))
        halves.append(maths._logits(*projected, hyper, weights.phi_NC.float(), "none"))
    logits = torch.cat(halves)
    return torch.empty_like(logits).index_copy(0, torch.cat(indices), logits)


def naive_tuned_logits(z_TC: Tensor, is_vision_T: Tensor, weights: maths.DtrWeights) -> Tensor:
    """`maths.naive_dtr_logits`, optimised as far as possible while Θ is still built."""
    halves, indices = [], [(~is_vision_T).nonzero()[:, 0], is_vision_T.nonzero()[:, 0]]
    for index, hyper in zip(indices, (weights.text, weights.vision), strict=True):
        hyper = maths.HyperWeights(*(w.float() for w in hyper))
        K, J, C = hyper.weight2_down_KJC.shape
        z = z_TC[index].float()
        e_TK = F.pad(F.linear(z, hyper.weight1_hC, hyper.bias1_h), (0, 1), value=1.0)
        down_TJC = (e_TK @ hyper.weight2_down_KJC.view(K, -1)).view(-1, J, C)
        up_TrC = (e_TK @ hyper.weight2_up_KrC.view(K, -1)).view(-1, J // 2, C)
        s_Tr = maths._swiglu(torch.bmm(down_TJC, z[:, :, None])[:, :, 0])
        halves.append(F.linear(torch.bmm(s_Tr[:, None], up_TrC)[:, 0], weights.phi_NC.float()))
    logits = torch.cat(halves)
    return torch.empty_like(logits).index_copy(0, torch.cat(indices), logits)


def make_subjects(
    args: argparse.Namespace, s: Shape
) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], list[Tensor]]:
    """Forward of each subject by name, the tensors that get gradients, and those that do not."""
    torch.manual_seed(0)
    options = dict(device=DEVICE, dtype=measure.DTYPES[args.dtype])

    def parameter(*shape: int) -> Tensor:
        return (torch.randn(*shape, **options) * s.C**-0.5).requires_grad_()

    def hyper() -> maths.HyperWeights:
        K = s.h + 1
        return maths.HyperWeights(
            parameter(s.h, s.C), parameter(s.h), parameter(K, 2 * s.r, s.C), parameter(K, s.r, s.C)
        )

    weights = maths.DtrWeights(hyper(), hyper(), parameter(s.N, s.C))
    moe = MoEConfig(num_experts=s.N, dtr_hidden_size=s.h, dtr_rank=s.r, dtr_init_std=0.02)
    with torch.no_grad():
        draw_router(router_tensors(moe, LanguageConfig(hidden_size=s.C)), weights.named())
    z, gate = torch.randn(s.T, s.C, **options).requires_grad_(), parameter(s.N, s.C)
    is_vision = torch.rand(s.T, device=DEVICE) < args.vision_share
    fc1, fc2 = parameter(2 * s.ffn, s.C).detach(), parameter(s.C, s.ffn).detach()
    forwards = {
        "linear": lambda: F.linear(z.float(), gate.float()),
        "naive": lambda: maths.naive_dtr_logits(z, is_vision, weights),
        "naive-tuned": lambda: naive_tuned_logits(z, is_vision, weights),
        "autograd": lambda: autograd_logits(z, is_vision, weights),
        "masked": lambda: maths.dtr_logits(z, is_vision, weights, gather=False),
        "factored": lambda: maths.dtr_logits(z, is_vision, weights),
        "fused": lambda: fused_logits(z, is_vision, weights),
        "ffn": lambda: F.linear(maths._swiglu(F.linear(z, fc1)), fc2),
    }
    return (
        {name: forwards[name] for name in args.subjects},
        [z, gate, *weights.text, *weights.vision, weights.phi_NC],
        [fc1, fc2],
    )


def run_once(forward: Callable[[], Tensor]) -> None:
    """Run one forward and backward."""
    output = forward()
    output.backward(torch.ones_like(output))


def measure_shape(args: argparse.Namespace, s: Shape, skipped: dict[str, str]) -> list[dict[str, Any]]:
    """Measured rows, one per subject that works; the others are added to `skipped`."""
    forwards, leaves, frozen = make_subjects(args, s)
    forget, failed = functools.partial(measure.forget_gradients, leaves), {}
    runs = measure.working(
        {name: functools.partial(run_once, forward) for name, forward in forwards.items()}, failed
    )
    skipped.update({f"{name} at T = {s.T}, C = {s.C}": reason for name, reason in failed.items()})
    seconds = measure.alternate(runs, args.rounds, prepare=forget, clock=CLOCKS[args.clock])
    rows = []
    for name, run in runs.items():
        forget()
        peak, kept = measure.peak_bytes(run, on_cpu=True), measure.kept_bytes(forwards[name], leaves + frozen)
        rows.append(row_of(name, s, args.dtype, seconds[name]) | {"peak_bytes": peak, "kept_bytes": kept})
    return rows


def row_of(subject: str, s: Shape, dtype: str, seconds: list[float]) -> dict[str, Any]:
    """Time and work of one subject, in seconds, FLOP and bytes."""
    return {
        "T": s.T, "C": s.C, "h": s.h, "r": s.r, "subject": subject,
        "seconds": statistics.median(seconds), "seconds_range": [min(seconds), max(seconds)],
        "precision": router_work.precision(subject, dtype),
        "flop": router_work.flop(subject, s), "bytes": router_work.traffic(subject, s, dtype),
    }  # fmt: skip


def add_ratios(rows: list[dict[str, Any]], ceilings: dict[str, Any]) -> None:
    """Add derived figures to each row.

    These are the speeds and their shares of the ceilings, the nearer ceiling, and the times relative to
    `naive` and `ffn`.
    """
    found = {(r["T"], r["C"], r["h"], r["r"], r["subject"]): r["seconds"] for r in rows}
    for r in rows:
        r["flop_per_s"], r["bytes_per_s"] = r["flop"] / r["seconds"], r["bytes"] / r["seconds"]
        r["flop_share"] = r["flop_per_s"] / 1e12 / ceilings["products"][r["precision"]]["gemm_tflops"]
        r["bytes_share"] = r["bytes_per_s"] / 1e9 / ceilings["copy_gbytes"]
        r["bound"] = f"{r['precision']} product" if r["flop_share"] > r["bytes_share"] else "copy"
        naive, ffn = (found.get((r["T"], r["C"], r["h"], r["r"], name)) for name in ("naive", "ffn"))
        r["naive_to_this"], r["this_to_ffn"] = (
            measure.ratio(naive, r["seconds"]),
            measure.ratio(r["seconds"], ffn),
        )


def markdown(report: dict[str, Any]) -> str:
    """Markdown table of a report."""
    c, ceilings = report["circumstances"], report["ceilings"]
    products = ", ".join(
        f"{p} {measure.shown(v['gemm_tflops'], '.3g')} TFLOP/s" for p, v in ceilings["products"].items()
    )
    header = [
        "T, C, h, r",
        "",
        "ms",
        "peak MiB",
        "kept MiB",
        "GFLOP",
        "TFLOP/s",
        "% of product",
        "MB",
        "GB/s",
        "% of copy",
        "bound by",
        "naive ÷ it",
        "÷ ffn, %",
    ]
    rows = []
    for r in report["rows"]:
        numbers = [
            (r["seconds"], ".4g", 1e3),
            (r["peak_bytes"], ".0f", 2**-20),
            (r["kept_bytes"], ".0f", 2**-20),
            (r["flop"], ".4g", 1e-9),
            (r["flop_per_s"], ".3g", 1e-12),
            (r["flop_share"], ".1f", 100),
            (r["bytes"], ".4g", 1e-6),
            (r["bytes_per_s"], ".3g", 1e-9),
            (r["bytes_share"], ".1f", 100),
        ]
        ratios = measure.shown(r["naive_to_this"], ".1f"), measure.shown(r["this_to_ffn"], ".1f", 100)
        sizes = ", ".join(str(r[key]) for key in "TChr")
        rows.append(
            [sizes, r["subject"], *(measure.shown(*number) for number in numbers), r["bound"], *ratios]
        )
    notes = [f"\n{name} is left out: {reason}." for name, reason in report["skipped"].items()]
    return "\n".join(
        [
            f"One router layer, forward and backward, {c['dtype']}, on {c['device']}, commit {c['commit']}; "
            f"{c['clock']} time. "
            f"Ceilings: products {products}; copy {ceilings['copy_gbytes']:.3g} GB/s.",
            "",
            measure.table(header, rows),
            *notes,
            "",
        ]
    )


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    skipped = {name: reason for name in args.subjects if (reason := missing(name))}
    args.subjects = [name for name in args.subjects if name not in skipped]
    clock = CLOCKS[args.clock]
    ceilings = {
        "products": measure.ceilings(list(measure.DTYPES), clock),
        "copy_gbytes": measure.copy_gbytes(clock=clock),
    }
    rows = []
    for T, C, h, r in itertools.product(args.tokens, args.width, args.hidden, args.rank):
        rows += measure_shape(args, Shape(T=T, C=C, h=h, r=r, N=args.experts, ffn=args.ffn), skipped)
        gc.collect()
    add_ratios(rows, ceilings)
    options = {
        name: getattr(args, name)
        for name in ("dtype", "clock", "threads", "rounds", "experts", "ffn", "vision_share")
    }
    report = {
        "circumstances": measure.circumstances(**options),
        "ceilings": ceilings,
        "skipped": skipped,
        "subjects": {name: SUBJECTS[name] for name in args.subjects},
        "rows": rows,
    }
    print(markdown(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
