"""The trainings to compare: stages, options and layouts, ordered so that needed checkpoints exist."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed.harness import COMBINED, LAYOUTS, Job, Layout, run

STEPS, ALL = 3, 6


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A training that is repeated under every layout."""

    kind: str
    sections: dict[str, Any] = field(default_factory=dict)
    collapse: bool = False


STAGES = {
    "align": Stage(kind="align"),
    "warmup": Stage(kind="warmup"),
    # The replicas hold different numbers of images, so they exchange them; two at a time, others again.
    "warmup, tower too": Stage(
        kind="warmup",
        sections={"train": {"trainable": ["vision", "projector", "language"], "vision_batch_size": 2}},
    ),
    "evolve": Stage(kind="evolve"),
    "route, linear": Stage(kind="route", sections={"moe": {"router": "linear"}}),
    "route, dtr": Stage(kind="route"),
    "route, cosine": Stage(kind="route", sections={"moe": {"router": "cosine"}}),
    "route, experts too": Stage(
        kind="route",
        sections={
            "moe": {"router": "linear", "moe_z_loss_coeff": 1e-2},
            "train": {"trainable": ["router", "experts"]},
        },
    ),
    # Where tokens are dropped, some gradients are zero up to rounding, and Adam's first steps may be as long
    # for them as for any other. At the usual learning rate, the gradient norm of a stage with the DTR would
    # differ by 2e-5 after three steps; at the usual epsilon, an element of a bias would differ by 1e-3.
    "route, capacity": Stage(
        kind="route",
        sections={
            "moe": {"moe_expert_capacity_factor": 0.6, "moe_router_topk": 2},
            "optimizer": {"lr": 1e-4, "adam_eps": 1e-6},
        },
    ),
    "route, collapsed": Stage(kind="route", sections={"moe": {"router": "linear"}}, collapse=True),
}


class Campaign:
    """Runs jobs and keeps their metrics: the steps' metrics are looked up by stage and layout."""

    def __init__(
        self,
        folder: Path,
        options: dict[str, Any] | None = None,
        layouts: dict[str, Layout] | None = None,
        start: Campaign | None = None,
    ) -> None:
        """See the class.

        Args:
            options: configuration sections merged over those of every stage.
            layouts: further layouts.
            start: the campaign from whose reference checkpoints the stages start, in place of own ones.
        """
        self.folder, self.options, self.start = folder, options or {}, start or self
        self.layouts = {**LAYOUTS, **COMBINED, **(layouts or {})}
        self.trained: dict[tuple[str, str], list[dict[str, float]]] = {}
        self.resumed: dict[tuple[str, str, str], list[dict[str, float]]] = {}
        self._calls = 0

    def checkpoint(self, stage: str, layout: str) -> Path:
        """The checkpoint of `stage` after `STEPS` steps under `layout`."""
        return self.folder / "saved" / stage.replace(", ", "-") / layout.replace(" ", "") / "steps3"

    def unbroken(self, stage: str) -> list[dict[str, float]]:
        """The metrics of six steps of `stage` on one rank, without a resume."""
        return self.trained[stage, "unbroken"]

    def run_references(self, stages: list[str]) -> None:
        """On one rank, save initial weights, then train each stage for six steps and save it after three."""
        first = self.folder / "saved" / "first"
        jobs = [Job(name="first", layout=self.layouts["one rank"], kind="align", last=1, save=str(first))]
        for stage in dict.fromkeys(["evolve", *stages]):
            jobs.append(self._job(stage, "one rank", save=True))
            if stage in stages:
                jobs.append(self._job(stage, "one rank", last=ALL))
        for name, steps in self._run(1, jobs).items():
            if name != "first":
                stage, _, last = name.split("|")
                self.trained[stage, "one rank" if int(last) == STEPS else "unbroken"] = steps

    def run_layouts(self, stages: list[str], layouts: list[str]) -> None:
        """Train each stage under each layout for three steps and save it."""
        self.run_pairs([(stage, layout) for layout in layouts for stage in stages])

    def run_pairs(self, pairs: list[tuple[str, str]]) -> None:
        """Train each pair (stage, layout) for three steps and save it."""
        for world in sorted({self.layouts[name].world for _, name in pairs}):
            jobs = [
                self._job(stage, name, save=True)
                for stage, name in pairs
                if self.layouts[name].world == world
            ]
            for name, steps in self._run(world, jobs).items():
                stage, layout, _ = name.split("|")
                self.trained[stage, layout] = steps

    def run_resumes(self, stages: list[str], pairs: list[tuple[str, str]]) -> None:
        """Train steps four to six under each pair's second layout, from its first layout's checkpoint."""
        for world in sorted({self.layouts[to].world for _, to in pairs}):
            here = [pair for pair in pairs if self.layouts[pair[1]].world == world]
            jobs = [self._job(stage, to, resume=source) for source, to in here for stage in stages]
            for name, steps in self._run(world, jobs).items():
                stage, to, source = name.split("|")
                self.resumed[stage, source, to] = steps

    def _job(
        self, name: str, layout: str, *, last: int = STEPS, save: bool = False, resume: str | None = None
    ) -> Job:
        stage = STAGES[name]
        sections = {
            key: {**stage.sections.get(key, {}), **self.options.get(key, {})}
            for key in {*stage.sections, *self.options}
        }
        start = (
            self.start.folder / "saved" / "first"
            if stage.kind != "route"
            else self.start.checkpoint("evolve", "one rank")
        )
        return Job(
            name=f"{name}|{layout}|{resume or last}",
            layout=self.layouts[layout],
            kind=stage.kind,
            sections=sections,
            collapse=stage.collapse,
            start=None if resume else str(start),
            resume=str(self.checkpoint(name, resume)) if resume else None,
            first=STEPS + 1 if resume else 1,
            last=ALL if resume else last,
            save=str(self.checkpoint(name, layout)) if save else None,
        )

    def _run(self, world: int, jobs: list[Job]) -> dict[str, list[dict[str, float]]]:
        self._calls += 1
        # Jobs of a layout run in turn and share its process groups: gloo's threads outlive a group, and
        # hundreds of idle ones slow the whole machine.
        jobs = sorted(jobs, key=lambda job: repr(job.layout))
        return run(world, jobs, self.folder / f"call{self._calls}")


def deviation(wanted: list[dict[str, float]], got: list[dict[str, float]]) -> float:
    """The largest relative difference over all steps and metrics.

    Differences of metrics below 1 (shares, small losses) are taken absolutely.

    Raises:
        AssertionError: a metric is missing on one side.
    """
    worst = 0.0
    assert len(wanted) == len(got)
    for a, b in zip(wanted, got, strict=True):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        worst = max(
            worst, *(abs(a[k] - b[k]) / max(abs(a[k]), 1e-2 if k in ("lr", "grad norm") else 1.0) for k in a)
        )
    return worst
