"""Searches the layouts of every stage: whether each runs and fits, and how long a step would take.

This is arithmetic; no model is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from megatron_evomoe.config import ConfigError, RunConfig, StageConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import check_feature_cache
from megatron_evomoe.parallel.degrees import data_parallel_size
from megatron_evomoe.plan import fp8
from megatron_evomoe.plan import layout as layouts
from megatron_evomoe.plan.activations import activation_bytes
from megatron_evomoe.plan.communication import Volume, volume_of
from megatron_evomoe.plan.layout import Layout
from megatron_evomoe.plan.states import States, states_of
from megatron_evomoe.plan.step_time import Machine, StepTime, step_time
from megatron_evomoe.plan.work import SampleLengths, Work, packing_rounds, step_work


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One layout of one stage: memory of the fullest rank, time and traffic of the slowest pipeline stage."""

    layout: Layout
    data_parallel: int
    microbatches: int
    states: States
    fp8_bytes: int
    """FP8 copies of weights."""
    activation_bytes: int
    fullest_stage: int
    """Pipeline rank whose memory this is."""
    volume: Volume
    time: StepTime

    @property
    def total_bytes(self) -> int:
        """Memory of the fullest rank."""
        return self.states.total_bytes + self.fp8_bytes + self.activation_bytes


@dataclass(kw_only=True)
class Refusal:
    """Layouts that cannot run, all for one reason."""

    example: str
    """The trainer's own message for the first of them."""
    layouts: list[Layout] = field(default_factory=list)


@dataclass(kw_only=True)
class TooBig:
    """Layouts whose fullest rank needs too much memory, with the same largest part and the same remedy."""

    largest: str
    remedy: str
    estimates: list[Estimate] = field(default_factory=list)
    """Smallest first."""


@dataclass(kw_only=True)
class StagePlan:
    """The layouts of one stage: those that fit, that are too big, and that cannot run."""

    name: str
    kind: StageKind
    config: RunConfig
    """With the stage's overrides."""
    fits: list[Estimate]
    """Fastest first, and among equally fast ones the smallest first."""
    too_big: list[TooBig]
    refused: list[Refusal]


def stages_of(config: RunConfig, names: Sequence[str] | None = None) -> list[StageConfig]:
    """The run's stages (one of each kind if it lists none), or those of the given names.

    Raises:
        ConfigError: there is no stage of a given name.
    """
    stages = config.stages or [StageConfig(name=kind.value, kind=kind) for kind in StageKind]
    known = {s.name: s for s in stages}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"no stage {name!r}; this run has {', '.join(known)}")
    return [known[name] for name in names] if names else list(stages)


def plan_stage(
    config: RunConfig,
    stage: StageConfig,
    machine: Machine,
    held: dict[str, object] | None = None,
    lengths: SampleLengths | None = None,
) -> StagePlan:
    """Try every layout of `stage`.

    Args:
        config: the run's; the stage's overrides are applied here.
        held: `Layout` field -> the only value to try.
        lengths: tokens per sample to reckon traffic and time with; none takes the longest allowed, as
            memory always does.

    Raises:
        ConfigError: features are to be cached of a tower that trains.
    """
    config = config.for_stage(stage.name) if stage in config.stages else config
    check_feature_cache(config, stage)
    estimates: list[Estimate] = []
    refused: dict[str, Refusal] = {}
    search = _Search(config, stage.kind, machine, lengths)
    for layout in layouts.candidates(
        config, world_size=machine.world_size, gpus_per_node=machine.gpus_per_node, held=held
    ):
        try:
            search.check(layout)
        except ConfigError as error:
            # Messages that differ only in their numbers are one reason.
            reason = re.sub(r"#(, #)+", "#", re.sub(r"\d+", "#", str(error)))
            refused.setdefault(reason, Refusal(example=str(error))).layouts.append(layout)
        else:
            estimates.append(search.estimate(layout))
    fits = [e for e in estimates if e.total_bytes <= machine.usable_bytes]
    fits.sort(key=lambda e: (e.time.total, e.total_bytes))
    too_big = _group_too_big([e for e in estimates if e.total_bytes > machine.usable_bytes], fits, search)
    by_number = sorted(refused.values(), key=lambda r: -len(r.layouts))
    return StagePlan(
        name=stage.name, kind=stage.kind, config=config, fits=fits, too_big=too_big, refused=by_number
    )


class _Search:
    """One stage's estimates, with what several layouts share computed once."""

    def __init__(
        self, config: RunConfig, kind: StageKind, machine: Machine, lengths: SampleLengths | None
    ) -> None:
        self.config, self.kind, self.machine, self.lengths = config, kind, machine, lengths
        self._checked: dict[tuple, str | None] = {}
        self._states: dict[tuple, list[States]] = {}
        self._work: dict[tuple[int, int], Work] = {}
        self._estimates: dict[Layout, Estimate] = {}

    def check(self, layout: Layout) -> None:
        """Check that the layout can run; the result is kept per layout.

        Raises:
            ConfigError: the layout cannot run.
        """
        key = (layout.degrees, layout.recompute)
        if key not in self._checked:
            try:
                layouts.check(layouts.applied(self.config, layout), self.kind, self.machine.world_size)
                self._checked[key] = None
            except ConfigError as error:
                self._checked[key] = str(error)
        if message := self._checked[key]:
            raise ConfigError(message)

    def estimate(self, layout: Layout) -> Estimate:
        """Of a layout that passed `check`. Stages without experts do not care how experts would be split."""
        counted = layout if self.kind == StageKind.ROUTE else layout.without_experts()
        if counted not in self._estimates:
            self._estimates[counted] = estimate(
                self.config,
                self.kind,
                counted,
                self.machine,
                self._work_of(counted),
                self._states_of(counted),
            )
        return replace(self._estimates[counted], layout=layout)

    def _work_of(self, layout: Layout) -> Work:
        config = layouts.applied(self.config, layout)
        key = (data_parallel_size(config, self.machine.world_size), packing_rounds(config))
        if key not in self._work:
            self._work[key] = step_work(config, self.kind, self.machine.world_size, self.lengths)
        return self._work[key]

    def _states_of(self, layout: Layout) -> list[States]:
        if layout.degrees not in self._states:
            self._states[layout.degrees] = all_states(
                layouts.applied(self.config, layout), self.kind, self.machine
            )
        return self._states[layout.degrees]


def all_states(config: RunConfig, kind: StageKind, machine: Machine) -> list[States]:
    """Per pipeline rank; `config` has layout and overrides applied."""
    ranks = range(config.parallel.pipeline_model_parallel_size)
    return [states_of(config, kind, world_size=machine.world_size, pp_rank=rank) for rank in ranks]


def estimate(
    config: RunConfig,
    kind: StageKind,
    layout: Layout,
    machine: Machine,
    work: Work | None = None,
    states: list[States] | None = None,
) -> Estimate:
    """Memory, traffic and time of a feasible layout.

    Args:
        config: has the stage's overrides but not the layout.
        work: a step's, of one replica. None takes full rows.
    """
    config, world = layouts.applied(config, layout), machine.world_size
    states = all_states(config, kind, machine) if states is None else states
    work = work or step_work(config, kind, world)
    activations = [
        activation_bytes(config, kind, rank, work.microbatches, step_images=work.images)
        for rank in range(layout.pp)
    ]
    copies = [fp8.weight_bytes(config, kind, rank) for rank in range(layout.pp)]
    volumes = [
        volume_of(config, kind, states[rank], world_size=world, pp_rank=rank, work=work)
        for rank in range(layout.pp)
    ]
    times = [step_time(config, kind, volumes[rank], machine, rank, work) for rank in range(layout.pp)]
    fullest = max(
        range(layout.pp), key=lambda rank: states[rank].total_bytes + copies[rank] + activations[rank]
    )
    slowest = max(range(layout.pp), key=lambda rank: times[rank].total)
    return Estimate(
        layout=layout,
        data_parallel=data_parallel_size(config, world),
        microbatches=work.microbatches,
        states=states[fullest],
        fp8_bytes=copies[fullest],
        activation_bytes=activations[fullest],
        fullest_stage=fullest,
        volume=volumes[slowest],
        time=times[slowest],
    )


def largest_part(e: Estimate) -> str:
    """The kind of memory that takes most."""
    s = e.states
    parts = {
        "parameters": s.parameter_bytes,
        "gradients": s.gradient_bytes,
        "optimizer state": s.optimizer_bytes,
        "evolution state": s.evolution_bytes,
        "FP8 weights": e.fp8_bytes,
        "activations": e.activation_bytes,
    }
    return max(parts, key=lambda name: parts[name])


def _group_too_big(estimates: Iterable[Estimate], fits: list[Estimate], search: _Search) -> list[TooBig]:
    groups: dict[tuple[str, str], TooBig] = {}
    fitting = {e.layout for e in fits}
    for e in sorted(estimates, key=lambda e: e.total_bytes):
        key = (largest_part(e), _remedy(e, fitting, search))
        groups.setdefault(key, TooBig(largest=key[0], remedy=key[1])).estimates.append(e)
    return sorted(groups.values(), key=lambda g: -len(g.estimates))


def _remedy(e: Estimate, fitting: set[Layout], search: _Search) -> str:
    """The smallest change that makes this layout fit."""
    for recompute in layouts.RECOMPUTE[layouts.RECOMPUTE.index(e.layout.recompute) + 1 :]:
        if replace(e.layout, recompute=recompute) in fitting:
            return f"recompute_granularity: {recompute}"
    room = search.machine.usable_bytes - e.states.total_bytes - e.fp8_bytes
    size = search.config.train.micro_batch_size
    for smaller in range(size - 1, 0, -1):
        if size % smaller == 0 and e.activation_bytes * smaller / size <= room:
            return f"micro_batch_size: {smaller}"
    if not search.config.parallel.use_distributed_optimizer and e.data_parallel > 1:
        sharded = replace(
            search.config, parallel=replace(search.config.parallel, use_distributed_optimizer=True)
        )
        if (
            estimate(sharded, search.kind, e.layout, search.machine).total_bytes
            <= search.machine.usable_bytes
        ):
            return "use_distributed_optimizer: true"
    return "more TP, PP or EP, or GPUs with more memory"


def whole_run(plans: Sequence[StagePlan]) -> list[tuple[Layout, list[Estimate], float]]:
    """Degrees with which every stage fits, fastest first: (layout, each stage's best estimate, seconds).

    A run has one set of degrees, but each stage may have its own recompute. Seconds are the step times of all
    stages times their ``train_iters``.
    """
    by_degrees: dict[tuple, list[Estimate]] = {}
    for i, plan in enumerate(plans):
        for e in plan.fits:  # fastest first, so the first of its degrees is the stage's best
            found = by_degrees.setdefault(e.layout.degrees, [])
            if len(found) == i:
                found.append(e)
    complete = [es for es in by_degrees.values() if len(es) == len(plans)]
    seconds = {
        id(es): sum(e.time.total * p.config.train.train_iters for e, p in zip(es, plans, strict=True))
        for es in complete
    }
    largest = {id(es): max(e.total_bytes for e in es) for es in complete}
    complete.sort(key=lambda es: (seconds[id(es)], largest[id(es)]))
    return [(es[0].layout, es, seconds[id(es)]) for es in complete]
