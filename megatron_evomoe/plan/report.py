"""The plan as text, and as plain data for `--json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.plan.layout import Layout, of_config
from megatron_evomoe.plan.search import Estimate, StagePlan, whole_run
from megatron_evomoe.plan.step_time import Machine, StepTime

GIB, GB = 2**30, 1e9


def lines(plans: Sequence[StagePlan], machine: Machine, top: int) -> Iterator[str]:
    """The report, line by line."""
    yield (
        f"{machine.nnodes} nodes x {machine.gpus_per_node} GPUs x {machine.gpu_memory:g} GiB, of which "
        f"{machine.usable_bytes / GIB:.1f} GiB are planned with; assumed {machine.tflops:g} TFLOP/s, "
        f"{machine.intra_bandwidth:g} GB/s inside a node, {machine.inter_bandwidth:g} GB/s between nodes"
    )
    yield "GiB: held by the fullest rank; activations and FP8 weights are estimates, the rest is exact."
    yield "GB: sent per step by a rank of the slowest pipeline stage. Ranked by estimated step time."
    for plan in plans:
        yield from _stage(plan, machine, top)
    if len(plans) > 1:
        yield from _whole(plans, top)


def _stage(plan: StagePlan, machine: Machine, top: int) -> Iterator[str]:
    too_big, refused = sum(len(g.estimates) for g in plan.too_big), sum(len(g.layouts) for g in plan.refused)
    shown = distinct(plan)
    train, gpu, packing = plan.config.train, plan.config.gpu, plan.config.data.packing
    precision = ("bf16" if train.bf16 else "fp32") + (
        f" and FP8 ({gpu.fp8_recipe})" if gpu.fp8_format else ""
    )
    yield ""
    yield (
        f"stage {plan.name} ({plan.kind}): {len(plan.fits)} layouts fit, {too_big} are too big, {refused} "
        f"cannot run (micro_batch_size {train.micro_batch_size}, global_batch_size "
        f"{train.global_batch_size}, seq_length {plan.config.data.seq_length}, "
        f"{'' if packing == 'none' else f'packing {packing}, '}{precision}, distributed "
        f"optimizer {'on' if plan.config.parallel.use_distributed_optimizer else 'off'})"
    )
    for i, e in enumerate(shown[:top]):
        yield from _row(i + 1, e, plan.kind, _why(e, shown[0]))
    yield from _as_configured(plan, shown)
    for group in plan.too_big:
        least = group.estimates[0]
        yield (
            f"  too big: {len(group.estimates)} layouts, mostly for their {group.largest}; the smallest, "
            f"{label(least.layout, plan.kind)}, needs {least.total_bytes / GIB:.1f} GiB. Would fit with: "
            f"{group.remedy}"
        )
    for refusal in plan.refused:
        yield (
            f"  cannot run: {len(refusal.layouts)} layouts, e.g. {label(refusal.layouts[0], plan.kind)}: "
            f"{refusal.example}"
        )


def distinct(plan: StagePlan) -> list[Estimate]:
    """The layouts that fit, fastest first, each set of degrees with its best recompute.

    In a stage without experts their degrees are left out of the comparison.
    """
    seen: dict[tuple, Estimate] = {}
    for e in plan.fits:
        seen.setdefault((e.layout if plan.kind == StageKind.ROUTE else e.layout.without_experts()).degrees, e)
    return list(seen.values())


def _as_configured(plan: StagePlan, shown: list[Estimate]) -> Iterator[str]:
    """A line on the layout that the configuration asks for."""
    own = of_config(plan.config)
    for e in plan.fits:
        if e.layout == own:
            yield (
                f"  as configured: {label(own, plan.kind)} fits in {e.total_bytes / GIB:.1f} GiB, "
                f"{_why(e, shown[0])}"
            )
            return
    for group in plan.too_big:
        for e in group.estimates:
            if e.layout == own:
                yield f"  as configured: {label(own, plan.kind)} is too big, {e.total_bytes / GIB:.1f} GiB"
                return
    for refusal in plan.refused:
        if own in refusal.layouts:
            yield f"  as configured: {label(own, plan.kind)} cannot run"


def label(layout: Layout, kind: StageKind = StageKind.ROUTE) -> str:
    """A layout in a few words; EP and expert-TP are named only if there are experts."""
    words = [f"TP {layout.tp}", f"PP {layout.pp}"]
    if kind == StageKind.ROUTE:
        words += [f"EP {layout.ep}", f"expert-TP {layout.etp}"]
    if layout.layers_per_chunk:
        words.append(f"chunks of {layout.layers_per_chunk} layers")
    return ", ".join([*words, f"recompute {layout.recompute}"])


def _row(number: int, e: Estimate, kind: StageKind, why: str) -> Iterator[str]:
    """A layout in three lines: what it is and how fast, memory, traffic."""
    s, v = e.states, e.volume
    yield (
        f"  {number}. {label(e.layout, kind)}; DP {e.data_parallel}, microbatches {e.microbatches}: "
        f"{e.time.total:.3f} s a step, bubble {e.time.bubble / e.time.total:.1%} ({why})"
    )
    memory = {
        f"parameters ({_count(s.parameters)})": s.parameter_bytes,
        "gradients": s.gradient_bytes,
        "optimizer": s.optimizer_bytes,
        "evolution": s.evolution_bytes,
        "FP8 weights": e.fp8_bytes,
        "activations": e.activation_bytes,
    }
    yield _figures(f"GiB {e.total_bytes / GIB:.2f}:", memory, GIB)
    sent = {
        "TP": v.tp,
        "PP": v.pp,
        "EP": v.ep,
        "gradient reduction": v.gradients,
        "parameter gather": v.parameters,
    }
    yield _figures(f"GB  {v.total / GB:.2f}:", sent, GB)


def _figures(head: str, parts: dict[str, int], unit: float) -> str:
    return f"     {head:<11}" + ", ".join(
        f"{name} {amount / unit:.2f}" for name, amount in parts.items() if amount
    )


def _count(n: int) -> str:
    return f"{n / 1e9:.3f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"


def _why(e: Estimate, best: Estimate) -> str:
    """What takes most of the step's time, or what makes it longer than the best layout's."""
    if e.time == best.time:
        biggest = sorted(_parts(e.time).items(), key=lambda kv: -kv[1])[:3]
        return "time: " + ", ".join(
            f"{seconds / e.time.total:.0%} {name}" for name, seconds in biggest if seconds
        )
    more = {name: seconds - _parts(best.time)[name] for name, seconds in _parts(e.time).items()}
    ordered = sorted(more, key=lambda name: more[name])
    told = [name for name in (ordered[-1], ordered[0]) if abs(more[name]) >= 0.0005]
    return f"{e.time.total / best.time.total - 1:+.0%}: " + ", ".join(
        f"{name} {more[name]:+.3f} s" for name in told
    )


def _parts(t: StepTime) -> dict[str, float]:
    return {"compute": t.compute, "TP": t.tp, "EP": t.ep, "PP": t.pp, "DP": t.dp, "bubble": t.bubble}


def _whole(plans: Sequence[StagePlan], top: int) -> Iterator[str]:
    runs = whole_run(plans)
    yield ""
    yield f"whole run (one set of degrees for all stages): {len(runs)} sets fit every stage"
    for i, (layout, estimates, seconds) in enumerate(runs[:top]):
        chunk = f", chunks of {layout.layers_per_chunk} layers" if layout.layers_per_chunk else ""
        recompute = ", ".join(f"{p.name} {e.layout.recompute}" for p, e in zip(plans, estimates, strict=True))
        yield (
            f"  {i + 1}. TP {layout.tp}, PP {layout.pp}, EP {layout.ep}, expert-TP {layout.etp}{chunk}: "
            f"{seconds / 3600:.1f} h; recompute: {recompute}"
        )


def as_data(plans: Sequence[StagePlan], machine: Machine) -> dict[str, Any]:
    """Everything as values of JSON: bytes, seconds, counts."""
    return {
        "machine": {**asdict(machine), "usable_bytes": int(machine.usable_bytes)},
        "stages": [
            {
                "name": plan.name,
                "kind": plan.kind,
                "fits": [estimate_data(e) for e in plan.fits],
                "too_big": [
                    {
                        "largest": g.largest,
                        "remedy": g.remedy,
                        "layouts": [estimate_data(e) for e in g.estimates],
                    }
                    for g in plan.too_big
                ],
                "refused": [
                    {"reason": g.example, "layouts": [asdict(x) for x in g.layouts]} for g in plan.refused
                ],
            }
            for plan in plans
        ],
        "whole_run": [
            {"layout": asdict(layout), "recompute": [e.layout.recompute for e in es], "seconds": seconds}
            for layout, es, seconds in whole_run(plans)
        ],
    }


def estimate_data(e: Estimate) -> dict[str, Any]:
    """One layout's estimate as values of JSON."""
    return {
        "layout": asdict(e.layout),
        "data_parallel": e.data_parallel,
        "microbatches": e.microbatches,
        "fullest_stage": e.fullest_stage,
        "states": asdict(e.states),
        "fp8_bytes": e.fp8_bytes,
        "activation_bytes": e.activation_bytes,
        "total_bytes": e.total_bytes,
        "communication_bytes": asdict(e.volume),
        "seconds": {**asdict(e.time), "total": e.time.total},
        "bubble_fraction": e.time.bubble / e.time.total,
    }
