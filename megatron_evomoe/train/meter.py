"""What is measured of a stage: the numbers of each step, and the stage's row of the table at the end."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.diagnose.collect import Watch
from megatron_evomoe.model import inventory
from megatron_evomoe.parallel import backend, topology
from megatron_evomoe.plan.flops import flops
from megatron_evomoe.plan.work import Work
from megatron_evomoe.train import stage_report
from megatron_evomoe.train.held_out import Score
from megatron_evomoe.train.hooks import StepHook
from megatron_evomoe.train.parameters import params_norm
from megatron_evomoe.train.routing_metrics import forget_auxiliary_losses, routing_metrics
from megatron_evomoe.train.stage_run import StageRun
from megatron_evomoe.train.step import StepResult


class MeterHook(StepHook):
    """Measures each step, and writes the stage's row of `summary.json` when it has been measured.

    `iteration-time` (seconds) runs from the reading of the samples to the end of evolution and of the user's
    hooks; saves and logging are not part of it.
    """

    def begin_stage(self, run: StageRun) -> None:
        """Watch the routers of a mixture."""
        self._stage_began = time.perf_counter()
        self._filled_microbatches = 0  # since routing was last measured
        self._watch = Watch(run.config, with_logits=False) if run.stage.kind.has_router else None
        for layer in run.built.mixtures():
            layer.router.observer = self._watch
        forget_auxiliary_losses()

    def begin_step(self, run: StageRun, step: int) -> None:
        """Start the step's time."""
        self._step_began = time.perf_counter()

    def after_step(self, run: StageRun, result: StepResult) -> None:
        """Add the step's numbers. Communicates if routing metrics or the norm of the parameters are due."""
        seconds, log = time.perf_counter() - self._step_began, run.config.log
        metrics = {
            "lm loss": result.loss,
            "learning-rate": result.learning_rate,
            "grad-norm": result.grad_norm,
            "batch-size": run.config.train.global_batch_size,
            "iteration-time": seconds,
            "tokens/s": result.tokens / seconds,
            "throughput": flop_per_gpu(run.config, run.stage.kind, result) / seconds / 1e12,
            "supervised-tokens": result.supervised_tokens,
            "padding-share": 1 - result.tokens / result.positions,
        }
        if backend.on_gpu():
            metrics["mem-max-allocated-bytes"] = torch.cuda.max_memory_allocated()
        self._filled_microbatches += result.filled_microbatches
        if self._watch is not None and run.step % log.moe_metrics_interval == 0:
            metrics |= routing_metrics(self._watch, run.config, microbatches=self._filled_microbatches)
            self._filled_microbatches = 0
        if run.step % log.log_interval == 0 and log.log_params_norm:
            metrics["params-norm"] = params_norm(run.built.gather_weights())
        run.add_metrics(metrics)

    def after_measure(self, run: StageRun, scores: dict[str, Score]) -> None:
        """Write the stage's row and its `eval` event."""
        seconds = time.perf_counter() - self._stage_began
        counts = inventory.count(run.config, run.stage.kind)._asdict()
        stage_report.write_row(run, scores, {"seconds": seconds, **counts})


def flop_per_gpu(config: RunConfig, kind: StageKind, result: StepResult) -> float:
    """FLOP of one optimizer step per GPU, a mean over replicas, without recompute.

    Padding is counted. Each sequence has its own length, and each image its own positions (plan/flops.py).
    """
    config = replace(config, train=replace(config.train, recompute_granularity=None))
    work = Work(
        microbatches=result.microbatches,
        positions=result.positions,
        squares=result.squares,
        images=result.image_tokens // config.vision.tokens_per_image,
    )
    stages = config.parallel.pipeline_model_parallel_size
    of_all_replicas = sum(sum(flops(config, kind, rank, work)) for rank in range(stages)) / stages
    return of_all_replicas / topology.current().data.size
