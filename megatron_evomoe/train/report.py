"""What a stage reports: a line per step, routing metrics, and the table at the end."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.moe import moe_utils

from megatron_evomoe.config import RunConfig, StageConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.data.loader import TrainLoader
from megatron_evomoe.diagnose.collect import Watch
from megatron_evomoe.diagnose.routing import share_metrics
from megatron_evomoe.observe import jsonl
from megatron_evomoe.parallel import backend
from megatron_evomoe.plan.flops import flops
from megatron_evomoe.train.build import Built
from megatron_evomoe.train.evaluate import Score
from megatron_evomoe.train.session import Session
from megatron_evomoe.train.step import StepResult

SUMMARY = "summary.json"
_LAST = 50  # steps averaged for the table


class StageMeter:
    """Collects over a stage and writes to the session's logger."""

    def __init__(self, session: Session, built: Built, config: RunConfig, stage: StageConfig) -> None:
        self.session, self.built, self.config, self.stage = session, built, config, stage
        self.sizes = count_parameters(built, config)
        self.started = time.perf_counter()
        self.watch = Watch(config, with_logits=False) if stage.kind == StageKind.ROUTE else None
        for layer in built.mixtures():
            layer.router.observer = self.watch
        forget_auxiliary_losses()

    def add(self, step: int, result: StepResult, seconds: float, loader: TrainLoader | None) -> None:
        """One step's line. Communicates where routing metrics are due."""
        metrics = {
            "lm loss": result.loss,
            "learning-rate": result.learning_rate,
            "grad-norm": result.grad_norm,
            "batch-size": self.config.train.global_batch_size,
            "iteration-time": seconds,
            "tokens/s": result.tokens / seconds,
            "throughput": flop_per_gpu(self.config, self.stage.kind, result.seq_length) / seconds / 1e12,
            "supervised-tokens": result.supervised_tokens,
        }
        if backend.on_gpu():
            metrics["mem-max-allocated-bytes"] = torch.cuda.max_memory_allocated()
        if self.watch is not None and step % self.config.log.moe_metrics_interval == 0:
            metrics |= routing_metrics(self.watch, self.config, steps=self.config.log.moe_metrics_interval)
        if step % self.config.log.log_interval == 0:
            if self.config.log.log_params_norm:
                metrics["params-norm"] = params_norm(self.built.gather_weights())
            if dist.get_world_size() > 1:
                metrics |= self.built.clock.report()
        samples = dict(loader.skipped) if loader is not None and loader.skipped else None
        self.session.logger.log(step, metrics, {"skipped": samples} if samples else None)

    def finish(self, scores: dict[str, Score]) -> None:
        """Write the stage's line of the table and its event. The steps come from metrics.jsonl, so a stage
        that was interrupted and resumed has the same line as one that ran through.
        """
        row: dict[str, Any] = {
            "stage": self.stage.name,
            "kind": self.stage.kind,
            "steps": self.config.train.train_iters,
        }
        for name, score in scores.items():
            row[name] = {"overall": score.accuracy(), **score.by_kind()}
        if self.session.topology.rank == 0:
            steps = [
                line
                for line in jsonl.read(self.session.run_dir / "metrics.jsonl")
                if line["stage"] == self.stage.name
            ]
            row |= {
                "first loss": steps[0]["lm loss"] if steps else None,
                "loss": statistics.fmean(line["lm loss"] for line in steps[-_LAST:]) if steps else None,
                "tokens/s": statistics.median(line["tokens/s"] for line in steps) if steps else None,
                "training seconds": sum(line["iteration-time"] for line in steps),
                "seconds": time.perf_counter() - self.started,
                **self.sizes,
            }
            rows = [r for r in _rows(self.session) if r["stage"] != self.stage.name]
            jsonl.replace(self.session.run_dir / SUMMARY, json.dumps([*rows, row], indent=1))
        if scores:
            self.session.logger.event(
                "eval", step=self.config.train.train_iters, accuracy=row["accuracy"], blind=row.get("blind")
            )


def is_measured(session: Session, stage: str) -> bool:
    """Whether `stage` has its line in the table already. Communicates: all ranks hear rank 0's answer."""
    answer = [any(row["stage"] == stage for row in _rows(session)) if session.topology.rank == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    return bool(answer[0])


def _rows(session: Session) -> list[dict[str, Any]]:
    path = session.run_dir / SUMMARY
    return json.loads(path.read_text()) if path.exists() else []


def routing_metrics(watch: Watch, config: RunConfig, *, steps: int) -> dict[str, float]:
    """Shares by modality and auxiliary losses of the last `steps` steps; `watch` counts anew afterwards.
    Communicates.
    """
    counts = watch.total()
    watch.shares.reset()
    microbatches = config.train.global_batch_size // (
        config.train.micro_batch_size * ps.get_data_parallel_world_size()
    )
    captured = _Capture()
    names = ["load_balancing_loss"] if config.moe.moe_aux_loss_coeff else []
    names += ["z_loss"] if config.moe.moe_z_loss_coeff else []
    if names:
        pattern = config.moe.layer_pattern(config.language.num_layers)
        for name in (
            names
        ):  # a pipeline rank without a mixture would not know whom to reduce with, and leave replicas out
            moe_utils.save_to_aux_losses_tracker(
                name,
                torch.zeros((), device=backend.device()),
                1,
                len(pattern),
                reduce_group=ps.get_tensor_and_context_parallel_group(),
            )
        moe_utils.track_moe_metrics(
            loss_scale=1 / (microbatches * steps),
            iteration=0,
            writer=captured,
            per_layer_logging=True,
            force_initialize=True,
            track_names=names,
            num_layers=len(pattern),
            moe_layer_freq=pattern,
        )
    return {**share_metrics(counts, watch.layers), **captured.values}


def forget_auxiliary_losses() -> None:
    """megatron-core sums auxiliary losses per process, under names that stay: nothing of another stage may
    come in.
    """
    newer = getattr(moe_utils, "get_moe_metrics_tracker", None)  # from 0.17 on
    (newer().metrics if newer else moe_utils.get_moe_layer_wise_logging_tracker()).clear()


class _Capture:
    """Stands where megatron-core expects a TensorBoard writer, so that our sinks get its numbers."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        self.values[name] = float(value)


def flop_per_gpu(config: RunConfig, kind: StageKind, seq_length: int) -> float:
    """FLOP of one optimizer step that the model asks for, mean over GPUs: recompute left out, padding and one
    image a row counted (the formulas: plan/flops.py).
    """
    config = replace(config, train=replace(config.train, recompute_granularity=None))
    stages = config.parallel.pipeline_model_parallel_size
    microbatches = config.train.global_batch_size // (
        config.train.micro_batch_size * ps.get_data_parallel_world_size()
    )
    return microbatches * sum(sum(flops(config, kind, rank, seq_length)) for rank in range(stages)) / stages


@torch.no_grad()
def params_norm(modules: Sequence[torch.nn.Module]) -> float:
    """L2 norm of the whole model's weights, each counted once whatever the layout. Communicates."""
    squares = torch.zeros(
        2, dtype=torch.float64, device=backend.device()
    )  # of experts, and of what all replicas hold
    for parameter in (p for module in modules for p in module.parameters()):
        shared = getattr(parameter, "allreduce", True)  # the core's mark of what is not an expert's
        group = ps.get_tensor_model_parallel_group() if shared else ps.get_expert_tensor_parallel_group()
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
            parameter, tp_group=group
        ):
            squares[int(shared)] += parameter.double().square().sum()
    for i, group in enumerate(
        (ps.get_expert_tensor_model_pipeline_parallel_group(), ps.get_model_parallel_group())
    ):
        dist.all_reduce(squares[i], group=group)
    return float(squares.sum().sqrt())


def count_parameters(built: Built, config: RunConfig) -> dict[str, int]:
    """Parameters of the whole model: all, trained, and active for one token. Communicates over pipeline
    stages.
    """
    tp, ep, etp = (
        ps.get_tensor_model_parallel_world_size(),
        ps.get_expert_model_parallel_world_size(),
        ps.get_expert_tensor_parallel_world_size(),
    )
    total = trained = idle = 0
    for name, p in ((n, p) for m in built.modules for n, p in m.named_parameters()):
        sharded = getattr(p, "tensor_model_parallel", False)
        is_expert = ".experts." in name
        size = p.numel() * ((etp if sharded else 1) * ep if is_expert else (tp if sharded else 1))
        if name.endswith("output_layer.weight") and config.language.tie_word_embeddings:
            continue  # the copy of a tied embedding on the last stage
        total += size
        trained += size if p.requires_grad else 0
        idle += (
            size * (config.moe.num_experts - config.moe.moe_router_topk) // config.moe.num_experts
            if is_expert
            else 0
        )
    counts = torch.tensor([total, trained, idle], dtype=torch.int64, device=backend.device())
    dist.all_reduce(counts, group=ps.get_pipeline_model_parallel_group())
    total, trained, idle = counts.tolist()
    return {"parameters": total, "trainable": trained, "active": total - idle}


def stage_table(session: Session) -> None:
    """Print what every stage so far came to, from `summary.json`."""
    rows = _rows(session) if session.topology.rank == 0 else []
    if not rows:
        return
    session.logger.table(
        "Stages",
        ["stage", "steps", "loss", "accuracy %", "blind %", "tokens/s", "trainable", "active", "seconds"],
        [
            [
                r["stage"],
                r["steps"],
                _round(r["loss"], 3),
                _percent(r, "accuracy"),
                _percent(r, "blind"),
                _round(r["tokens/s"], 0),
                r["trainable"],
                r["active"],
                _round(r["seconds"], 0),
            ]
            for r in rows
        ],
    )
    kinds = sorted({k for r in rows for k in r.get("accuracy", {}) if k != "overall"})
    if kinds:
        blind = rows[-1].get("blind", {})
        session.logger.table(
            "Held-out exact match by kind of question, %",
            ["question", *(r["stage"] for r in rows), f"{rows[-1]['stage']}, image blanked"],
            [[k, *(_of_kind(r.get("accuracy", {}), k) for r in rows), _of_kind(blind, k)] for k in kinds],
        )


def _percent(row: dict[str, Any], name: str) -> float | None:
    return _round(100 * row[name]["overall"], 1) if name in row else None


def _of_kind(accuracy: dict[str, float], kind: str) -> float | None:
    return _round(100 * accuracy[kind], 1) if kind in accuracy else None


def _round(value: float | None, digits: int) -> float | int | None:
    if value is None or value != value:
        return None
    return round(value, digits) if digits else round(value)
