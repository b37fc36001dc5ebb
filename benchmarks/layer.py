"""Cost that DTR adds to one MoE layer (router, dispatch, experts), compared with a linear router.

    python benchmarks/layer.py                              # GPU: bf16, 4k and 16k tokens; CPU: fp32, 1k
    python benchmarks/layer.py --train router experts --models 1.8b 7b --output layer.json
    python benchmarks/layer.py --tiny  # a layer of a few kilobytes: shows that the script works

The layer is built as in a run; forward and backward are timed. Half of the tokens, at random, are image
tokens. `--train router` is the stage `route`: experts are frozen, and the router and the hidden states get
gradients. All routers share one set of experts, and each runs once per round. Times are medians. Peak memory
is counted above weights and inputs and includes gradients; kept memory is what the graph holds between
forward and backward. The FLOP columns, counted by router_work.py, show the increase that would be expected if
all matrix products ran equally fast.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure  # noqa: E402
import router_work  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_evomoe.parallel import backend  # noqa: E402

ROUTERS: dict[str, dict[str, str]] = {
    "linear": {"router": "linear"},
    "dtr torch": {"router": "dtr", "dtr_kernel": "torch"},
    "dtr triton": {"router": "dtr", "dtr_kernel": "triton"},
}
FORMS = {"linear": "linear", "dtr torch": "masked" if backend.on_gpu() else "factored", "dtr triton": "fused"}
"""Name in `router_work` of the form that each router computes."""
REACH = {"seconds": 0.03, "peak_bytes": 0.05}
"""Largest increase that DTR may cause over the layer with a linear router, as a share."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=["1.8b", "7b"], default=["1.8b"], help="whose widths the layer has"
    )
    parser.add_argument("--tokens", type=int, nargs="+", metavar="T")
    parser.add_argument(
        "--train",
        nargs="+",
        choices=["router", "experts"],
        default=["router"],
        help="the router alone, or router and experts",
    )
    parser.add_argument(
        "--precision", choices=list(measure.DTYPES), default="bf16" if backend.on_gpu() else "fp32"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny layer, 64 tokens, one round: plumbing only"
    )
    parser.add_argument("--output", type=Path, help="write figures and circumstances as JSON")
    args = parser.parse_args()
    args.tokens = args.tokens or ([4096, 16384] if backend.on_gpu() else [1024])
    if args.tiny:
        args.tokens, args.rounds = [64], 1
    return args


def run_config(args: argparse.Namespace, model: str, router: dict[str, str]) -> Any:
    """Configuration of a run whose stage `route` has this layer."""
    import shapes
    from step import have_transformer_engine

    moe = {**router, "moe_grouped_gemm": have_transformer_engine()}
    seq_length = 64 if args.tiny else 2048  # has no effect on a single layer
    return shapes.model_config(
        model,
        2,
        tiny=args.tiny,
        seq_length=seq_length,
        micro_batch=1,
        microbatches=1,
        moe=moe,
        train={"bf16": args.precision == "bf16"},
    ).for_stage("route")


def build_layer(config: Any) -> torch.nn.Module:
    """The MoE layer of a decoder layer, to be trained without megatron-core's data-parallel wrapper."""
    from megatron.core.transformer.spec_utils import build_module

    from megatron_evomoe.model.transformer_config import language_transformer_config, resolve_transformer_impl
    from megatron_evomoe.moe.layer import moe_layer_spec

    core = language_transformer_config(config)
    core.gradient_accumulation_fusion = False  # its kernel adds to buffers of the wrapper
    spec = moe_layer_spec(config.moe, use_te=resolve_transformer_impl(config) == "transformer_engine")
    layer = build_module(spec, config=core) if hasattr(spec, "module") else spec(config=core)
    layer.set_layer_number(1)
    return layer.to(backend.device())


def build_layers(args: argparse.Namespace, model: str, skipped: dict[str, str]) -> dict[str, torch.nn.Module]:
    """One layer per router, all with the experts of the first one.

    Routers that cannot run here are added to `skipped`.
    """
    from megatron_evomoe.config import ConfigError
    from megatron_evomoe.moe.dtr import kernel as dtr_kernel

    layers: dict[str, torch.nn.Module] = {}
    for name, router in ROUTERS.items():
        try:
            dtr_kernel.check(router.get("dtr_kernel", "torch"))
        except ConfigError as error:
            skipped[name] = str(error)
            continue
        layers[name] = build_layer(run_config(args, model, router))
        layers[name].experts = layers["linear"].experts
    return layers


class Subject:
    """A layer with its input, token types and output gradient."""

    def __init__(self, layer: torch.nn.Module, hidden: Tensor, types: Tensor, gradient: Tensor) -> None:
        self.layer, self.hidden, self.types, self.gradient = layer, hidden, types, gradient

    def forward(self) -> Tensor:
        """Output of the layer, [T, 1, C]."""
        return self.layer(self.hidden, padding_mask=self.types)[0]

    def run(self) -> None:
        """Run forward and backward."""
        self.forward().backward(self.gradient)

    def busiest_share(self) -> float:
        """Share of the tokens that the busiest expert gets."""
        seen: list[Tensor] = []
        self.layer.router.observer = lambda number, types, logits, probs, routing_map: seen.append(
            routing_map.float().mean(0)
        )
        with torch.no_grad():
            self.forward()
        self.layer.router.observer = None
        return float(seen[0].max())


def measure_layers(
    args: argparse.Namespace,
    layers: dict[str, torch.nn.Module],
    model: str,
    tokens: int,
    train: str,
    skipped: dict[str, str],
) -> list[dict[str, Any]]:
    """Measured rows, one per router."""
    layers["linear"].experts.requires_grad_(train == "experts")
    options = dict(device=backend.device(), dtype=measure.DTYPES[args.precision])
    hidden = torch.randn(tokens, 1, layers["linear"].config.hidden_size, **options).requires_grad_()
    types, gradient = torch.randint(0, 2, (1, tokens), device=backend.device()), torch.randn_like(hidden)
    subjects = {name: Subject(layer, hidden, types, gradient) for name, layer in layers.items()}
    leaves = {hidden, *(p for layer in layers.values() for p in layer.parameters())}
    forget, failed = functools.partial(measure.forget_gradients, leaves), {}
    runs = measure.working({name: subject.run for name, subject in subjects.items()}, failed)
    skipped.update({f"{name} ({model}, T = {tokens}, {train})": reason for name, reason in failed.items()})
    seconds = measure.alternate(runs, args.rounds, prepare=forget)
    rows = []
    for name in runs:
        forget()
        rows.append(
            {
                "model": model,
                "T": tokens,
                "C": hidden.shape[2],
                "train": train,
                "router": name,
                "flop": flop(name, layers[name], tokens, train),
                **figures(subjects[name], seconds[name], [*leaves, types]),
            }
        )
    return rows


def figures(subject: Subject, seconds: list[float], own: list[Tensor]) -> dict[str, Any]:
    """Measured figures in seconds and bytes; `own` are all weights and inputs."""
    return {
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "peak_bytes": measure.peak_bytes(subject.run, on_cpu=True),
        "kept_bytes": measure.kept_bytes(subject.forward, own),
        "weight_bytes": sum(p.nbytes for p in subject.layer.parameters()),
        "busiest_share": subject.busiest_share(),
    }


def flop(router: str, layer: torch.nn.Module, tokens: int, train: str) -> int:
    """FLOP of the matrix products in router and experts; no token is dropped."""
    core, moe = layer.config, layer.router.moe
    shape = router_work.Shape(
        T=tokens,
        C=core.hidden_size,
        h=moe.dtr_hidden_size,
        r=moe.dtr_rank,
        N=core.num_moe_experts,
        ffn=core.moe_ffn_hidden_size,
    )
    frozen = router_work.flop("ffn", shape) * core.moe_router_topk
    return router_work.flop(FORMS[router], shape) + (frozen * 3 // 2 if train == "experts" else frozen)


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add to each row its increase over the linear router's layer, as a share.

    `within_reach` says whether both time and peak memory are within `REACH`.
    """
    linear = {(r["model"], r["T"], r["train"]): r for r in rows if r["router"] == "linear"}
    for r in rows:
        base = linear.get((r["model"], r["T"], r["train"]), {})
        for figure in ("seconds", "flop", "peak_bytes", "kept_bytes"):
            to_linear = measure.ratio(r[figure], base.get(figure))
            r[f"added_{figure}"] = None if to_linear is None else to_linear - 1
        added = {figure: r[f"added_{figure}"] for figure in REACH}
        r["within_reach"] = (
            None if None in added.values() else all(added[figure] <= most for figure, most in REACH.items())
        )


def markdown(report: dict[str, Any]) -> str:
    """Markdown table of a report."""
    header = [
        "widths of",
        "T",
        "C",
        "trained",
        "router",
        "ms",
        "added, %",
        "FLOP added, %",
        "peak MiB",
        "added, %",
        "kept MiB",
        "added, %",
        "weights MiB",
        "busiest expert, %",
        "reach",
    ]
    words = {None: "–", True: "within", False: "**not within**"}
    rows = []
    for r in report["rows"]:
        numbers = [
            (r["seconds"], ".4g", 1e3),
            (r["added_seconds"], "+.1f", 100),
            (r["added_flop"], "+.1f", 100),
            (r["peak_bytes"], ".1f", 2**-20),
            (r["added_peak_bytes"], "+.1f", 100),
            (r["kept_bytes"], ".1f", 2**-20),
            (r["added_kept_bytes"], "+.1f", 100),
            (r["weight_bytes"], ".1f", 2**-20),
            (r["busiest_share"], ".1f", 100),
        ]
        rows.append(
            [
                r["model"],
                str(r["T"]),
                str(r["C"]),
                r["train"],
                r["router"],
                *(measure.shown(*number) for number in numbers),
                "–" if r["router"] == "linear" else words[r["within_reach"]],
            ]
        )
    c = report["circumstances"]
    tiny = " **A tiny layer: these figures mean nothing.**" if c["tiny"] else ""
    notes = [f"\n{name} is left out: {reason}." for name, reason in report["skipped"].items()]
    return "\n".join(
        [
            f"One MoE layer, forward and backward, {c['precision']}, on {c['device']}, commit {c['commit']}. "
            "Added: against the layer "
            f"with a linear router; reach: time {100 * REACH['seconds']:+.0f} %, peak "
            f"{100 * REACH['peak_bytes']:+.0f} %.{tiny}",
            "",
            measure.table(header, rows),
            *notes,
            "",
        ]
    )


def main() -> None:
    args = parse_args()
    backend.prepare()
    backend.init_process_group(timeout_minutes=5)
    torch.set_num_threads(args.threads)
    from megatron_evomoe.parallel import topology

    topology.initialize(run_config(args, args.models[0], ROUTERS["linear"]))
    rows, skipped = [], {}
    for model in args.models:
        topology.seed_everything(0)
        layers = build_layers(args, model, skipped)
        for tokens, train in itertools.product(args.tokens, args.train):
            rows += measure_layers(args, layers, model, tokens, train, skipped)
            gc.collect()
    add_ratios(rows)
    options = {name: getattr(args, name) for name in ("tiny", "precision", "rounds", "threads")}
    report = {
        "circumstances": measure.circumstances(**options),
        "reach": REACH,
        "skipped": skipped,
        "rows": rows,
    }
    print(markdown(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
