"""Speed and memory of training steps of every stage on one GPU, compared with megatron-core's bare GPT.

    python benchmarks/step.py --output step.json
    python benchmarks/step.py --models 7b --layers 8 --stages warmup route --precisions bf16
    python benchmarks/step.py --tiny  # a model of a few kilobytes, on a CPU too: shows that the script works

Reports tokens/s, TFLOP/s, MFU, memory, and the overhead of each stage. Models have the published widths.
Their layers are cut to --layers, or until the bare model, bf16 and FP8 fit the device side by side according
to `plan`. All of them take one optimizer step per round, and figures are medians. docs/performance.md has the
formulas.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure  # noqa: E402
import torch  # noqa: E402

from megatron_evomoe.parallel import backend  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=["1.8b", "7b"], default=["1.8b", "7b"])
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=["align", "warmup", "evolve", "route"],
        default=["align", "warmup", "evolve", "route"],
    )
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp8"], default=["bf16", "fp8"])
    parser.add_argument("--layers", type=int, help="of every model; by default as many as fit")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=4, help="per optimizer step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model and batch, one round: plumbing only"
    )
    parser.add_argument("--output", type=Path, help="write figures and circumstances as JSON")
    args = parser.parse_args()
    if args.tiny:
        args.layers, args.seq_length, args.micro_batch, args.microbatches, args.rounds = (
            args.layers or 2,
            64,
            2,
            2,
            1,
        )
    return args


def fp8_missing() -> str | None:
    """Reason why FP8 cannot be measured here, if there is one."""
    if not backend.on_gpu():
        return "no GPU"
    if backend.capability() < (8, 9):
        return "the GPU has no FP8 (compute capability below 8.9)"
    return None if have_transformer_engine() else "Transformer Engine does not import"


def have_transformer_engine() -> bool:
    """Whether the stages run on Transformer Engine's layers here."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return backend.on_gpu() and HAVE_TE


class Subject:
    """Model that takes optimizer steps, and the GPU memory that it holds between them."""

    def __init__(self, build: Callable[[], Callable[[], float]]) -> None:
        before = measure.allocated()
        self.run = build()
        self.first_loss = self.run()  # allocates the optimizer's state
        gc.collect()
        self.held = measure.allocated() - before

    def peak_bytes(self) -> int | None:
        """Peak memory of this subject, without that of the other subjects; None on a CPU.

        It includes what the subject holds between steps.
        """
        above = measure.peak_bytes(self.run)
        return None if above is None else self.held + above


def ours(config: Any, kind: str, step: Any, built: dict[str, Any]) -> Callable[[], float]:
    """Function that takes one optimizer step of a stage, whose parts it adds to `built`."""
    from megatron_evomoe.train.built import build_stage
    from megatron_evomoe.train.step import take_step

    stage = next(s for s in config.stages if s.kind == kind)
    built[kind] = parts = build_stage(config, stage)
    for mlp in parts.evolving:
        mlp.begin()
    number = 0

    def run() -> float:
        nonlocal number
        number += 1
        result = take_step(parts, step, number)
        for mlp in parts.evolving:
            mlp.evolve(number, config.train.seed)
        return result.loss

    return run


def images_alone(built: Any, step: Any) -> Callable[[], None]:
    """Function that runs vision tower and projector, forward only, on all images of the step."""

    def run() -> None:
        with torch.no_grad():
            for micro in step.microbatches:
                built.modules[0].encode_images(micro.images)

    return run


def measure_stage(
    args: argparse.Namespace, model: str, kind: str, layers: int, precisions: list[str]
) -> list[dict[str, Any]]:
    """Measured rows, one per precision."""
    import bare
    import shapes

    from megatron_evomoe.parallel import topology
    from megatron_evomoe.train.routing_metrics import forget_auxiliary_losses

    forget_auxiliary_losses()  # the core's record has one entry per layer of the last model
    options = dict(
        tiny=args.tiny,
        seq_length=args.seq_length,
        micro_batch=args.micro_batch,
        microbatches=args.microbatches,
        moe={"moe_grouped_gemm": have_transformer_engine()},
    )
    configs = {
        p: shapes.model_config(model, layers, precision=p, **options).for_stage(kind) for p in precisions
    }
    plain = shapes.model_config(model, layers, **options).for_stage(kind)
    step = shapes.random_step(plain)
    topology.seed_everything(plain.train.seed)
    built: dict[str, Any] = {}
    subjects = {"bare": Subject(lambda: bare.build(plain, kind, step))}
    for precision, config in configs.items():
        subjects[precision] = Subject(lambda config=config: ours(config, kind, step, built))
    actions = {name: subject.run for name, subject in subjects.items()}
    actions["images"] = images_alone(built[kind], step)
    actions["images"]()
    seconds = measure.alternate(actions, args.rounds)
    losses = {name: (subject.first_loss, subject.run()) for name, subject in subjects.items()}
    peaks = {name: subject.peak_bytes() for name, subject in subjects.items()}
    return [
        row_of(model, kind, layers, config, precision, seconds, losses, peaks)
        for precision, config in configs.items()
    ]


def row_of(
    model: str,
    kind: str,
    layers: int,
    config: Any,
    precision: str,
    seconds: dict[str, list[float]],
    losses: dict[str, tuple[float, float]],
    peaks: dict[str, int | None],
) -> dict[str, Any]:
    """All figures of one stage and precision, in bytes, seconds and FLOP."""
    import shapes

    from megatron_evomoe.plan.flops import flops

    median = {name: statistics.median(values) for name, values in seconds.items()}
    m = config.train.global_batch_size // config.train.micro_batch_size
    tokens, work = config.train.global_batch_size * config.data.seq_length, m * sum(flops(config, kind, 0))
    own = median[precision]
    return {
        "model": model,
        "stage": kind,
        "precision": precision,
        "layers": layers,
        "tokens": tokens,
        "flop": work,
        "seconds": own,
        "seconds_range": [min(seconds[precision]), max(seconds[precision])],
        "tokens_per_s": tokens / own,
        "tflops": work / own / 1e12,
        "bare_seconds": median["bare"],
        "images_seconds": median["images"],
        "overhead": own / median["bare"] - 1,
        "overhead_without_images": (own - median["images"]) / median["bare"] - 1,
        "peak_bytes": peaks[precision],
        "planned_bytes": shapes.planned_bytes(config, kind),
        "bare_peak_bytes": peaks["bare"],
        "losses": losses[precision],
        "bare_losses": losses["bare"],
    }


def add_ratios(rows: list[dict[str, Any]], ceilings: dict[str, dict[str, float | None]]) -> None:
    """Add MFU by both ceilings, and ratios to the stage in bf16 and to `warmup` in the same precision."""
    speed = {(r["model"], r["stage"], r["precision"]): r["tokens_per_s"] for r in rows}
    for r in rows:
        for name in ("gemm", "data_sheet"):
            r[f"mfu_{name}"] = measure.ratio(r["tflops"], ceilings[r["precision"]][f"{name}_tflops"])
        r["to_bf16"] = measure.ratio(r["tokens_per_s"], speed.get((r["model"], r["stage"], "bf16")))
        r["to_warmup"] = measure.ratio(r["tokens_per_s"], speed.get((r["model"], "warmup", r["precision"])))
        r["memory_to_plan"] = measure.ratio(r["peak_bytes"], r["planned_bytes"])


def markdown(report: dict[str, Any]) -> str:
    """Markdown table of a report."""
    header = [
        "model (layers)",
        "stage",
        "",
        "tokens/s",
        "TFLOP/s",
        "MFU, GEMM",
        "MFU, data sheet",
        "÷ bf16",
        "÷ warmup",
        "overhead",
        "without images",
        "peak GiB",
        "÷ plan",
    ]
    rows = []
    for r in report["rows"]:
        numbers = [
            (r["tokens_per_s"], ".0f", 1),
            (r["tflops"], ".4g", 1),
            (r["mfu_gemm"], ".1f", 100),
            (r["mfu_data_sheet"], ".1f", 100),
            (r["to_bf16"], ".2f", 1),
            (r["to_warmup"], ".2f", 1),
            (r["overhead"], "+.1f", 100),
            (r["overhead_without_images"], "+.1f", 100),
            (r["peak_bytes"], ".2f", 2**-30),
            (r["memory_to_plan"], ".2f", 1),
        ]
        rows.append(
            [
                f"{r['model']} ({r['layers']})",
                r["stage"],
                r["precision"],
                *(measure.shown(*number) for number in numbers),
            ]
        )
    notes = [f"\n{name} is left out: {reason}." for name, reason in report["skipped"].items()]
    return "\n".join([title(report), "", measure.table(header, rows), *notes, ""])


def title(report: dict[str, Any]) -> str:
    """Heading of a report: what was measured, and on which device."""
    c = report["circumstances"]
    peaks = ", ".join(
        f"{p} {measure.shown(v['gemm_tflops'], '.4g')} (data sheet: "
        f"{measure.shown(v['data_sheet_tflops'], '.4g')})"
        for p, v in report["ceilings"].items()
    )
    tiny = " **Tiny models: these figures mean nothing.**" if c["tiny"] else ""
    return (
        f"Training steps on {c['device']}, commit {c['commit']}; layers in brackets; MFU and overhead in %; "
        f"TFLOP/s of a matrix product: {peaks}.{tiny}"
    )


def main() -> None:
    args = parse_args()
    backend.prepare()
    backend.init_process_group(timeout_minutes=5)
    import shapes

    from megatron_evomoe.parallel import topology

    missing = fp8_missing()
    skipped = {"fp8": missing} if missing and "fp8" in args.precisions else {}
    precisions = [p for p in args.precisions if p not in skipped]
    if not precisions:
        sys.exit(f"nothing to measure: fp8 needs more than is here ({missing})")
    options = dict(seq_length=args.seq_length, micro_batch=args.micro_batch, microbatches=args.microbatches)
    topology.initialize(
        shapes.model_config("1.8b", 2, tiny=True, seq_length=64, micro_batch=1, microbatches=1)
    )
    ceilings, rows = measure.ceilings(precisions), []
    for model in args.models:
        memory = torch.cuda.get_device_properties(0).total_memory if backend.on_gpu() else 0.0
        layers = args.layers or shapes.layers_that_fit(model, memory, precisions, **options)
        for kind in args.stages:
            try:
                rows += measure_stage(args, model, kind, layers, precisions)
            except torch.OutOfMemoryError as error:
                skipped[f"{model}, {layers} layers, {kind}"] = str(error).split("\n")[0]
            gc.collect()
    add_ratios(rows, ceilings)
    report = {
        "circumstances": measure.circumstances(tiny=args.tiny, rounds=args.rounds, **options),
        "ceilings": ceilings,
        "skipped": skipped,
        "rows": rows,
    }
    print(markdown(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
